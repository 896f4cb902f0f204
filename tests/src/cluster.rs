//! The test cluster as tests see it: one Kubernetes for the whole test binary, a namespace for each test.
//!
//! The cluster is a child process, `tests/cluster/cluster hold`, that ends when its standard input closes: a test
//! process that is killed leaves nothing behind. It is reached through kubectl, which runs inside its private network.

mod node;
mod pod_watch;
mod pods;

use std::collections::BTreeMap;
use std::fmt::Display;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use serde_json::Value;

pub use self::node::Node;
pub use self::pod_watch::PodWatch;
pub use self::pods::{build_image, restricted_pod};

/// A deadline for what a loaded machine does in seconds.
pub const MINUTE: Duration = Duration::from_mins(1);

/// The taint of further nodes; its value is the node's name.
pub const TEST_NODE: &str = "test.finetune.dev/node";

/// The exit code of `cluster check` that says that this machine lacks something.
const CANNOT_RUN_HERE: i32 = 3;

/// A running cluster.
#[derive(Debug)]
pub struct Cluster {
    run_dir: PathBuf,
    /// Holds the cluster's life: its standard input closes with this process.
    _holder: Child,
}

impl Cluster {
    /// The one cluster of this test process, started by the first test that asks. `None`, with the reason printed,
    /// where the machine cannot run it; the test then passes over and is counted.
    pub fn shared() -> Option<&'static Self> {
        let shared = Self::started();
        if shared.is_none() {
            crate::skipped("a cluster");
        }
        shared
    }

    /// [`Self::shared`] for whoever says himself what is passed over.
    pub(crate) fn started() -> Option<&'static Self> {
        static SHARED: OnceLock<Option<Cluster>> = OnceLock::new();
        SHARED.get_or_init(Self::start).as_ref()
    }

    fn start() -> Option<Self> {
        let check = run(Command::new(script()).arg("check"));
        if check.status.code() == Some(CANNOT_RUN_HERE) {
            // Not `eprintln!`: the test runner would swallow it, and whoever reads its output must see what was not tested.
            let reason = String::from_utf8_lossy(&check.stderr);
            let note = format!("the tests on a cluster did not run: {}\n", reason.trim().trim_start_matches("error: "));
            std::io::stderr().write_all(note.as_bytes()).expect("standard error is open");
            return None;
        }
        assert!(check.status.success(), "the test cluster could not be built: {}", stderr(&check));
        let run_dir = new_run_dir();
        let mut holder = Command::new(script())
            .arg("hold")
            .arg(&run_dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the cluster's script starts");
        let mut line = String::new();
        let stdout = holder.stdout.take().expect("standard output is piped");
        BufReader::new(stdout).read_line(&mut line).expect("readable");
        assert_eq!(line, "ready\n", "the cluster did not start; its logs are in {}/log", run_dir.display());
        Some(Self { run_dir, _holder: holder })
    }

    /// Where the cluster keeps its logs and the API server's `audit.log`.
    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// `tests/cluster/cluster COMMAND RUN_DIR ARGUMENTS`: its output, or what it wrote as an error.
    pub fn try_command(&self, command: &str, arguments: &[&str]) -> Result<String, String> {
        outcome(run(Command::new(script()).arg(command).arg(&self.run_dir).args(arguments)))
    }

    /// The same, for commands that must succeed.
    pub fn command(&self, command: &str, arguments: &[&str]) -> String {
        self.try_command(command, arguments).unwrap_or_else(|error| panic!("cluster {command} {arguments:?}: {error}"))
    }

    /// Starts a program inside, which runs until the cluster ends; its output goes to `log/NAME.log`.
    pub fn start_inside(&self, name: &str, arguments: &[&str]) -> Child {
        let log = std::fs::File::create(self.run_dir.join("log").join(name).with_extension("log")).expect("a log");
        Command::new(script())
            .arg("enter")
            .arg(&self.run_dir)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log"))
            .stderr(log)
            .spawn()
            .expect("the cluster's script starts")
    }

    /// kubectl's output, or what it wrote as an error.
    pub fn try_kubectl(&self, arguments: &[&str]) -> Result<String, String> {
        self.try_command("enter", &[&["kubectl"], arguments].concat())
    }

    /// The output of a kubectl that must succeed.
    pub fn kubectl(&self, arguments: &[&str]) -> String {
        self.try_kubectl(arguments).unwrap_or_else(|error| panic!("kubectl {arguments:?}: {error}"))
    }

    /// `kubectl get ARGUMENTS` as JSON, or why there is none.
    pub fn get(&self, arguments: &[&str]) -> Result<Value, String> {
        let text = self.try_kubectl(&[&["get", "--output=json"], arguments].concat())?;
        serde_json::from_str(&text).map_err(|error| format!("{arguments:?}: {error} in {text}"))
    }

    /// `kubectl apply` of manifests, as the API server sees them; an error is the server's own sentence.
    pub fn try_apply(&self, namespace: &str, manifests: &str) -> Result<String, String> {
        let mut child = Command::new(script())
            .arg("enter")
            .arg(&self.run_dir)
            .args(["kubectl", "apply", "--server-side", "--validate=strict", "--namespace", namespace, "--filename=-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the cluster's script starts");
        child.stdin.take().expect("standard input is piped").write_all(manifests.as_bytes()).expect("kubectl reads");
        outcome(child.wait_with_output().expect("kubectl ends"))
    }

    /// The same, for manifests that must be accepted.
    pub fn apply(&self, namespace: &str, manifests: &str) {
        self.try_apply(namespace, manifests).unwrap_or_else(|error| panic!("kubectl apply: {error}\n{manifests}"));
    }

    /// A new namespace in which only pods of Pod Security *restricted* run; gone with the guard.
    pub fn namespace(&self, name: &str) -> Namespace<'_> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("{name}-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        self.kubectl(&["create", "namespace", &name]);
        let namespace = Namespace { cluster: self, name };
        self.kubectl(&["label", "namespace", &namespace.name, "pod-security.kubernetes.io/enforce=restricted"]);
        // Pods that are made before it are refused.
        wait_for("the namespace's service account", MINUTE, || namespace.get(&["serviceaccount", "default"]));
        namespace
    }

    /// Puts an OCI archive into the cluster's registry; returns the reference by digest that pods name.
    pub fn push(&self, archive: &Path, name: &str) -> String {
        self.command("push", &[archive.to_str().expect("a UTF-8 path"), name]).trim().to_owned()
    }

    /// An image of the product, `trainer` or `operator`, of the binary beside this test, by digest; made and pushed once.
    pub fn product_image(&self, name: &str) -> String {
        static REFERENCES: Mutex<BTreeMap<String, String>> = Mutex::new(BTreeMap::new());
        let mut references = REFERENCES.lock().expect("no test fails while it makes an image");
        if let Some(reference) = references.get(name) {
            return reference.clone();
        }
        let reference = self.push_product(name, &format!("finetune-{name}:test"));
        references.insert(name.to_owned(), reference.clone());
        reference
    }

    /// Makes an image of the product and pushes it under a name.
    pub fn push_product(&self, product: &str, name: &str) -> String {
        let folder = tempfile::tempdir_in(&self.run_dir).expect("the run directory is writable");
        let (archive, _) = build_image(product, folder.path());
        self.push(&archive, name)
    }

    /// The small image for probes, by digest; pushed once.
    pub fn busybox(&self) -> &'static str {
        static REFERENCE: OnceLock<String> = OnceLock::new();
        REFERENCE.get_or_init(|| {
            let tools = std::fs::read_to_string(self.run_dir.join("tools")).expect("a running cluster names its tools");
            self.push(&Path::new(tools.trim()).join("images/busybox.tar"), "busybox:1")
        })
    }

    /// A further node, for a test that breaks it. Only pods that tolerate its taint come there; off and gone with the guard.
    pub fn node(&self) -> Node<'_> {
        Node::start(self, None)
    }

    /// A further node with a taint that pods of the product are to tolerate.
    pub fn tainted_node(&self, taint: &str) -> Node<'_> {
        Node::start(self, Some(taint))
    }

    /// For guards: a test that failed already must not abort the process with a second panic.
    fn delete(&self, arguments: &[&str]) {
        if let Err(error) = self.try_kubectl(&[&["delete", "--wait=false"], arguments].concat()) {
            assert!(std::thread::panicking(), "{arguments:?} could not be deleted: {error}");
        }
    }

    /// Does something to the first container of a pod on the first node, behind the kubelet's back.
    fn container(&self, namespace: &str, pod: &str, action: &[&str]) {
        let found = self.get(&["--namespace", namespace, "pod", pod]).unwrap_or_else(|error| panic!("{pod}: {error}"));
        let id = found["status"]["containerStatuses"][0]["containerID"].as_str().unwrap_or_default();
        let id = id.strip_prefix("containerd://").unwrap_or_else(|| panic!("pod {pod} has no container: {found}"));
        self.command("enter", &[&["ctr", "--namespace=k8s.io", "task"], action, &[id]].concat());
    }

    /// Kills the first container of a pod on the first node with SIGKILL, as the kernel does when memory runs out.
    pub fn kill_container(&self, namespace: &str, pod: &str) {
        self.container(namespace, pod, &["kill", "--signal=SIGKILL"]);
    }

    /// Stops the processes of a pod's container while `during` runs: it neither works nor ends.
    pub fn freeze(&self, namespace: &str, pod: &str, during: impl FnOnce()) {
        self.container(namespace, pod, &["pause"]);
        during();
        self.container(namespace, pod, &["resume"]);
    }

    /// Follows the pods with a label in a namespace, from now on.
    pub fn watch_pods(&self, namespace: &str, selector: &str) -> PodWatch {
        PodWatch::start(self, namespace, selector)
    }

    /// Names of the objects of a kind that were made in a namespace, in order, by the API server's audit log.
    pub fn created(&self, namespace: &str, resource: &str) -> Vec<String> {
        let text = std::fs::read_to_string(self.run_dir.join("audit.log")).expect("the API server writes it");
        let entries = text.lines().filter(|line| line.contains(namespace)).filter_map(|line| {
            // The last line may be half written.
            serde_json::from_str::<Value>(line).ok()
        });
        let made = entries.filter(|entry| {
            let object = &entry["objectRef"];
            entry["verb"] == "create"
                && entry["responseStatus"]["code"] == 201
                && object["namespace"] == namespace
                && object["resource"] == resource
                && object["subresource"].is_null()
        });
        made.map(|entry| entry["objectRef"]["name"].as_str().unwrap_or_default().to_owned()).collect()
    }

    /// Gives a node `count` of an extended resource, as a device plugin would.
    pub fn set_capacity(&self, node: &str, resource: &str, count: u32) {
        self.command("gpus", &[node, resource, &count.to_string()]);
    }
}

