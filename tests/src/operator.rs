//! The operator in the test cluster, installed once by its chart, and jobs that it reconciles.

use std::path::{Path, PathBuf};
use std::sync::{OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use serde_json::Value;

use crate::Job;
use crate::cluster::{Cluster, Namespace, PodWatch, TEST_NODE, wait_for};

/// Where the operator runs.
pub const SYSTEM: &str = "finetune-system";
/// What three pods one after another may take on a loaded machine.
pub const FEW_MINUTES: Duration = Duration::from_mins(5);
/// The resource that stands for accelerators in tests.
pub const GPU: &str = "nvidia.com/gpu";

/// A label of nodes; its value is the namespace of the test whose jobs go there.
pub const PLACE: &str = "test.finetune.dev/place";

/// Profiles of the tests. The trainer's image is CPU only: pods that hold a counted GPU train on the CPU.
fn profiles() -> String {
    format!(
        r#"
  default:
    # One CPU, as the number of threads is part of what a run is; asked for in part, so that pods of several tests fit a node.
    resources: {{limits: {{cpu: "1", memory: 2Gi}}, requests: {{cpu: 100m}}}}
    storage: {{size: 64Mi}}
    maxResources: {{memory: 4Gi}}
    allowed: {{sourcePrefixes: ["pvc://"], tolerationKeys: [{TEST_NODE}, node.kubernetes.io/unreachable], nodeSelectorKeys: [{PLACE}]}}
  gpu:
    resources: {{limits: {{{GPU}: "1", cpu: "1"}}, requests: {{cpu: 100m}}}}
    maxResources: {{{GPU}: "2"}}
    storage: {{size: 64Mi}}
    fallBackToCpu: true
    allowed: {{namespaces: ["*"]}}
  # As the chart's own profile for GPUs: a toleration and a size, no node and no class.
  zonal:
    resources: {{limits: {{{GPU}: 1, cpu: "1"}}, requests: {{cpu: 100m}}}}
    tolerations: [{{key: {GPU}, operator: Exists, effect: NoSchedule}}]
    storage: {{size: 64Mi}}
    fallBackToCpu: true
    allowed: {{namespaces: ["*"]}}
  # For a cluster in which every node keeps pods away.
  tainted:
    resources: {{limits: {{{GPU}: 1, cpu: "1"}}, requests: {{cpu: 100m}}}}
    tolerations: [{{key: {GPU}, operator: Exists, effect: NoSchedule}}]
    cpuPods: {{tolerations: [{{key: {GPU}, operator: Exists}}, {{key: team, operator: Equal, value: ml}}]}}
    storage: {{size: 64Mi}}
    fallBackToCpu: true
    allowed: {{namespaces: ["*"]}}
  mig:
    resources: {{limits: {{nvidia.com/mig-1g.10gb: "1", cpu: "1"}}, requests: {{cpu: 100m}}}}
    storage: {{size: 64Mi}}
    fallBackToCpu: true
    allowed: {{namespaces: ["*"]}}
  unpullable:
    image: 10.99.0.1:5000/nobody@sha256:{none}
    allowed: {{namespaces: ["*"]}}
  late:
    image: 10.99.0.1:5000/late-trainer:1
    storage: {{size: 64Mi}}
    allowed: {{namespaces: ["*"]}}
"#,
        none = "0".repeat(64)
    )
}

/// Read by tests that count on the operator, written by those that break it.
static OPERATOR: RwLock<()> = RwLock::new(());

/// The operator, as `helm install` left it.
#[derive(Debug)]
pub struct Operator {
    /// Where it runs.
    pub cluster: &'static Cluster,
}

impl Operator {
    /// The one operator of this test process; `None` where no cluster can run, and the test is counted as passed over.
    pub fn shared() -> Option<&'static Self> {
        static SHARED: OnceLock<Option<Operator>> = OnceLock::new();
        let shared = SHARED.get_or_init(|| Cluster::started().map(Self::install)).as_ref();
        if shared.is_none() {
            crate::skipped("a cluster");
        }
        shared
    }

    fn install(cluster: &'static Cluster) -> Self {
        let operator = Self { cluster };
        cluster.kubectl(&["create", "namespace", SYSTEM]);
        cluster.kubectl(&["label", "namespace", SYSTEM, "pod-security.kubernetes.io/enforce=restricted"]);
        operator.helm("install", &[]);
        operator
    }

    /// `helm install` or `helm upgrade` of the chart, waited for.
    pub fn helm(&self, verb: &str, more: &[&str]) {
        self.try_helm(verb, more).unwrap_or_else(|error| panic!("helm {verb} {more:?}: {error}"));
    }

    fn try_helm(&self, verb: &str, more: &[&str]) -> Result<String, String> {
        let values = self.values_file();
        let chart = crate::repository().join("charts/finetune-operator");
        let mut arguments =
            vec!["helm", verb, "finetune", path(&chart), "--namespace", SYSTEM, "--values", path(&values)];
        arguments.extend(["--wait", "--timeout", "3m"]);
        arguments.extend(more);
        self.cluster.try_command("enter", &arguments)
    }

    fn values_file(&self) -> PathBuf {
        let image = |name: &str| {
            let reference = self.cluster.product_image(name);
            let (repository, digest) = reference.split_once('@').expect("a reference by digest");
            let (registry, repository) = repository.split_once('/').expect("a registry");
            format!("{{registry: \"{registry}\", repository: {repository}, digest: \"{digest}\"}}")
        };
        let text = format!(
            "image: {}\ntrainer: {{image: {}}}\npollIntervalSeconds: 1\nlog: {{level: debug, format: text}}\n\
             extraArgs: [--progress-interval-seconds=1, --retry-backoff-seconds=1]\nprofiles:{}",
            image("operator"),
            image("trainer"),
            profiles()
        );
        let file = self.cluster.run_dir().join("values.yaml");
        std::fs::write(&file, text).expect("the run directory is writable");
        file
    }

    /// For tests that take the one operator away or change its profiles: no other test has a workspace meanwhile.
    pub fn disturb(&self) -> Disturbed<'_> {
        Disturbed { operator: self, _alone: OPERATOR.write().unwrap_or_else(PoisonError::into_inner) }
    }

    /// Names of the operator's pods that run, the leader's included.
    pub fn pods(&self) -> Vec<String> {
        let selector = "--selector=app.kubernetes.io/name=finetune-operator";
        let found = self.cluster.get(&["pods", "--namespace", SYSTEM, selector]).expect("pods are listed");
        let items = found["items"].as_array().cloned().unwrap_or_default();
        items.iter().filter_map(|pod| pod["metadata"]["name"].as_str()).map(str::to_owned).collect()
    }

    /// A namespace with a tiny model and rows on the claim `inputs`. The operator is not disturbed while it is there, so a
    /// test has one at most.
    pub fn workspace(&self, name: &str) -> Workspace {
        let undisturbed = OPERATOR.read().unwrap_or_else(PoisonError::into_inner);
        self.make_workspace(name, Some(undisturbed))
    }

    fn make_workspace(&self, name: &str, undisturbed: Option<RwLockReadGuard<'static, ()>>) -> Workspace {
        let namespace = self.cluster.namespace(name);
        let inputs = Job::new();
        let folder = inputs.folder().to_path_buf();
        readable_by_all(&folder);
        let space = Workspace { namespace, inputs, _undisturbed: undisturbed };
        space.claim("inputs", &folder);
        space
    }
}

