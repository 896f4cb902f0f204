//! A job's pods as the API server tells of them.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use super::{Cluster, MINUTE, script, wait_for};

/// The pods of a job, followed from its beginning.
#[derive(Debug)]
pub struct PodWatch {
    child: Child,
    events: Arc<Mutex<Vec<String>>>,
}

impl PodWatch {
    pub(super) fn start(cluster: &Cluster, namespace: &str, selector: &str) -> Self {
        let columns = r"jsonpath={.type} {.object.metadata.name} {.object.status.phase}{'\n'}";
        let mut child = Command::new(script())
            .arg("enter")
            .arg(&cluster.run_dir)
            .args(["kubectl", "get", "pods", "--namespace", namespace, "--selector", selector])
            .args(["--watch", "--output-watch-events", "--request-timeout=20m", "--output", columns])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the cluster's script starts");
        let lines = BufReader::new(child.stdout.take().expect("standard output is piped")).lines();
        let events = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&events);
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                seen.lock().expect("nobody fails while holding it").push(line);
            }
        });
        Self { child, events }
    }

    /// Waits until no pod lives, and returns the names of the pods that there were, in order, without those that only handed on
    /// a report: whether one is needed depends on who was faster. Panics if two lived at once.
    pub fn one_after_another(&self) -> Vec<String> {
        wait_for("the pods to end", MINUTE, || {
            let events = self.events.lock().expect("nobody fails while holding it").clone();
            let mut live = Vec::new();
            let mut pods: Vec<String> = Vec::new();
            for event in &events {
                let [what, name, phase] = event.split(' ').collect::<Vec<_>>()[..] else { panic!("{event:?}") };
                live.retain(|one| *one != name);
                if what != "DELETED" && !matches!(phase, "Succeeded" | "Failed") {
                    live.push(name);
                }
                assert!(live.len() < 2, "{live:?} live at once: {events:#?}");
                if pods.iter().all(|pod| pod != name) {
                    pods.push(name.to_owned());
                }
            }
            pods.retain(|name| !name.contains("-report-"));
            if live.is_empty() && !pods.is_empty() { Ok(pods) } else { Err(format!("{events:?}")) }
        })
    }
}

impl Drop for PodWatch {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