/// A namespace of one test.
#[derive(Debug)]
pub struct Namespace<'a> {
    cluster: &'a Cluster,
    name: String,
}

impl Namespace<'_> {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Applies manifests in it.
    pub fn apply(&self, manifests: &str) {
        self.cluster.apply(&self.name, manifests);
    }

    /// kubectl in it, which must succeed.
    pub fn kubectl(&self, arguments: &[&str]) -> String {
        self.cluster.kubectl(&[&["--namespace", &self.name], arguments].concat())
    }

    /// `kubectl get` in it, as JSON.
    pub fn get(&self, arguments: &[&str]) -> Result<Value, String> {
        self.cluster.get(&[&["--namespace", &self.name], arguments].concat())
    }

    /// See [`Cluster::kill_container`].
    pub fn kill_container(&self, pod: &str) {
        self.cluster.kill_container(&self.name, pod);
    }

    /// See [`Cluster::freeze`].
    pub fn freeze(&self, pod: &str, during: impl FnOnce()) {
        self.cluster.freeze(&self.name, pod, during);
    }

    /// Waits until a pod has ended and returns its log; panics with state and log when it did not succeed.
    pub fn succeeded(&self, pod: &str) -> String {
        let phase = wait_for(format!("pod {pod} to end"), MINUTE, || {
            let found = self.get(&["pod", pod])?;
            match found["status"]["phase"].as_str() {
                Some(phase @ ("Succeeded" | "Failed")) => Ok(phase.to_owned()),
                _ => Err(found["status"].to_string()),
            }
        });
        let log = self.kubectl(&["logs", pod]);
        assert_eq!(phase, "Succeeded", "pod {pod} wrote: {log}");
        log
    }
}

