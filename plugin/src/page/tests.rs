use super::*;
use crate::fixture::{condition, finished, job, now, training};

fn shown(job: &FineTuneJob) -> String {
    page(job, now(), Paint::Plain)
}

#[test]
fn a_job_that_trains() {
    assert_eq!(
        shown(&training()),
        "\
job          support-bot in team-a
             LoRA of hf://HuggingFaceTB/SmolLM2-135M-Instruct, profile a100
phase        Training for 2h5m

progress     [=========                     ] 30 %  step 12/40  epoch 0.6  1h30m left
metrics      loss 1.9134, eval loss 1.881, learning rate 2e-4, 8,123 tokens/s
checkpoints  step 10 (eval 1.881, best)

plan         1.2 GiB of memory predicted, 4,884,480 trained parameters, 2,048 tokens at once
data         150 training rows, 30 validation rows, 123,456 tokens, 32,100 of them trained;
             0 duplicates, 2 leaked, 0 truncated

attempts     stage    attempt  outcome    reason       took
             prepare        1  Done       Completed     45s
             train          1  Preempted  PodDeleted  6m40s
             train          2  running    -           1h56m
             0 failed, 1 preempted; the last went on from step 8

volume       claim support-bot-data
used         6m40s of training in ended attempts, 0.11 GPU hours

next         follow it
               kubectl finetune watch support-bot -n team-a
             see the loss
               kubectl finetune plot support-bot -n team-a
             end it early and keep what was learned
               kubectl finetune stop support-bot -n team-a
"
    );
}