/// Whoever has it may break the operator; it is installed again with the guard's end.
#[derive(Debug)]
pub struct Disturbed<'a> {
    operator: &'a Operator,
    _alone: RwLockWriteGuard<'static, ()>,
}

impl Disturbed<'_> {
    /// See [`Operator::workspace`].
    pub fn workspace(&self, name: &str) -> Workspace {
        self.operator.make_workspace(name, None)
    }
}

impl Drop for Disturbed<'_> {
    fn drop(&mut self) {
        let mended = self.operator.try_helm("upgrade", &["--install"]);
        assert!(mended.is_ok() || std::thread::panicking(), "the operator could not be mended: {mended:?}");
    }
}

fn path(path: &Path) -> &str {
    path.to_str().expect("a UTF-8 path")
}

/// Pods run as nobody.
fn readable_by_all(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    let mode = if path.is_dir() { 0o777 } else { 0o644 };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("ours");
    if path.is_dir() {
        for entry in std::fs::read_dir(path).expect("readable") {
            readable_by_all(&entry.expect("readable").path());
        }
    }
}

/// A namespace of one test, with inputs, in which jobs run.
#[derive(Debug)]
pub struct Workspace {
    /// Its namespace.
    pub namespace: Namespace<'static>,
    /// Model and rows: the folder behind the claim `inputs`.
    pub inputs: Job,
    _undisturbed: Option<RwLockReadGuard<'static, ()>>,
}

