//! Jobs as the operator leaves them, for tests.

use crds::FineTuneJob;
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::client::Body;
use serde_json::Value;

/// When the tests look.
pub fn now() -> Timestamp {
    "2026-11-24T12:05:00Z".parse().expect("a time")
}

/// A client of an API server that answers with a code and a text.
pub fn client(answer: impl Fn(&http::Request<Body>) -> (u16, String) + Send + Sync + 'static) -> Client {
    let answer = std::sync::Arc::new(answer);
    let service = tower::service_fn(move |request: http::Request<Body>| {
        let (code, text) = answer(&request);
        let response = http::Response::builder().status(code).body(Body::from(text.into_bytes()));
        std::future::ready(response)
    });
    Client::new(service, "team-a")
}

fn yaml(text: &str) -> Value {
    serde_saphyr::from_str(text).unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// A job of which some things are as given, in YAML.
pub fn job(spec: &str, status: &str) -> FineTuneJob {
    let mut value = yaml(
        "apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata: {name: support-bot, namespace: team-a, uid: u-1, generation: 1, creationTimestamp: '2026-11-24T10:00:00Z'}
spec:
  model: {uri: hf://HuggingFaceTB/SmolLM2-135M-Instruct}
  dataset: {train: {uri: hf://datasets/acme/support/train.jsonl}}
  method: {type: LoRA}
",
    );
    for (name, given) in yaml(spec).as_object().expect("a map") {
        value["spec"][name] = given.clone();
    }
    value["status"] = yaml(status);
    serde_json::from_value(value).unwrap_or_else(|error| panic!("{status}: {error}"))
}

/// A condition, in YAML.
pub fn condition(name: &str, status: &str, reason: &str, message: &str) -> String {
    format!(
        "{{type: {name}, status: '{status}', reason: {reason}, message: \"{message}\", lastTransitionTime: '2026-11-24T10:00:00Z'}}"
    )
}

/// A job in the middle of its second training attempt.
pub fn training() -> FineTuneJob {
    let conditions = [
        condition("Accepted", "True", "Resolved", ""),
        condition("Admitted", "True", "NoQueue", ""),
        condition("Running", "True", "PodRunning", ""),
        condition("Published", "Unknown", "NotRequested", "the output stays on the volume of the run"),
    ];
    job(
        "{profile: a100}",
        &format!(
            "
phase: Training
stage: train
startTime: '2026-11-24T10:01:00Z'
conditions: [{}]
progress: {{step: 12, totalSteps: 40, summary: 12/40, percent: 30, epoch: '0.6', trainedTokens: 96000, tokensPerSecond: 8123, estimatedRemainingSeconds: 5400, eta: 1h30m, lastReportTime: '2026-11-24T12:04:50Z'}}
metrics: [{{name: trainLoss, value: '1.91343'}}, {{name: evalLoss, value: '1.881'}}, {{name: learningRate, value: '0.0002'}}]
checkpoints: [{{step: 10, time: '2026-11-24T12:00:00Z', evalLoss: '1.881', best: true}}]
data: {{rows: 150, validationRows: 30, tokens: 123456, trainedTokens: 32100, duplicates: 0, leaked: 2, truncated: 0}}
plan: {{memoryBytes: 1288490189, microBatchTokens: 2048, trainableParameters: 4884480}}
resolved: {{claim: support-bot-data, image: registry/trainer@sha256:aa}}
attempts: {{total: 2, failed: 0, preempted: 1, resumedFromStep: 8, checkpointStep: 10}}
usage: {{trainSeconds: 400, gpuSeconds: 400}}
jobRefs:
- {{name: support-bot-prepare-1, stage: prepare, attempt: 1, startTime: '2026-11-24T10:01:00Z', completionTime: '2026-11-24T10:01:45Z', outcome: Done, reason: Completed}}
- {{name: support-bot-train-1, stage: train, attempt: 1, startTime: '2026-11-24T10:02:00Z', completionTime: '2026-11-24T10:08:40Z', outcome: Preempted, reason: PodDeleted}}
- {{name: support-bot-train-2, stage: train, attempt: 2, startTime: '2026-11-24T10:09:00Z'}}
",
            conditions.join(", ")
        ),
    )
}

/// A job whose result is better than each baseline.
pub fn finished() -> FineTuneJob {
    let summary =
        "the tuned model is better than the base model with 4 examples in the prompt: exactMatch 0.81 against 0.35";
    let conditions = [
        condition("Accepted", "True", "Resolved", ""),
        condition("Running", "False", "Completed", ""),
        condition("ValidationPassed", "True", "GatesPassed", summary),
        condition("Complete", "True", "Completed", summary),
        condition("Failed", "False", "Completed", ""),
    ];
    job(
        "{}",
        &format!(
            "
phase: Succeeded
startTime: '2026-11-24T10:01:00Z'
completionTime: '2026-11-24T11:00:00Z'
conditions: [{}]
progress: {{step: 40, totalSteps: 40, summary: 40/40, percent: 100, epoch: '2', trainedTokens: 320000, tokensPerSecond: 8123}}
metrics: [{{name: trainLoss, value: '0.4123'}}, {{name: evalLoss, value: '0.3981'}}, {{name: exactMatch, value: '0.81'}}]
checkpoints: [{{step: 20, evalLoss: '0.6', best: false}}, {{step: 40, evalLoss: '0.3981', best: true}}]
validation:
  zeroShot: {{evalLoss: '1.92', perplexity: '6.82', exactMatch: '0.12'}}
  fewShot: {{evalLoss: '1.31', perplexity: '3.7', exactMatch: '0.35'}}
  best: {{step: 40, scores: {{evalLoss: '0.3981', perplexity: '1.489', tokenAccuracy: '0.9', exactMatch: '0.81'}}}}
  forgetting: {{baseLoss: '2.71', tunedLoss: '2.75', passed: true}}
  gates:
  - {{metric: evalLoss, operator: AtMost, value: '1.9', observed: '0.3981', passed: true}}
  - {{metric: exactMatch, operator: ImprovesOn, value: '0.35', baseline: FewShot, by: '0.05', observed: '0.81', passed: true}}
  verdict: Better
  summary: '{summary}'
data: {{rows: 150, validationRows: 30, tokens: 123456, trainedTokens: 32100, duplicates: 0, leaked: 0, truncated: 0}}
plan: {{memoryBytes: 1288490189, microBatchTokens: 2048, trainableParameters: 4884480}}
resolved: {{claim: support-bot-data}}
attempts: {{total: 1, failed: 0, preempted: 0}}
artifact: {{uri: 'pvc://support-bot-data/output', digest: 'sha256:0123456789abcdef', kind: Adapter, loraRank: 16, baseModel: 'hf://HuggingFaceTB/SmolLM2-135M-Instruct'}}
usage: {{trainSeconds: 3333, gpuSeconds: 3333, cost: '1.944'}}
jobRefs:
- {{name: support-bot-prepare-1, stage: prepare, attempt: 1, startTime: '2026-11-24T10:01:00Z', completionTime: '2026-11-24T10:01:45Z', outcome: Done, reason: Completed}}
- {{name: support-bot-train-1, stage: train, attempt: 1, startTime: '2026-11-24T10:02:00Z', completionTime: '2026-11-24T10:57:33Z', outcome: Done, reason: Completed}}
- {{name: support-bot-publish-1, stage: publish, attempt: 1, startTime: '2026-11-24T10:58:00Z', completionTime: '2026-11-24T11:00:00Z', outcome: Done, reason: Completed}}
",
            conditions.join(", ")
        ),
    )
}
