//! What a person can do about the state that a job is in: one sentence and one command each. Pure.

mod waiting;

use crds::condition::{self, ConditionStatus, reason};
use crds::exit::ExitCode;
use crds::finetunejob::{ArtifactStatus, Phase};
use crds::run::OutputFormat;
use crds::status::found;
use crds::{FineTuneJob, FineTuneJobStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::ResourceExt;

/// Where serving pods are told to mount the claim.
const MOUNT: &str = "/models";
/// And of a base model that lies on a claim.
const BASE_MOUNT: &str = "/base";
/// Ranks that vLLM makes room for.
const VLLM_RANKS: [i64; 7] = [8, 16, 32, 64, 128, 256, 512];

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advice {
    /// A sentence.
    pub what: String,
    /// Lines to copy; may be empty.
    pub command: String,
}

fn advice(what: impl Into<String>, command: impl Into<String>) -> Advice {
    Advice { what: what.into(), command: command.into() }
}

/// What to do next.
pub fn next(job: &FineTuneJob, status: &FineTuneJobStatus) -> Vec<Advice> {
    let (name, namespace) = (job.name_any(), job.namespace().unwrap_or_default());
    let place = format!("-n {namespace}");
    let again = || {
        advice(
            "the training inputs of a job do not change: mend the file, delete this job and run it again",
            format!("kubectl delete finetunejob {name} {place}\nkubectl finetune run FILE {place}"),
        )
    };
    let logs = || advice("what the trainer said", format!("kubectl finetune logs {name} {place}"));
    if let Some(failed) = found(status, condition::FAILED, ConditionStatus::True) {
        let mut list = vec![advice(remedy(job, status, failed), ""), again()];
        list.insert(1, logs());
        return list;
    }
    if status.phase == Some(Phase::Succeeded) {
        return succeeded(&name, status);
    }
    if let Some(manager) = &job.spec.managed_by {
        return vec![advice(format!("the job is left to the controller {manager}"), "")];
    }
    if job.status.is_none() || status.conditions.is_empty() {
        return vec![advice(
            "no operator has looked at the job yet; see whether one runs and watches this namespace",
            "kubectl get pods -A -l app.kubernetes.io/name=finetune-operator",
        )];
    }
    if let Some(refused) = found(status, condition::ACCEPTED, ConditionStatus::False) {
        return not_accepted(refused, &again());
    }
    if job.spec.suspend {
        return vec![advice("the job is held; let it go on", format!("kubectl finetune resume {name} {place}"))];
    }
    if let Some(queued) = found(status, condition::ADMITTED, ConditionStatus::False) {
        let what = match queued.reason.as_str() {
            reason::QUEUE_CONTROLLER_MISSING => {
                "nobody serves queues here: install Kueue, or run the job without queueName"
            }
            _ => "the queue decides when the job may start; see what is before it",
        };
        return vec![advice(what, format!("kubectl get workloads {place}"))];
    }
    let pods = format!("kubectl describe pods {place} -l finetune.dev/job-name={name}");
    let waits = found(status, condition::RUNNING, ConditionStatus::False);
    if let Some(list) = waits.and_then(|waits| waiting::waiting(job, status, waits)) {
        return list;
    }
    match status.phase {
        Some(Phase::Pending) => vec![advice("see what the pod waits for", pods)],
        _ => vec![
            advice("follow it", format!("kubectl finetune watch {name} {place}")),
            advice("see the loss", format!("kubectl finetune plot {name} {place}")),
            advice("end it early and keep what was learned", format!("kubectl finetune stop {name} {place}")),
        ],
    }
}

fn not_accepted(found: &Condition, again: &Advice) -> Vec<Advice> {
    let first = match found.reason.as_str() {
        reason::PROFILE_NOT_FOUND => advice("name one of the administrator's profiles, or leave spec.profile out", ""),
        // The message says what to delete.
        reason::CHILD_NAME_TAKEN => {
            return vec![advice("remove what is in the way; the job then goes on by itself", "")];
        }
        reason::RESOURCE_LIMIT_EXCEEDED => advice("ask for less in spec.resources, or for another profile", ""),
        reason::SOURCE_NOT_ALLOWED => advice("move the files to a place that the profile allows", ""),
        _ => advice("change the field that the message names", ""),
    };
    vec![first, again.clone()]
}

/// What would have made the job succeed.
fn remedy(job: &FineTuneJob, status: &FineTuneJobStatus, failed: &Condition) -> String {
    let exit = ExitCode::ALL.into_iter().find(|exit| exit.reason() == failed.reason);
    let text = match (exit, failed.reason.as_str()) {
        (Some(ExitCode::BadConfiguration), _) => "change the field that the message names",
        (Some(ExitCode::BadData), _) => {
            "mend the row that the message names; finetune-trainer checks the same file on a laptop"
        }
        (Some(ExitCode::InputNotFound), _) => "check uri and revision: the source has nothing under this name",
        (Some(ExitCode::SourceUnavailable), _) => "the source did not answer; try again when it does",
        (Some(ExitCode::OutOfMemory), _) => {
            "lower hyperparameters.maxSequenceLength, give spec.resources more memory, or use LoRA instead of Full"
        }
        (Some(ExitCode::CannotWrite), _) => "give the volume more room: checkpoint.storage.size, or another claim",
        (Some(ExitCode::AccessDenied), _) => {
            "the source refused: check its secretRef and the licence of the repository"
        }
        (Some(ExitCode::ForeignCheckpoint), _) => {
            "the volume holds the checkpoints of another job: name another checkpoint.storage.claim or path"
        }
        (Some(ExitCode::NonFinite), _) => {
            "the loss ran away: lower hyperparameters.learningRate, or lengthen warmupRatio"
        }
        (Some(ExitCode::Stalled), _) => "no step was completed in time: look at the node and its accelerator",
        (Some(ExitCode::InternalError), _) => "this is a bug in the trainer: report it with its log",
        (_, reason::VALIDATION_FAILED) => {
            "a gate does not hold: more or better rows, more epochs, or a gate that asks for less; \
             output.publishWhen: Always publishes in any case"
        }
        (_, reason::BACKOFF_LIMIT_EXCEEDED) => "the same happened in every attempt: remove its cause",
        (_, reason::PREEMPTION_LIMIT_EXCEEDED) => {
            "the pod was taken away too often: a higher priority class, calmer nodes, or a larger failurePolicy.maxPreemptions"
        }
        (_, reason::NO_PROGRESS) => {
            "attempts end before a checkpoint is written: lower checkpoint.everySteps or everySeconds"
        }
        (_, reason::PLAN_LOST) => {
            "somebody deleted or changed the ConfigMap of the job's plan: delete the job and run it again; its volume is kept"
        }
        (_, reason::DEADLINE_EXCEEDED) => "raise activeDeadlineSeconds, or train for fewer steps",
        (_, reason::START_DEADLINE_EXCEEDED) => {
            "no accelerator was free in time: raise startDeadlineSeconds, or ask for less"
        }
        _ => "the message says what happened",
    };
    // Rows that were learned by heart, or leaked, explain many a verdict.
    let leaked = status.data.as_ref().map_or(0, |data| data.leaked);
    let gates = job.spec.validation.is_some() && failed.reason == reason::VALIDATION_FAILED && leaked > 0;
    if gates { format!("{text}; {leaked} training rows are in the validation rows too") } else { text.to_owned() }
}

fn succeeded(name: &str, status: &FineTuneJobStatus) -> Vec<Advice> {
    let mut list = Vec::new();
    match status.validation.as_ref().and_then(|validation| validation.verdict.as_deref()) {
        Some("NotWorthIt") => {
            list.push(advice("fine-tuning did not pay here: prefer the base model, as the verdict says", ""));
        }
        Some("GateFailed") => list.push(advice("a gate does not hold: do not serve this result", "")),
        _ => {}
    }
    let Some(artifact) = &status.artifact else {
        list.push(advice("nothing was written: see the attempts above", ""));
        return list;
    };
    let Some((claim, path)) =
        artifact.uri.strip_prefix("pvc://").map(|rest| rest.split_once('/').unwrap_or((rest, "")))
    else {
        list.push(advice(format!("the result is at {}", artifact.uri), ""));
        return list;
    };
    let folder = format!("{MOUNT}/{path}").trim_end_matches('/').to_owned();
    list.push(advice(
        format!("mount the claim {claim} at {MOUNT} in the pod that serves"),
        format!("volumes:\n- name: tuned\n  persistentVolumeClaim: {{claimName: {claim}, readOnly: true}}"),
    ));
    list.extend(load(name, artifact, &folder));
    list
}

fn load(name: &str, artifact: &ArtifactStatus, folder: &str) -> [Advice; 2] {
    match artifact.kind {
        OutputFormat::Adapter => {
            let base = artifact.base_model.strip_prefix("hf://").unwrap_or(&artifact.base_model);
            // A claim is no place that a server knows: it is mounted too.
            let on_claim = base.strip_prefix("pvc://").map(|rest| rest.split_once('/').unwrap_or((rest, "")));
            let base = on_claim.map_or_else(|| base.to_owned(), |(_, path)| format!("{BASE_MOUNT}/{path}"));
            let first = on_claim.map_or_else(String::new, |(claim, _)| {
                format!("# with the claim {claim} of the base model at {BASE_MOUNT}\n")
            });
            let peft = if on_claim.is_some() {
                format!("PeftModel.from_pretrained(\n  AutoModelForCausalLM.from_pretrained(\"{base}\"), \"{folder}\")")
            } else {
                format!("AutoPeftModelForCausalLM.from_pretrained(\"{folder}\")")
            };
            let rank = artifact.lora_rank.unwrap_or(16);
            let room = VLLM_RANKS.into_iter().find(|room| *room >= rank).unwrap_or(rank);
            [
                advice(
                    "with vLLM",
                    format!(
                        "{first}vllm serve {base} --enable-lora --max-lora-rank {room} \\\n  --lora-modules {name}={folder}"
                    ),
                ),
                advice("with PEFT", peft),
            ]
        }
        OutputFormat::Merged => [
            advice("with vLLM", format!("vllm serve {folder} --served-model-name {name}")),
            advice("with Transformers", format!("AutoModelForCausalLM.from_pretrained(\"{folder}\")")),
        ],
    }
}
