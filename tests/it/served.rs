//! Which namespaces the operator serves, where they are not as they were when it was installed. A real operator, without a
//! cluster: what it may list is decided by the API server alone.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};

use harness::cluster::{MINUTE, wait_for};
use harness::kube_apiserver::KubeApiServer;
use harness::operator::FEW_MINUTES;
use harness::{repository, trainer_binary};

use crate::chart::{program, read};

/// An operator that ends with the test.
struct Operator {
    address: String,
    process: Child,
}

impl Operator {
    fn start(server: &KubeApiServer, user: &str, namespaces: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let profiles = folder.path().join("profiles.yaml");
        std::fs::write(&profiles, "default: {image: registry.example/trainer:1}\n").expect("writable");
        // Free now; another program that takes it first makes the operator end, and the test say so.
        let address = TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a port").to_string();
        let watched = namespaces.iter().map(|namespace| format!("--watch-namespace={namespace}"));
        let process = Command::new(trainer_binary().with_file_name("finetune-operator"))
            .args(["--leader-election=false", "--listen", &address, "--profiles"])
            .arg(&profiles)
            .args(watched)
            .env("KUBECONFIG", server.kubeconfig_of(user))
            .stderr(Stdio::null())
            .spawn()
            .expect("the operator starts");
        let operator = Self { address, process };
        // It has read its profiles by now.
        wait_for("the operator to answer", MINUTE, || operator.get("/healthz"));
        operator
    }

    /// What it answers, or why it does not answer well.
    fn get(&self, path: &str) -> Result<String, String> {
        let url = format!("http://{}{path}", self.address);
        let output =
            Command::new("curl").args(["-sS", "--noproxy", "*", "--fail-with-body", &url]).output().expect("curl");
        let [said, why] = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        if output.status.success() { Ok(said) } else { Err(said + &why) }
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        self.process.kill().expect("it is a child");
        self.process.wait().expect("it is a child");
    }
}

#[test]
fn a_namespace_that_is_gone_keeps_the_operator_from_no_other() {
    let server = KubeApiServer::start();
    let kubectl = |arguments: &[&str], input: &str| {
        server.ask(&program("kubectl"), arguments, input).unwrap_or_else(|said| panic!("kubectl {arguments:?}: {said}"))
    };
    kubectl(&["apply", "--server-side", "--filename=-"], &read(&repository().join("crds/finetunejobs.yaml")));
    kubectl(&["wait", "--for=condition=Established", "--timeout=1m", "crd/finetunejobs.finetune.dev"], "");
    // A Role is in its namespace, and goes with it.
    let allow = |namespace: &str| {
        kubectl(&["create", "namespace", namespace], "");
        let resources = "--resource=finetunejobs.finetune.dev,jobs.batch,pods";
        kubectl(&["create", "role", "operator", "--verb=list,watch", resources, "--namespace", namespace], "");
        kubectl(
            &["create", "rolebinding", "operator", "--role=operator", "--user=operator", "--namespace", namespace],
            "",
        );
    };
    allow("here");
    let operator = Operator::start(&server, "operator", &["here", "gone"]);
    wait_for("the operator to be ready", MINUTE, || operator.get("/readyz"));
    let refused = |namespace: &str, value: u8| {
        let line = format!("finetune_operator_namespace_refused{{watched_namespace=\"{namespace}\"}} {value}");
        // A watch that fails is begun anew after up to a minute.
        wait_for(line.clone(), FEW_MINUTES, || {
            let metrics = operator.get("/metrics")?;
            if metrics.lines().any(|found| found == line) { Ok(()) } else { Err(metrics) }
        });
    };
    refused("gone", 1);
    refused("here", 0);
    // It comes back, and is served without a restart.
    allow("gone");
    refused("gone", 0);
    wait_for("the operator to be ready again", FEW_MINUTES, || operator.get("/readyz"));

    // One that may look nowhere is not ready, whatever it is told.
    let blind = Operator::start(&server, "nobody", &["here"]);
    wait_for("it to be refused", MINUTE, || {
        let metrics = blind.get("/metrics")?;
        if metrics.contains("namespace_refused{watched_namespace=\"here\"} 1") { Ok(()) } else { Err(metrics) }
    });
    assert!(blind.get("/readyz").is_err());
}