impl Drop for Namespace<'_> {
    fn drop(&mut self) {
        self.cluster.delete(&["namespace", &self.name]);
    }
}

/// Polls until `condition` gives a value; at the deadline it panics with what `condition` said last.
pub fn wait_for<T>(what: impl Display, deadline: Duration, mut condition: impl FnMut() -> Result<T, String>) -> T {
    let started = Instant::now();
    loop {
        let asked = Instant::now();
        match condition() {
            Ok(value) => return value,
            Err(seen) if started.elapsed() > deadline => {
                panic!("waited {} s for {what}; last seen: {seen}", deadline.as_secs())
            }
            // Most of the machine is for those who are waited for.
            Err(_) => {
                std::thread::sleep((2 * asked.elapsed()).clamp(Duration::from_millis(100), Duration::from_millis(500)));
            }
        }
    }
}

fn script() -> PathBuf {
    crate::repository().join("tests/cluster/cluster")
}

/// A folder for this process. Those of processes that have ended, and whose cluster has too, are removed.
fn new_run_dir() -> PathBuf {
    let folder = cache().join("run");
    std::fs::create_dir_all(&folder).expect("the cache is writable");
    for entry in std::fs::read_dir(&folder).expect("readable") {
        let path = entry.expect("readable").path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let Some(process) = name.strip_prefix("tests-") else { continue };
        let ended = !Path::new("/proc").join(process).exists() && !path.join("cgroups").exists();
        if ended {
            std::fs::remove_dir_all(&path).expect("logs of an ended cluster can be removed");
        }
    }
    folder.join(format!("tests-{}", std::process::id()))
}

/// The cache folder, as the Makefile and the scripts find it.
fn cache() -> PathBuf {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    variable("FINETUNE_CACHE").unwrap_or_else(|| {
        let caches = variable("XDG_CACHE_HOME")
            .unwrap_or_else(|| variable("HOME").expect("HOME or FINETUNE_CACHE is set").join(".cache"));
        caches.join("finetune-operator")
    })
}

fn run(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn outcome(output: Output) -> Result<String, String> {
    let errors = stderr(&output);
    let text = String::from_utf8(output.stdout).map_err(|error| format!("{error}; {errors}"))?;
    if output.status.success() { Ok(text) } else { Err(format!("{}: {errors}", output.status)) }
}