impl Workspace {
    /// The YAML of a job like [`Job::new`]'s, from the claim; `rest` comes below `spec`.
    pub fn yaml(name: &str, rest: &str) -> String {
        let mut text = format!(
            "apiVersion: finetune.dev/v1alpha1\nkind: FineTuneJob\nmetadata: {{name: {name}}}\nspec:\n  \
             model: {{uri: pvc://inputs/model}}\n  \
             dataset: {{train: {{uri: pvc://inputs/train.jsonl}}, validation: {{uri: pvc://inputs/test.jsonl}}}}\n"
        );
        for (field, default) in [
            ("method:", "  method: {type: LoRA, lora: {rank: 4}}\n"),
            ("validation:", "  validation: {everySteps: 20, baselines: {zeroShot: false, fewShot: {examples: 0}}}\n"),
            ("checkpoint:", "  checkpoint: {everySteps: 4}\n"),
            (
                "hyperparameters:",
                "  hyperparameters: {maxSteps: 60, batchSize: 8, learningRate: \"1e-2\", precision: FP32}\n",
            ),
        ] {
            if !rest.lines().any(|line| line.trim_start().starts_with(field)) {
                text += default;
            }
        }
        for line in rest.lines().filter(|line| !line.is_empty()) {
            text += &format!("  {line}\n");
        }
        text
    }

