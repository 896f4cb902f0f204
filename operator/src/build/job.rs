//! The batch/v1 Jobs: one an attempt, made once. Pods pass Pod Security *restricted* and carry no API token.

use crds::FineTuneJob;
use crds::finetunejob::JobReference;
use crds::profile::{CERTIFICATES, CaBundle, Topology};
use crds::resolve::VolumeClaim;
use crds::run::PodStage;
use k8s_openapi::api::batch::v1::{
    Job, JobSpec, PodFailurePolicy, PodFailurePolicyOnExitCodesRequirement, PodFailurePolicyOnPodConditionsPattern,
    PodFailurePolicyRule,
};
use k8s_openapi::api::core::v1::{
    Capabilities, ConfigMapProjection, Container, ContainerPort, EmptyDirVolumeSource, EnvVar, EnvVarSource, KeyToPath,
    ObjectFieldSelector, PersistentVolumeClaimVolumeSource, PodSecurityContext, PodSpec, PodTemplateSpec,
    ProjectedVolumeSource, SeccompProfile, SecurityContext, Volume, VolumeMount, VolumeProjection,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::config_map::CONTROL_FILE;
use super::placement::{Placement, place};
use super::{
    ATTEMPT_LABEL, CONTAINER, RUN_FILE, STAGE_LABEL, config_map_name, control_name, metadata, report_job_name,
};
use crate::validate::Plan;

/// Where a trainer serves `/status` and `/metrics`.
pub const TRAINER_PORT: i32 = 9464;
/// Kueue holds a Job that has it.
pub const QUEUE_LABEL: &str = "kueue.x-k8s.io/queue-name";
/// Kueue's order among queued Jobs.
pub const WORKLOAD_PRIORITY_LABEL: &str = "kueue.x-k8s.io/priority-class";
/// Of pods: the level of the topology that they must share.
pub const REQUIRED_TOPOLOGY_ANNOTATION: &str = "kueue.x-k8s.io/podset-required-topology";
/// Of pods: the level of the topology that they share if they can.
pub const PREFERRED_TOPOLOGY_ANNOTATION: &str = "kueue.x-k8s.io/podset-preferred-topology";
const CONFIG_FOLDER: &str = "/etc/finetune";
const CERTIFICATES_FOLDER: &str = "/etc/finetune-certificates";
const CERTIFICATES_FILE: &str = "ca.crt";
const RUN_VOLUME: &str = "/data";
const TERMINATION_MESSAGE: &str = "/dev/termination-log";
/// Nobody: a user that owns nothing in the image.
const USER: i64 = 65532;
/// Seconds that reading a report from a volume may take, the volume's mounting included.
const REPORT_DEADLINE_SECONDS: i64 = 300;

/// The Job of one attempt; `placement` is heeded by the first of them.
pub fn build_stage_job(job: &FineTuneJob, plan: &Plan, attempt: &JobReference, placement: &Placement) -> Job {
    let train = attempt.stage == PodStage::Train;
    let mut args: Vec<String> = trainer_args(attempt.stage, attempt.attempt);
    args.extend(["--control".into(), format!("{CONFIG_FOLDER}/{CONTROL_FILE}")]);
    args.extend(["--listen".into(), format!("0.0.0.0:{TRAINER_PORT}")]);
    let mut pod = pod_spec(job, plan, attempt.stage, args);
    if train {
        pod.runtime_class_name.clone_from(&plan.pods.runtime_class_name);
        pod.containers[0].resources = Some(plan.pods.resources.clone());
    }
    place(&mut pod, &plan.pods, attempt.stage, placement);
    let queue = plan.pods.queue(attempt.stage);
    let mut built = assemble(job, plan, attempt, attempt.stage, pod);
    built.metadata.name = Some(attempt.name.clone());
    let spec = built.spec.get_or_insert_default();
    spec.backoff_limit = Some(0);
    spec.pod_failure_policy = Some(failure_policy(queue.is_some()));
    if let Some(queue) = queue {
        hand_to_kueue(&mut built, plan, queue);
        if let (true, Some(topology)) = (train, &plan.pods.topology) {
            let (annotation, level) = match topology {
                Topology::Required(level) => (REQUIRED_TOPOLOGY_ANNOTATION, level),
                Topology::Preferred(level) => (PREFERRED_TOPOLOGY_ANNOTATION, level),
            };
            let template = built.spec.get_or_insert_default().template.metadata.get_or_insert_default();
            template.annotations.get_or_insert_default().insert(annotation.into(), level.clone());
        }
    }
    built
}

/// Kueue opens it; without Kueue it stays closed, and the status says so.
fn hand_to_kueue(built: &mut Job, plan: &Plan, queue: &str) {
    built.spec.get_or_insert_default().suspend = Some(true);
    let labels = built.metadata.labels.get_or_insert_default();
    labels.insert(QUEUE_LABEL.into(), queue.to_owned());
    if let Some(class) = &plan.pods.workload_priority_class_name {
        labels.insert(WORKLOAD_PRIORITY_LABEL.into(), class.clone());
    }
}

/// The Job that hands on what an attempt left on the volume.
pub fn build_report_job(job: &FineTuneJob, plan: &Plan, of: &JobReference) -> Job {
    let mut args = trainer_args(PodStage::Report, of.attempt);
    args.extend(["--of".into(), of.stage.name().into()]);
    let mut pod = pod_spec(job, plan, PodStage::Report, args);
    // Of the pod, which counts from when it has a node.
    pod.active_deadline_seconds = Some(REPORT_DEADLINE_SECONDS);
    place(&mut pod, &plan.pods, PodStage::Report, &Placement::default());
    for mount in pod.containers[0].volume_mounts.iter_mut().flatten() {
        mount.read_only = (mount.mount_path == RUN_VOLUME || mount.mount_path == CONFIG_FOLDER).then_some(true);
    }
    let mut built = assemble(job, plan, of, PodStage::Report, pod);
    built.metadata.name = Some(report_job_name(job, of));
    let spec = built.spec.get_or_insert_default();
    spec.backoff_limit = Some(2);
    if let Some(queue) = plan.pods.queue(PodStage::Report) {
        hand_to_kueue(&mut built, plan, queue);
    }
    built
}

fn trainer_args(stage: PodStage, attempt: i32) -> Vec<String> {
    let config = format!("{CONFIG_FOLDER}/{RUN_FILE}");
    let attempt = attempt.to_string();
    ["run", "--config", &config, "--stage", stage.name(), "--attempt", &attempt]
        .into_iter()
        .chain(["--termination-message", TERMINATION_MESSAGE])
        .map(str::to_owned)
        .collect()
}

/// Only for the cause in the Job's condition, which can be read when the pod is gone. Codes are not distinguished here: the
/// operator decides.
///
/// A Job that a queue opens and closes fails by no exit code: the Job controller matches these rules also on a pod that dies
/// because its Job was suspended, and the eviction would end the Job.
fn failure_policy(queued: bool) -> PodFailurePolicy {
    let disrupted = PodFailurePolicyRule {
        action: "FailJob".into(),
        on_pod_conditions: Some(vec![PodFailurePolicyOnPodConditionsPattern {
            type_: "DisruptionTarget".into(),
            status: Some("True".into()),
        }]),
        ..PodFailurePolicyRule::default()
    };
    let failed = PodFailurePolicyRule {
        action: "FailJob".into(),
        on_exit_codes: Some(PodFailurePolicyOnExitCodesRequirement {
            container_name: Some(CONTAINER.into()),
            operator: "NotIn".into(),
            values: vec![0],
        }),
        ..PodFailurePolicyRule::default()
    };
    PodFailurePolicy { rules: if queued { vec![disrupted] } else { vec![disrupted, failed] } }
}

fn assemble(job: &FineTuneJob, plan: &Plan, attempt: &JobReference, component: PodStage, pod: PodSpec) -> Job {
    let additions = plan.pods.additions(component);
    // In this order: what is ours wins.
    let mut labels = additions.labels.clone();
    labels.extend(super::labels(job));
    labels.insert(STAGE_LABEL.into(), component.name().into());
    labels.insert(ATTEMPT_LABEL.into(), attempt.attempt.to_string());
    let mut annotations = additions.annotations.clone();
    let of_job = Some(annotations.clone()).filter(|annotations| !annotations.is_empty());
    annotations.insert("kubectl.kubernetes.io/default-container".to_owned(), CONTAINER.to_owned());
    Job {
        metadata: ObjectMeta { labels: Some(labels.clone()), annotations: of_job, ..metadata(job, String::new()) },
        spec: Some(JobSpec {
            pod_replacement_policy: Some("Failed".into()),
            template: PodTemplateSpec {
                metadata: Some(ObjectMeta {
                    labels: Some(labels),
                    annotations: Some(annotations),
                    ..ObjectMeta::default()
                }),
                spec: Some(pod),
            },
            ..JobSpec::default()
        }),
        status: None,
    }
}

fn pod_spec(job: &FineTuneJob, plan: &Plan, stage: PodStage, args: Vec<String>) -> PodSpec {
    let storage = plan.run.storage.as_ref();
    let output = destination(plan);
    let mut volumes = vec![
        config_volume(job),
        claim_volume("data", plan.claim.name(), false),
        scratch("tmp", None, "1Gi"),
        scratch("shm", Some("Memory"), "1Gi"),
    ];
    let mut mounts = vec![
        mount("config", CONFIG_FOLDER, true),
        mount("data", RUN_VOLUME, false),
        mount("tmp", "/tmp", false),
        mount("shm", "/dev/shm", false),
    ];
    // The other stages reach nothing.
    let reaches_out = matches!(stage, PodStage::Prepare | PodStage::Publish);
    let certificates = plan.pods.ca_bundle.as_ref().filter(|_| reaches_out);
    if let Some(bundle) = certificates {
        volumes.push(certificates_volume(bundle));
        mounts.push(mount("certificates", CERTIFICATES_FOLDER, true));
    }
    let others = storage.map(|storage| &storage.claims).into_iter().flatten();
    let others = others.filter(|(name, _)| *name != plan.claim.name() && stage != PodStage::Report);
    for (index, (name, folder)) in others.enumerate() {
        let written = stage == PodStage::Publish && output == Some(name.as_str());
        let volume = format!("source-{index}");
        volumes.push(claim_volume(&volume, name, !written));
        mounts.push(mount(&volume, folder, !written));
    }
    PodSpec {
        restart_policy: Some("Never".into()),
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        termination_grace_period_seconds: Some(plan.pods.termination_grace_period_seconds),
        image_pull_secrets: Some(plan.pods.image_pull_secrets.clone()).filter(|secrets| !secrets.is_empty()),
        priority_class_name: plan.pods.priority_class(stage).cloned(),
        security_context: Some(security_context(plan, stage)),
        containers: vec![Container {
            name: CONTAINER.into(),
            image: Some(plan.pods.image.clone()),
            image_pull_policy: plan.pods.image_pull_policy.clone(),
            args: Some(args),
            env: Some(environment(plan, stage, certificates)),
            ports: Some(vec![ContainerPort {
                name: Some("http".into()),
                container_port: TRAINER_PORT,
                ..ContainerPort::default()
            }]),
            resources: Some(plan.pods.cpu_resources.clone()),
            termination_message_path: Some(TERMINATION_MESSAGE.into()),
            termination_message_policy: Some("FallbackToLogsOnError".into()),
            security_context: Some(SecurityContext {
                allow_privilege_escalation: Some(false),
                read_only_root_filesystem: Some(true),
                capabilities: Some(Capabilities { drop: Some(vec!["ALL".into()]), add: None }),
                ..SecurityContext::default()
            }),
            volume_mounts: Some(mounts),
            ..Container::default()
        }],
        volumes: Some(volumes),
        ..PodSpec::default()
    }
}

/// The group of volumes is given to every file of every claim that the pod may write. Claims that a job only names hold other
/// people's files: one of them in a pod, and no file of the pod's volumes changes hands, but where the profile lets it. Our own
/// claim was given to the group by the first pod.
fn security_context(plan: &Plan, stage: PodStage) -> PodSecurityContext {
    let user = (!plan.pods.cluster_assigns_user).then_some(USER);
    let run = matches!(plan.claim, VolumeClaim::Existing { .. }).then(|| plan.claim.name());
    let foreign = run
        .into_iter()
        .chain(destination(plan).filter(|name| stage == PodStage::Publish && *name != plan.claim.name()));
    let takes_over = foreign.into_iter().all(|name| plan.pods.fs_group_claims.iter().any(|listed| listed == name));
    PodSecurityContext {
        run_as_non_root: Some(true),
        run_as_user: user,
        run_as_group: user,
        fs_group: user.filter(|_| takes_over),
        fs_group_change_policy: takes_over.then(|| "OnRootMismatch".into()),
        seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".into(), localhost_profile: None }),
        ..PodSecurityContext::default()
    }
}

fn run_directory(plan: &Plan) -> &str {
    plan.run.storage.as_ref().map_or(RUN_VOLUME, |storage| storage.directory.as_str())
}

/// The claim that the result is copied to.
fn destination(plan: &Plan) -> Option<&str> {
    plan.run.output.uri.as_deref().and_then(crds::resolve::claim_of).map(|(name, _)| name)
}

/// In this order: what is ours wins.
fn environment(plan: &Plan, stage: PodStage, certificates: Option<&CaBundle>) -> Vec<EnvVar> {
    let own = own_environment(plan, certificates);
    let mut variables = plan.pods.additions(stage).environment.clone();
    variables.retain(|variable| own.iter().all(|own| own.name != variable.name));
    variables.extend(own);
    variables
}

fn own_environment(plan: &Plan, certificates: Option<&CaBundle>) -> Vec<EnvVar> {
    let value = |name: &str, value: &str| EnvVar { name: name.into(), value: Some(value.into()), value_from: None };
    let mut variables = vec![
        EnvVar {
            name: "POD_UID".into(),
            value: None,
            value_from: Some(EnvVarSource {
                field_ref: Some(ObjectFieldSelector { api_version: None, field_path: "metadata.uid".into() }),
                ..EnvVarSource::default()
            }),
        },
        // Downloads are kept for the next attempt, and shared with nobody: on a claim of several runs each has its own.
        value("HF_HOME", &format!("{}/.huggingface", run_directory(plan))),
        // Pods share the cores of a node. OpenMP's threads wait for each other by spinning, 300,000 turns by default, which
        // takes the core from the thread that is waited for; a thousand turns are its own choice where it knows of more
        // threads than cores.
        value("GOMP_SPINCOUNT", "1000"),
    ];
    if let Some(endpoint) = &plan.pods.hub_endpoint {
        variables.push(value("HF_ENDPOINT", endpoint));
    }
    if certificates.is_some() {
        variables.push(value(CERTIFICATES, &format!("{CERTIFICATES_FOLDER}/{CERTIFICATES_FILE}")));
    }
    variables
}

fn certificates_volume(bundle: &CaBundle) -> Volume {
    let file = KeyToPath { key: bundle.key.clone(), path: CERTIFICATES_FILE.into(), mode: None };
    let source = VolumeProjection {
        config_map: Some(ConfigMapProjection {
            name: bundle.config_map_name.clone(),
            optional: None,
            items: Some(vec![file]),
        }),
        ..VolumeProjection::default()
    };
    Volume {
        name: "certificates".into(),
        projected: Some(ProjectedVolumeSource { sources: Some(vec![source]), default_mode: None }),
        ..Volume::default()
    }
}

fn config_volume(job: &FineTuneJob) -> Volume {
    let source = |name: String, optional: Option<bool>, items: &str| VolumeProjection {
        config_map: Some(ConfigMapProjection {
            name,
            optional,
            items: Some(vec![KeyToPath { key: items.into(), path: items.into(), mode: None }]),
        }),
        ..VolumeProjection::default()
    };
    Volume {
        name: "config".into(),
        projected: Some(ProjectedVolumeSource {
            sources: Some(vec![
                source(config_map_name(job), None, RUN_FILE),
                source(control_name(job), Some(true), CONTROL_FILE),
            ]),
            default_mode: None,
        }),
        ..Volume::default()
    }
}

fn claim_volume(volume: &str, claim: &str, read_only: bool) -> Volume {
    Volume {
        name: volume.into(),
        persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
            claim_name: claim.into(),
            read_only: read_only.then_some(true),
        }),
        ..Volume::default()
    }
}

fn scratch(volume: &str, medium: Option<&str>, size: &str) -> Volume {
    Volume {
        name: volume.into(),
        empty_dir: Some(EmptyDirVolumeSource {
            medium: medium.map(str::to_owned),
            size_limit: Some(Quantity(size.into())),
        }),
        ..Volume::default()
    }
}

fn mount(volume: &str, path: &str, read_only: bool) -> VolumeMount {
    VolumeMount {
        name: volume.into(),
        mount_path: path.into(),
        read_only: read_only.then_some(true),
        ..VolumeMount::default()
    }
}
