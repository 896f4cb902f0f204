//! What a person can do about a pod that does not run. What ends by itself is said to, and nothing else is.

use crds::condition::reason;
use crds::exit::ExitCode;
use crds::{FineTuneJob, FineTuneJobStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::ResourceExt;

use super::{Advice, advice};

/// What the kubelet's words about a pod begin with, where the API server has taken it.
const KUBELETS: [&str; 4] = ["Create", "RunContainer", "FailedCreatePodSandBox", "StartError"];

/// What to do where the condition Running is False for a reason that somebody can do something about.
pub fn waiting(job: &FineTuneJob, status: &FineTuneJobStatus, found: &Condition) -> Option<Vec<Advice>> {
    let (name, place) = (job.name_any(), format!("-n {}", job.namespace().unwrap_or_default()));
    let pods = format!("kubectl describe pods {place} -l finetune.dev/job-name={name}");
    let source_unavailable = ExitCode::SourceUnavailable.reason();
    Some(match found.reason.as_str() {
        reason::UNSCHEDULABLE => unschedulable(job, status, &found.message, &place),
        reason::IMAGE_PULL_FAILED => {
            let image = status.resolved.as_ref().and_then(|resolved| resolved.image.as_deref()).unwrap_or("the image");
            vec![advice(
                format!(
                    "{image} is the profile's: its administrator mends name, registry or imagePullSecrets; the pod then starts by itself"
                ),
                pods,
            )]
        }
        reason::CHILD_CREATION_FAILED if found.message.contains("webhook") => vec![advice(
            "an admission webhook stands in the way: whoever runs it mends it; it is tried again by itself",
            "kubectl get validatingwebhookconfigurations,mutatingwebhookconfigurations",
        )],
        reason::CHILD_CREATION_FAILED if KUBELETS.iter().any(|word| found.message.starts_with(word)) => {
            vec![advice(
                "the node cannot start the pod; the kubelet tries again by itself, and tells more in its events",
                pods,
            )]
        }
        reason::CHILD_CREATION_FAILED => vec![advice(
            "the pod is refused; see which quota or policy stands in the way. It is tried again by itself",
            format!("kubectl get resourcequota,limitrange {place}"),
        )],
        // The message says what to delete.
        reason::CHILD_NAME_TAKEN => vec![advice("remove what is in the way; the job then goes on by itself", "")],
        reason::NODE_LOST => node_lost(&found.message),
        reason::MOUNT_FAILED => mount_failed(status, &found.message, &place, pods),
        reason::INIT_CONTAINER_FAILED => vec![advice(
            "the container that the message names was put into the pod by somebody else, an injecting webhook for example, and the \
             trainer begins after it: whoever puts it there mends it. What it said",
            format!("kubectl logs {place} -l finetune.dev/job-name={name} --all-containers --prefix --tail=20"),
        )],
        why if why == source_unavailable => vec![
            advice(
                "nothing is to be done here: it is asked again by itself, and no accelerator is held meanwhile. What it answered",
                format!("kubectl finetune logs {name} {place}"),
            ),
            advice("or hold the job until it is back", format!("kubectl finetune suspend {name} {place}")),
        ],
        _ => return None,
    })
}

/// By what the scheduler says of its nodes. A taint, a label or a volume is no matter of time, as room is.
fn unschedulable(job: &FineTuneJob, status: &FineTuneJobStatus, said: &str, place: &str) -> Vec<Advice> {
    let said = said.to_lowercase();
    if said.contains("volume") && said.contains("node affinity") {
        return volume_out_of_reach(job, status, place);
    }
    if said.contains("persistentvolumeclaim") {
        return vec![advice(
            "the pod waits for a volume; its claim says what that waits for",
            format!("kubectl describe pvc {place}"),
        )];
    }
    let nodes = |columns: &str| format!("kubectl get nodes -o custom-columns='NODE:.metadata.name,{columns}'");
    if said.contains("insufficient") {
        return vec![
            advice(
                "no node has room; the pod starts by itself when one has. What the nodes offer",
                nodes("GPU:.status.allocatable.nvidia\\.com/gpu"),
            ),
            advice("or ask for less in spec.resources, which needs a new job", ""),
        ];
    }
    vec![
        advice(
            "no node fits, full or not; the pod starts by itself only if one that does is added, as a pool does that is scaled \
             from zero. What the nodes ask for",
            nodes("TAINTS:.spec.taints[*].key,LABELS:.metadata.labels"),
        ),
        advice(
            "or have nodeSelector and tolerations, of the profile or in spec.scheduling, fit a node; that needs a new job",
            "",
        ),
    ]
}

/// A volume of one node or zone, bound where the training pod cannot run.
fn volume_out_of_reach(job: &FineTuneJob, status: &FineTuneJobStatus, place: &str) -> Vec<Advice> {
    let name = job.name_any();
    let own = job.spec.checkpoint.as_ref().and_then(|checkpoint| checkpoint.storage.as_ref()?.claim.as_deref());
    let made = status.resolved.as_ref().and_then(|resolved| resolved.claim.as_deref()).filter(|_| own.is_none());
    let claim = own.or(made).unwrap_or("CLAIM");
    let delete = format!("kubectl delete finetunejob {name} {place}");
    let remove = match made {
        Some(made) => format!("{delete}\nkubectl delete pvc {made} {place}"),
        None => delete,
    };
    vec![
        advice(
            "the volume can be mounted on some nodes only, and none of them takes the pod. Where it can be mounted",
            format!(
                "kubectl get pv $(kubectl get pvc {claim} {place} -o jsonpath='{{.spec.volumeName}}') \\\n  \
                 -o jsonpath='{{.spec.nodeAffinity}}{{\"\\n\"}}'"
            ),
        ),
        advice(
            "if those nodes have the accelerator, the pod starts when one is free; if they have not, it never does",
            "",
        ),
        advice(
            if made.is_some() {
                "then delete job and claim (what the claim holds is lost)"
            } else {
                "then delete the job, which keeps its claim"
            },
            remove,
        ),
        advice(
            "and run it again with a claim that every node mounts in checkpoint.storage.claim, or with a profile whose nodeSelector, \
             tolerations and cpuPods keep all its pods where the accelerators are",
            "",
        ),
    ]
}

/// Nobody but a person can know that a machine is off.
fn node_lost(said: &str) -> Vec<Advice> {
    let node = said.split_once("kubectl taint nodes ").and_then(|(_, rest)| rest.split_once(" node.kubernetes.io/"));
    let node = node.map(|(node, _)| node).filter(|node| !node.is_empty() && !node.contains(' ')).unwrap_or("NODE");
    let taint = "node.kubernetes.io/out-of-service";
    vec![
        advice(
            format!(
                "make sure that the machine {node} is off: as long as it may run, its pod may write. Then an administrator of the \
                 cluster says so, and the job goes on by itself from its newest checkpoint"
            ),
            format!("kubectl taint nodes {node} {taint}=nodeshutdown:NoExecute"),
        ),
        advice("or, if the machine does not come back", format!("kubectl delete node {node}")),
        advice("when it is back and was tainted", format!("kubectl taint nodes {node} {taint}-")),
    ]
}

fn mount_failed(status: &FineTuneJobStatus, said: &str, place: &str, pods: String) -> Vec<Advice> {
    if said.contains("Multi-Attach") {
        let claim = status.resolved.as_ref().and_then(|resolved| resolved.claim.as_deref());
        let used =
            claim.map_or_else(|| "kubectl describe pvc".to_owned(), |claim| format!("kubectl describe pvc {claim}"));
        return vec![
            advice(
                "a pod on another node still holds the volume, which one node mounts at a time; this pod starts by itself when that \
                 one is gone. Who uses it",
                format!("{used} {place}"),
            ),
            advice("and what is attached where", "kubectl get volumeattachments"),
        ];
    }
    vec![
        advice(
            "the kubelet tries again by itself; what it waits for is in its sentence: a claim, a Secret or a ConfigMap that is not \
             there, or a storage driver",
            pods,
        ),
        advice("what there is", format!("kubectl get pvc,secrets,configmaps {place}")),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{condition, job};

    /// Sentences and commands for a job of spec `spec` that waits.
    fn told(spec: &str, reason: &str, message: &str) -> String {
        let waits = condition("Running", "False", reason, message);
        let job = job(spec, &format!("{{phase: Pending, resolved: {{claim: bot-0b8e}}, conditions: [{waits}]}}"));
        let status = job.status.clone().unwrap_or_default();
        let list = waiting(&job, &status, &status.conditions[0]).unwrap_or_default();
        list.iter().map(|advice| format!("{}\n{}\n", advice.what, advice.command)).collect()
    }

    /// What room would not help is not said to end by itself: the scheduler's words for a volume differ between versions.
    #[test]
    fn only_room_comes_by_itself() {
        let room = told("{}", "Unschedulable", "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.");
        assert!(room.contains("the pod starts by itself when one has"), "{room}");
        for sentence in [
            "0/2 nodes are available: 1 Insufficient nvidia.com/gpu, 1 node(s) didn't match PersistentVolume's node affinity.",
            "0/2 nodes are available: 1 Insufficient nvidia.com/gpu, 1 node(s) had volume node affinity conflict.",
        ] {
            let text = told("{}", "Unschedulable", sentence);
            assert!(!text.contains("by itself"), "{text}");
            for expected in [
                "kubectl get pvc bot-0b8e -n team-a -o jsonpath='{.spec.volumeName}'",
                "if they have not, it never does",
                "kubectl delete finetunejob support-bot -n team-a\nkubectl delete pvc bot-0b8e -n team-a",
                "a claim that every node mounts in checkpoint.storage.claim",
                "cpuPods",
            ] {
                assert!(text.contains(expected), "{expected}: {text}");
            }
            let own = told("{checkpoint: {storage: {claim: shared}}}", "Unschedulable", sentence);
            assert!(own.contains("get pvc shared") && !own.contains("delete pvc"), "a user's claim is kept: {own}");
        }
        let taints = "0/2 nodes are available: 2 node(s) had untolerated taint(s). no new claims to deallocate";
        let text = told("{}", "Unschedulable", taints);
        assert!(text.contains("no node fits, full or not") && text.contains("TAINTS:"), "{text}");
        let text =
            told("{}", "Unschedulable", "0/2 nodes are available: pod has unbound immediate PersistentVolumeClaims.");
        assert!(text.contains("kubectl describe pvc -n team-a"), "{text}");
    }

    #[test]
    fn a_lost_node_is_named_in_what_an_administrator_types() {
        let message = "the pod bot-train-1-x was to be gone and node2.example does not confirm it: it may still write. When the \
                       machine is off for certain: kubectl taint nodes node2.example \
                       node.kubernetes.io/out-of-service=nodeshutdown:NoExecute, or kubectl delete node node2.example";
        let text = told("{}", "NodeLost", message);
        for expected in [
            "make sure that the machine node2.example is off",
            "kubectl taint nodes node2.example node.kubernetes.io/out-of-service=nodeshutdown:NoExecute\n",
            "kubectl delete node node2.example\n",
            "kubectl taint nodes node2.example node.kubernetes.io/out-of-service-\n",
        ] {
            assert!(text.contains(expected), "{expected}: {text}");
        }
        for unnamed in ["its node does not answer", "kubectl taint nodes its node node.kubernetes.io/out-of-service"] {
            assert!(told("{}", "NodeLost", unnamed).contains("kubectl delete node NODE\n"), "{unnamed}");
        }
    }

    #[test]
    fn who_stands_in_the_way_is_told_by_the_sentence() {
        for (reason, message, expected) in [
            (
                "ChildCreationFailed",
                "Internal error occurred: failed calling webhook: connection refused",
                "kubectl get validatingwebhookconfigurations,mutatingwebhookconfigurations",
            ),
            ("ChildCreationFailed", "pods is forbidden: exceeded quota: gpus", "kubectl get resourcequota,limitrange"),
            ("ChildCreationFailed", "CreateContainerConfigError: no such key", "kubectl describe pods -n team-a"),
            ("MountFailed", "FailedMount: secret ca not found", "kubectl get pvc,secrets,configmaps -n team-a"),
            (
                "MountFailed",
                "FailedAttachVolume: Multi-Attach error for volume pvc-1",
                "kubectl describe pvc bot-0b8e -n team-a",
            ),
            (
                "InitContainerFailed",
                "container istio-init: CrashLoopBackOff",
                "kubectl logs -n team-a -l finetune.dev/job-name=support-bot --all-containers",
            ),
            ("SourceUnavailable", "a source is down", "kubectl finetune suspend support-bot -n team-a"),
            ("ChildNameTaken", "the pod x; kubectl delete pod x", "remove what is in the way"),
        ] {
            let text = told("{}", reason, message);
            assert!(text.contains(expected), "{reason}: {text}");
        }
        assert_eq!(told("{}", "Preempted", "waiting for the next attempt"), "", "nobody has to do anything");
    }
}