    /// A claim on a folder that pods on every node reach.
    fn claim(&self, name: &str, folder: &Path) {
        let volume = format!(
            r#"apiVersion: v1
kind: PersistentVolume
metadata: {{name: {name}-{ns}}}
spec:
  capacity: {{storage: 1Gi}}
  accessModes: [ReadWriteMany]
  storageClassName: ""
  claimRef: {{namespace: {ns}, name: {name}}}
  hostPath: {{path: {path}}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {{name: {name}}}
spec: {{accessModes: [ReadWriteMany], storageClassName: "", volumeName: {name}-{ns}, resources: {{requests: {{storage: 1Gi}}}}}}
"#,
            ns = self.namespace.name(),
            path = folder.display()
        );
        self.namespace.apply(&volume);
    }

    /// The claim `run`, for the run itself; returns the folder behind it.
    pub fn run_claim(&self) -> PathBuf {
        let folder = self.inputs.path("run");
        std::fs::create_dir(&folder).expect("writable");
        readable_by_all(&folder);
        self.claim("run", &folder);
        folder
    }

    /// Follows the pods of a job.
    pub fn watch(&self, name: &str) -> PodWatch {
        let selector = format!("finetune.dev/job-name={name}");
        Operator::shared().expect("it has a workspace").cluster.watch_pods(self.namespace.name(), &selector)
    }

    /// Waits until the Job of a stage's first attempt was made.
    pub fn reaches(&self, name: &str, stage: &str) {
        let wanted = format!("{name}-{stage}-1");
        wait_for(format!("the Job {wanted}"), FEW_MINUTES, || {
            let jobs = self.jobs(name);
            if jobs.contains(&wanted) { Ok(()) } else { Err(format!("{jobs:?}")) }
        });
    }

    /// Applies such a job.
    pub fn job(&self, name: &str, rest: &str) {
        self.namespace.apply(&Self::yaml(name, rest));
    }

    /// The job as the API server has it.
    pub fn get(&self, name: &str) -> Result<Value, String> {
        self.namespace.get(&["finetunejobs.finetune.dev", name])
    }

    /// Its status now.
    pub fn status(&self, name: &str) -> Value {
        self.get(name).unwrap_or_else(|error| panic!("{name}: {error}"))["status"].clone()
    }

    /// Waits until the status is as asked; returns it.
    pub fn until(&self, name: &str, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
        wait_for(format!("{name}: {what}"), FEW_MINUTES, || {
            let status = self.get(name)?["status"].clone();
            if holds(&status) { Ok(status) } else { Err(status.to_string()) }
        })
    }

    /// Waits until a condition has a reason; returns the status.
    pub fn until_reason(&self, name: &str, reason: &str) -> Value {
        self.until(name, reason, |status| {
            status["conditions"].as_array().is_some_and(|all| all.iter().any(|one| one["reason"] == reason))
        })
    }

    /// Waits until a job is not there any more.
    pub fn forgotten(&self, name: &str) {
        wait_for(format!("{name} to be forgotten"), FEW_MINUTES, || match self.get(name) {
            Err(error) if error.contains("NotFound") => Ok(()),
            Err(error) => Err(error),
            Ok(job) => Err(job["status"].to_string()),
        });
    }

    /// Waits until a job has ended, and returns its status.
    pub fn ended(&self, name: &str) -> Value {
        self.until(name, "to end", |status| matches!(status["phase"].as_str(), Some("Succeeded" | "Failed")))
    }

    /// Waits until a job has succeeded, and returns its status.
    pub fn succeeded(&self, name: &str) -> Value {
        let status = self.ended(name);
        assert_eq!(status["phase"], "Succeeded", "{status:#}");
        status
    }

    /// Waits until the training pod has completed a step; returns the pod's name.
    pub fn trains(&self, name: &str) -> String {
        self.until(name, "to train", |status| status["progress"]["step"].as_i64().is_some_and(|step| step > 0));
        self.live_pods(name).pop().unwrap_or_else(|| panic!("{name} has no pod: {:#}", self.status(name)))
    }

    /// Waits until training attempt `number` has completed a step of its own; returns its pod's name.
    pub fn trains_again(&self, name: &str, number: i64) -> String {
        self.until(name, "the attempt to train", |status| {
            // Progress of the attempt before it stays until this one tells its own.
            let newest = status["jobRefs"].as_array().and_then(|all| all.last());
            let runs = newest.is_some_and(|one| one["attempt"] == number && !one["startTime"].is_null());
            let resumed = status["attempts"]["resumedFromStep"].as_i64();
            let step = status["progress"]["step"].as_i64();
            runs && condition(status, "Running")["status"] == "True"
                && resumed.zip(step).is_some_and(|(resumed, step)| resumed > 0 && step > resumed)
        });
        self.live_pods(name).pop().unwrap_or_else(|| panic!("{name} has no pod: {:#}", self.status(name)))
    }

    /// Names of the pods of a job that have not ended.
    pub fn live_pods(&self, name: &str) -> Vec<String> {
        let selector = format!("--selector=finetune.dev/job-name={name}");
        let found = self.namespace.get(&["pods", &selector]).expect("pods are listed");
        let items = found["items"].as_array().cloned().unwrap_or_default();
        let live = items.iter().filter(|pod| !matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed")));
        live.filter_map(|pod| pod["metadata"]["name"].as_str()).map(str::to_owned).collect()
    }

    /// Name of the ConfigMap with the configuration of a job.
    pub fn config_map(&self, name: &str) -> String {
        let job = self.get(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        format!("{name}-{}-run", &job["metadata"]["uid"].as_str().expect("a UID")[..8])
    }

    /// Names of the Jobs of a job, sorted.
    pub fn jobs(&self, name: &str) -> Vec<String> {
        let selector = format!("--selector=finetune.dev/job-name={name}");
        let found = self.namespace.get(&["jobs", &selector]).expect("Jobs are listed");
        let items = found["items"].as_array().cloned().unwrap_or_default();
        let mut names: Vec<String> =
            items.iter().filter_map(|job| job["metadata"]["name"].as_str()).map(str::to_owned).collect();
        names.sort();
        names
    }

    /// A merge patch of the spec.
    pub fn patch(&self, name: &str, spec: &str) {
        let patch = format!("{{\"spec\": {spec}}}");
        self.namespace.kubectl(&["patch", "finetunejob", name, "--type=merge", "--patch", &patch]);
    }
}

/// The condition of a status.
pub fn condition<'a>(status: &'a Value, name: &str) -> &'a Value {
    let conditions = status["conditions"].as_array().unwrap_or_else(|| panic!("no conditions: {status:#}"));
    conditions.iter().find(|one| one["type"] == name).unwrap_or_else(|| panic!("no condition {name}: {status:#}"))
}

/// Training attempts, and attempts that were preempted and that failed, of a status.
pub fn attempts(status: &Value) -> (Option<i64>, Option<i64>, Option<i64>) {
    let count = |name: &str| status["attempts"][name].as_i64();
    (count("total"), count("preempted"), count("failed"))
}