#[test]
fn a_job_that_succeeded() {
    assert_eq!(
        shown(&finished()),
        "\
job          support-bot in team-a
             LoRA of hf://HuggingFaceTB/SmolLM2-135M-Instruct, profile default
phase        Succeeded after 1h

progress     [==============================] 100 %  step 40/40  epoch 2
metrics      loss 0.4123, eval loss 0.3981, 8,123 tokens/s
checkpoints  step 20 (eval 0.6), step 40 (eval 0.3981, best)

validation                     base  few-shot   tuned
             exact match     12.0 %    35.0 %  81.0 %
             loss              1.92      1.31  0.3981
             perplexity        6.82       3.7   1.489
             token accuracy       -         -  90.0 %
forgetting   loss on general text 2.71 before, 2.75 after: passed
gates        loss at most 1.9, found 0.3981: passed
             exact match better than few-shot (0.35) by 0.05, found 0.81: passed
verdict      Better: the tuned model is better than the base model with 4 examples in the
             prompt: exactMatch 0.81 against 0.35

plan         1.2 GiB of memory predicted, 4,884,480 trained parameters, 2,048 tokens at once
data         150 training rows, 30 validation rows, 123,456 tokens, 32,100 of them trained;
             0 duplicates, 0 leaked, 0 truncated

attempts     stage    attempt  outcome  reason       took
             prepare        1  Done     Completed     45s
             train          1  Done     Completed  55m33s
             publish        1  Done     Completed      2m

volume       claim support-bot-data
artifact     Adapter of rank 16 at pvc://support-bot-data/output
             sha256:0123456789abcdef
used         55m33s of training in ended attempts, 0.93 GPU hours, cost 1.944

next         mount the claim support-bot-data at /models in the pod that serves
               volumes:
               - name: tuned
                 persistentVolumeClaim: {claimName: support-bot-data, readOnly: true}
             with vLLM
               vllm serve HuggingFaceTB/SmolLM2-135M-Instruct --enable-lora --max-lora-rank 16 \\
                 --lora-modules support-bot=/models/output
             with PEFT
               AutoPeftModelForCausalLM.from_pretrained(\"/models/output\")
"
    );
}

#[test]
fn a_job_that_a_gate_failed() {
    assert_eq!(
        shown(&refused()),
        "\
job          support-bot in team-a
             Full of hf://HuggingFaceTB/SmolLM2-135M-Instruct, profile default
phase        Failed after 30m
why          ValidationFailed: 1 of 1 gates does not hold: exactMatch 0.2, at least 0.8 was
             asked for

validation                base  few-shot   tuned
             exact match     -         -  20.0 %
             loss            -         -     1.5
gates        exact match at least 0.8, found 0.2: FAILED
verdict      GateFailed

data         1,500 training rows, 30 validation rows, 123,456 tokens, 32,100 of them
             trained; 0 duplicates, 12 leaked, 0 truncated

next         a gate does not hold: more or better rows, more epochs, or a gate that asks for
             less; output.publishWhen: Always publishes in any case; 12 training rows are in
             the validation rows too
             what the trainer said
               kubectl finetune logs support-bot -n team-a
             the training inputs of a job do not change: mend the file, delete this job and
             run it again
               kubectl delete finetunejob support-bot -n team-a
               kubectl finetune run FILE -n team-a
"
    );
}

fn refused() -> FineTuneJob {
    let summary = "1 of 1 gates does not hold: exactMatch 0.2, at least 0.8 was asked for";
    job(
        "{method: {type: Full}, validation: {gates: [{metric: exactMatch, operator: AtLeast, value: '0.8'}]}}",
        &format!(
            "
phase: Failed
completionTime: '2026-11-24T10:30:00Z'
conditions: [{}, {}, {}]
validation:
  best: {{step: 40, scores: {{evalLoss: '1.5', exactMatch: '0.2'}}}}
  gates: [{{metric: exactMatch, operator: AtLeast, value: '0.8', observed: '0.2', passed: false}}]
  verdict: GateFailed
  summary: '{summary}'
data: {{rows: 1500, validationRows: 30, tokens: 123456, trainedTokens: 32100, duplicates: 0, leaked: 12, truncated: 0}}
",
            condition("ValidationPassed", "False", "GateFailed", summary),
            condition("Published", "False", "GateFailed", summary),
            condition("Failed", "True", "ValidationFailed", summary),
        ),
    )
}

/// A job that waits or ended for a reason.
fn stopped(phase: &str, name: &str, status: &str, reason: &str, message: &str) -> FineTuneJob {
    job(
        "{}",
        &format!(
            "{{phase: {phase}, resolved: {{claim: c, image: registry/trainer}}, conditions: [{}]}}",
            condition(name, status, reason, message)
        ),
    )
}

#[test]
fn every_situation_has_something_to_do() {
    for (job, expected) in vec![
        (job("{}", "{}"), "kubectl get pods -A -l app.kubernetes.io/name=finetune-operator"),
        (job("{managedBy: kueue}", "{}"), "the job is left to the controller kueue"),
        (
            stopped("Pending", "Accepted", "False", "ProfileNotFound", "no profile huge"),
            "name one of the administrator's profiles",
        ),
        (
            stopped("Pending", "Accepted", "False", "ResourceLimitExceeded", "spec.resources: 9"),
            "kubectl delete finetunejob support-bot -n team-a\nkubectl finetune run FILE -n team-a",
        ),
        (stopped("Pending", "Accepted", "False", "ChildNameTaken", "ConfigMap x"), "remove what is in the way"),
        (stopped("Queued", "Admitted", "False", "WaitingForQuota", "no quota"), "kubectl get workloads -n team-a"),
        (stopped("Pending", "Running", "False", "Unschedulable", "3 Insufficient cpu"), "no node has room"),
        (
            stopped("Pending", "Running", "False", "ImagePullFailed", "no such image"),
            "registry/trainer is the profile's",
        ),
        (
            stopped("Pending", "Running", "False", "ChildCreationFailed", "quota"),
            "kubectl get resourcequota,limitrange",
        ),
        (
            stopped("Pending", "Running", "Unknown", "Pending", ""),
            "kubectl describe pods -n team-a -l finetune.dev/job-name",
        ),
        (stopped("Training", "Running", "False", "NodeLost", "no word"), "kubectl delete node NODE"),
        (stopped("Pending", "Running", "False", "Unschedulable", "0/2 nodes: 2 node(s) had taints"), "no node fits"),
        (stopped("Failed", "Failed", "True", "OutOfMemory", "killed"), "lower hyperparameters.maxSequenceLength"),
        (stopped("Failed", "Failed", "True", "NoProgress", "three lives"), "lower checkpoint.everySteps"),
        (
            stopped("Failed", "Failed", "True", "BadData", "train.jsonl:7"),
            "kubectl finetune logs support-bot -n team-a",
        ),
        (refused(), "12 training rows are in the validation rows too"),
        (
            job(
                "{suspend: true}",
                "{phase: Suspended, conditions: [{type: Suspended, status: 'True', reason: SuspendedByUser, message: '', lastTransitionTime: '2026-11-24T10:00:00Z'}]}",
            ),
            "kubectl finetune resume support-bot -n team-a",
        ),
        (training(), "kubectl finetune stop support-bot -n team-a"),
    ] {
        let status = job.status.clone().unwrap_or_default();
        let list = next::next(&job, &status);
        let found = list.iter().any(|advice| advice.what.contains(expected) || advice.command.contains(expected));
        assert!(found, "{expected}: {list:?}");
    }
}

/// Every reason that can end a job is explained; the last resort is for those of a later operator.
#[test]
fn every_failure_has_a_remedy() {
    use crds::exit::{Disposition, ExitCode};
    let ends = ExitCode::ALL
        .into_iter()
        .filter(|exit| !matches!(exit.disposition(), Disposition::Done | Disposition::Preempted));
    let limits = [
        "ValidationFailed",
        "BackoffLimitExceeded",
        "PreemptionLimitExceeded",
        "DeadlineExceeded",
        "StartDeadlineExceeded",
        "NoProgress",
        "PlanLost",
    ];
    for reason in ends.map(ExitCode::reason).chain(limits) {
        let job = stopped("Failed", "Failed", "True", reason, "a message");
        let text = shown(&job);
        assert!(!text.contains("the message says what happened"), "{reason}: {text}");
        assert!(text.contains(&format!("{reason}: a message")), "{text}");
    }
}

#[test]
fn a_merged_model_is_loaded_by_its_folder() {
    let mut job = finished();
    let artifact = job.status.as_mut().and_then(|status| status.artifact.as_mut()).expect("an artifact");
    (artifact.kind, artifact.lora_rank) = (crds::run::OutputFormat::Merged, None);
    artifact.uri = "pvc://models".into();
    let text = shown(&job);
    for expected in ["claimName: models,", "vllm serve /models --served-model-name support-bot", "AutoModelForCausalLM"]
    {
        assert!(text.contains(expected), "{expected}: {text}");
    }
}

#[test]
fn a_base_model_on_a_claim_is_mounted_too() {
    let mut job = finished();
    let artifact = job.status.as_mut().and_then(|status| status.artifact.as_mut()).expect("an artifact");
    artifact.base_model = "pvc://models/smol/v2".into();
    let text = shown(&job);
    for expected in
        ["the claim models of the base model at /base", "vllm serve /base/smol/v2 ", "pretrained(\"/base/smol/v2\")"]
    {
        assert!(text.contains(expected), "{expected}: {text}");
    }
}

#[test]
fn pages_fit_and_are_coloured_for_terminals_only() {
    for job in [training(), finished(), refused()] {
        let text = shown(&job);
        let longest = text.lines().map(|line| line.chars().count()).max().unwrap_or(0);
        assert!(longest <= 100, "{longest}: {text}");
        assert!(!text.contains('\x1b'), "{text}");
        let coloured = page(&job, now(), Paint::Colour);
        let plain = without_colours(&coloured);
        assert_eq!(plain, text, "colours change no text");
    }
}

/// A text without its colours.
fn without_colours(text: &str) -> String {
    text.split('\x1b')
        .enumerate()
        .map(|(index, part)| if index == 0 { part } else { part.split_once('m').map_or("", |(_, rest)| rest) })
        .collect()
}

#[test]
fn what_others_wrote_moves_no_cursor() {
    let text = page(&stopped("Failed", "Failed", "True", "BadData", r"a \u001b[2J b"), now(), Paint::Plain);
    assert!(text.contains("BadData: a [2J b") && !text.contains('\x1b'), "{text}");
}
