//! Every field of the resource: a change that sets it, and what becomes of it.

use serde_json::{Value, json};

use super::Fate::{self, Honoured, Refused, Warned};
use super::merge;

/// Path of the field, change of the spec, fate.
pub(super) fn table() -> Vec<(&'static str, Value, Fate)> {
    let secret = json!({"name": "s"});
    let forgetting = |more: Value| {
        let mut patch = json!({"validation": {"forgetting": {"dataset": {"uri": "file://general.jsonl"}}}});
        merge(&mut patch["validation"]["forgetting"], &more);
        patch
    };
    let rows = |more: Value| {
        let mut patch = json!({"dataset": {"splitPercent": null, "validation": {"uri": "file://test.jsonl"}}});
        merge(&mut patch["dataset"]["validation"], &more);
        patch
    };
    let parameter = |name: &str, value: Value| {
        let mut patch = json!({"hyperparameters": {}});
        patch["hyperparameters"][name] = value;
        patch
    };
    let lora = |name: &str, value: Value| {
        let mut patch = json!({"method": {"lora": {}}});
        patch["method"]["lora"][name] = value;
        patch
    };
    let limit = |name: &str, value: Value| {
        let mut patch = json!({"resources": {"limits": {}}});
        patch["resources"]["limits"][name] = value;
        patch
    };
    let at_most = json!({"validation": {"gates": [{"metric": "perplexity", "operator": "AtMost", "value": "1.5"}]}});
    let improves = json!({"validation": {"gates": [
        {"metric": "exactMatch", "operator": "ImprovesOn", "baseline": "FewShot", "by": "0.25"}
    ]}});
    let toleration = json!({"scheduling": {"tolerations": [
        {"key": "k", "operator": "Equal", "value": "v", "effect": "NoExecute", "tolerationSeconds": 5}
    ]}});
    let storage =
        json!({"checkpoint": {"storage": {"size": "5Gi", "storageClassName": "fast", "whenDeleted": "Delete"}}});
    let quantized = json!({"method": {"type": "QLoRA", "quantization": {"type": "NF4", "doubleQuantization": false}}});
    vec![
        ("profile", json!({"profile": "a100"}), Honoured("/resources/pricePerHour", json!(2.5))),
        ("profile", json!({"profile": "h100"}), Refused("spec.profile")),
        ("model.uri", json!({"model": {"uri": "hf://other/model"}}), Honoured("/model/uri", json!("hf://other/model"))),
        ("model.uri", json!({"model": {"uri": "s3://bucket/model"}}), Refused("spec.model.uri")),
        (
            "model.uri",
            json!({"model": {"uri": "pvc://models/tiny"}}),
            Honoured("/model/uri", json!("file:///here/volumes/models/tiny")),
        ),
        ("model.uri", json!({"model": {"uri": "pvc://others/tiny"}}), Refused("spec.model.uri")),
        ("model.revision", json!({"model": {"revision": "v2"}}), Honoured("/model/revision", json!("v2"))),
        ("model.revision", json!({"model": {"uri": "file://model", "revision": "v2"}}), Refused("spec.model.revision")),
        ("model.secretRef.name", json!({"model": {"secretRef": secret}}), Refused("spec.model.secretRef")),
        (
            "dataset.train.uri",
            json!({"dataset": {"train": {"uri": "file://other.jsonl"}}}),
            Honoured("/dataset/train/uri", json!("file:///here/other.jsonl")),
        ),
        (
            "dataset.train.uri",
            json!({"dataset": {"train": {"uri": "https://host/rows"}}}),
            Refused("spec.dataset.train.uri"),
        ),
        (
            "dataset.train.format",
            json!({"dataset": {"train": {"format": "Text"}}}),
            Honoured("/dataset/train/format", json!("Text")),
        ),
        (
            "dataset.train.format",
            json!({"dataset": {"train": {"format": "Alpaca"}}}),
            Refused("spec.dataset.train.format"),
        ),
        (
            "dataset.train.secretRef.name",
            json!({"dataset": {"train": {"secretRef": secret}}}),
            Refused("spec.dataset.train.secretRef"),
        ),
        (
            "dataset.train.columnMap{}",
            json!({"dataset": {"train": {"columnMap": {"prompt": "question"}}}}),
            Refused("spec.dataset.train.columnMap"),
        ),
        (
            "dataset.validation.uri",
            rows(json!({})),
            Honoured("/dataset/validation/source/uri", json!("file:///here/test.jsonl")),
        ),
        (
            "dataset.validation.format",
            rows(json!({"format": "Text"})),
            Honoured("/dataset/validation/source/format", json!("Text")),
        ),
        (
            "dataset.validation.secretRef.name",
            rows(json!({"secretRef": secret})),
            Refused("spec.dataset.validation.secretRef"),
        ),
        (
            "dataset.validation.columnMap{}",
            rows(json!({"columnMap": {"prompt": "question"}})),
            Refused("spec.dataset.validation.columnMap"),
        ),
        (
            "dataset.splitPercent",
            json!({"dataset": {"splitPercent": 7}}),
            Honoured("/dataset/validation/splitPercent", json!(7)),
        ),
        (
            "dataset.onProblem.leakage",
            json!({"dataset": {"onProblem": {"leakage": "Warn"}}}),
            Honoured("/dataset/onProblem/leakage", json!("Warn")),
        ),
        (
            "dataset.onProblem.duplicates",
            json!({"dataset": {"onProblem": {"duplicates": "Fail"}}}),
            Honoured("/dataset/onProblem/duplicates", json!("Fail")),
        ),
        (
            "dataset.onProblem.truncatedAnswers",
            json!({"dataset": {"onProblem": {"truncatedAnswers": "Warn"}}}),
            Honoured("/dataset/onProblem/truncatedAnswers", json!("Warn")),
        ),
        ("method.type", json!({"method": {"type": "Full"}}), Honoured("/method/full", json!({}))),
        ("method.type", json!({"method": {"type": "QLoRA"}}), Refused("spec.method.type")),
        ("method.lora.rank", lora("rank", json!(3)), Honoured("/method/loRA/lora/rank", json!(3))),
        ("method.lora.alpha", lora("alpha", json!(5)), Honoured("/method/loRA/lora/alpha", json!(5.0))),
        ("method.lora.dropout", lora("dropout", json!("0.1")), Honoured("/method/loRA/lora/dropout", json!(0.1))),
        (
            "method.lora.targetModules[]",
            lora("targetModules", json!(["q_proj"])),
            Honoured("/method/loRA/lora/targetModules", json!(["q_proj"])),
        ),
        (
            "method.lora.rankStabilized",
            lora("rankStabilized", json!(true)),
            Honoured("/method/loRA/lora/rankStabilized", json!(true)),
        ),
        (
            "method.full.optimizerInBackward",
            json!({
                "method": {"type": "Full", "full": {"optimizerInBackward": true}}, "hyperparameters": {"maxGradNorm": "0"}
            }),
            Honoured("/method/full/optimizerInBackward", json!(true)),
        ),
        ("method.quantization.type", quantized.clone(), Refused("spec.method.type")),
        ("method.quantization.doubleQuantization", quantized, Refused("spec.method.type")),
        (
            "hyperparameters.epochs",
            parameter("epochs", json!("1.5")),
            Honoured("/hyperparameters/duration/epochs", json!(1.5)),
        ),
        (
            "hyperparameters.maxSteps",
            parameter("maxSteps", json!(9)),
            Honoured("/hyperparameters/duration/maxSteps", json!(9)),
        ),
        (
            "hyperparameters.learningRate",
            parameter("learningRate", json!("1e-3")),
            Honoured("/hyperparameters/learningRate", json!(1e-3)),
        ),
        (
            "hyperparameters.batchSize",
            parameter("batchSize", json!(3)),
            Honoured("/hyperparameters/batchSize", json!(3)),
        ),
        (
            "hyperparameters.microBatchTokens",
            parameter("microBatchTokens", json!(512)),
            Honoured("/hyperparameters/microBatchTokens", json!(512)),
        ),
        (
            "hyperparameters.maxSequenceLength",
            parameter("maxSequenceLength", json!(99)),
            Honoured("/hyperparameters/maxSequenceLength", json!(99)),
        ),
        (
            "hyperparameters.scheduler",
            parameter("scheduler", json!("Linear")),
            Honoured("/hyperparameters/scheduler", json!("Linear")),
        ),
        (
            "hyperparameters.warmupRatio",
            parameter("warmupRatio", json!("0.1")),
            Honoured("/hyperparameters/warmupRatio", json!(0.1)),
        ),
        (
            "hyperparameters.weightDecay",
            parameter("weightDecay", json!("0.01")),
            Honoured("/hyperparameters/weightDecay", json!(0.01)),
        ),
        (
            "hyperparameters.maxGradNorm",
            parameter("maxGradNorm", json!("0.5")),
            Honoured("/hyperparameters/maxGradNorm", json!(0.5)),
        ),
        (
            "hyperparameters.optimizer",
            parameter("optimizer", json!("AdamW8Bit")),
            Honoured("/hyperparameters/optimizer", json!("AdamW8Bit")),
        ),
        ("hyperparameters.seed", parameter("seed", json!(1)), Honoured("/hyperparameters/seed", json!(1))),
        (
            "hyperparameters.neftuneAlpha",
            parameter("neftuneAlpha", json!("5")),
            Honoured("/hyperparameters/neftuneAlpha", json!(5.0)),
        ),
        (
            "hyperparameters.precision",
            parameter("precision", json!("FP32")),
            Honoured("/hyperparameters/precision", json!("FP32")),
        ),
        (
            "resources.limits{}",
            limit("memory", json!("1Gi")),
            Honoured("/resources/memoryBytes", json!(1_073_741_824_i64)),
        ),
        ("resources.limits{}", limit("memory", json!(4096)), Honoured("/resources/memoryBytes", json!(4096))),
        ("resources.limits{}", limit("memory", json!("0")), Refused("spec.resources.limits.memory")),
        ("resources.limits{}", limit("cpu", json!("1500m")), Honoured("/resources/cpus", json!(1.5))),
        ("resources.limits{}", limit("cpu", json!("0")), Refused("spec.resources.limits.cpu")),
        ("resources.limits{}", limit("nvidia.com/gpu", json!("1")), Honoured("/resources/accelerator", json!(true))),
        ("resources.limits{}", limit("amd.com/gpu", json!(1)), Honoured("/resources/accelerator", json!(true))),
        ("resources.limits{}", limit("nvidia.com/gpu", json!("2")), Refused("spec.resources.limits[nvidia.com/gpu]")),
        (
            "resources.limits{}",
            limit("ephemeral-storage", json!("5Gi")),
            Warned("spec.resources.limits.ephemeral-storage"),
        ),
        (
            "resources.requests{}",
            json!({"resources": {"requests": {"cpu": "1"}}}),
            Warned("spec.resources.requests.cpu"),
        ),
        ("nodes", json!({"nodes": 2}), Refused("spec.nodes")),
        ("scheduling.queueName", json!({"scheduling": {"queueName": "q"}}), Warned("spec.scheduling")),
        (
            "scheduling.workloadPriorityClassName",
            json!({"scheduling": {"queueName": "q", "workloadPriorityClassName": "w"}}),
            Warned("spec.scheduling"),
        ),
        ("scheduling.priorityClassName", json!({"scheduling": {"priorityClassName": "p"}}), Warned("spec.scheduling")),
        ("scheduling.nodeSelector{}", json!({"scheduling": {"nodeSelector": {"a": "b"}}}), Warned("spec.scheduling")),
        ("scheduling.tolerations[].key", toleration.clone(), Warned("spec.scheduling")),
        ("scheduling.tolerations[].operator", toleration.clone(), Warned("spec.scheduling")),
        ("scheduling.tolerations[].value", toleration.clone(), Warned("spec.scheduling")),
        ("scheduling.tolerations[].effect", toleration.clone(), Warned("spec.scheduling")),
        ("scheduling.tolerations[].tolerationSeconds", toleration, Warned("spec.scheduling")),
        (
            "checkpoint.everySteps",
            json!({"checkpoint": {"everySteps": 5}}),
            Honoured("/checkpoint/interval/everySteps", json!(5)),
        ),
        (
            "checkpoint.everySeconds",
            json!({"checkpoint": {"everySeconds": 5}}),
            Honoured("/checkpoint/interval/everySeconds", json!(5)),
        ),
        (
            "checkpoint.keep.latest",
            json!({"checkpoint": {"keep": {"latest": 5}}}),
            Honoured("/checkpoint/keepLatest", json!(5)),
        ),
        (
            "checkpoint.keep.best",
            json!({"checkpoint": {"keep": {"best": 5}}}),
            Honoured("/checkpoint/keepBest", json!(5)),
        ),
        (
            "checkpoint.keep.best",
            json!({"dataset": {"splitPercent": null}, "checkpoint": {"keep": {"best": 5}}}),
            Warned("spec.checkpoint.keep.best"),
        ),
        ("checkpoint.resume", json!({"checkpoint": {"resume": "Never"}}), Honoured("/checkpoint/resume", json!(false))),
        (
            "checkpoint.resumeFrom.uri",
            json!({"checkpoint": {"resumeFrom": {"uri": "s3://b/k"}}}),
            Refused("spec.checkpoint.resumeFrom"),
        ),
        (
            "checkpoint.resumeFrom.secretRef.name",
            json!({"checkpoint": {"resumeFrom": {"uri": "s3://b/k", "secretRef": secret}}}),
            Refused("spec.checkpoint.resumeFrom"),
        ),
        (
            "checkpoint.storage.claim",
            json!({"checkpoint": {"storage": {"claim": "c"}}}),
            Warned("spec.checkpoint.storage"),
        ),
        (
            "checkpoint.storage.path",
            json!({"checkpoint": {"storage": {"claim": "c", "path": "p"}}}),
            Warned("spec.checkpoint.storage"),
        ),
        ("checkpoint.storage.size", storage.clone(), Warned("spec.checkpoint.storage")),
        ("checkpoint.storage.storageClassName", storage.clone(), Warned("spec.checkpoint.storage")),
        ("checkpoint.storage.whenDeleted", storage, Warned("spec.checkpoint.storage")),
        (
            "validation.everySteps",
            json!({"validation": {"everySteps": 5}}),
            Honoured("/validation/everySteps", json!(5)),
        ),
        (
            "validation.metric",
            json!({"validation": {"metric": "exactMatch"}}),
            Honoured("/validation/metric", json!("exactMatch")),
        ),
        (
            "validation.evaluate",
            json!({"validation": {"evaluate": "Last"}}),
            Honoured("/validation/evaluate", json!("Last")),
        ),
        (
            "validation.baselines.zeroShot",
            json!({"validation": {"baselines": {"zeroShot": false}}}),
            Honoured("/validation/zeroShot", json!(false)),
        ),
        (
            "validation.baselines.fewShot.examples",
            json!({"validation": {"baselines": {"fewShot": {"examples": 2}}}}),
            Honoured("/validation/fewShotExamples", json!(2)),
        ),
        ("validation.gates[].metric", at_most.clone(), Honoured("/validation/gates/0/metric", json!("perplexity"))),
        ("validation.gates[].operator", at_most.clone(), Honoured("/validation/gates/0/operator", json!("atMost"))),
        ("validation.gates[].value", at_most, Honoured("/validation/gates/0/value", json!(1.5))),
        ("validation.gates[].baseline", improves.clone(), Honoured("/validation/gates/0/baseline", json!("FewShot"))),
        ("validation.gates[].by", improves, Honoured("/validation/gates/0/by", json!(0.25))),
        (
            "validation.forgetting.dataset.uri",
            forgetting(json!({})),
            Honoured("/validation/forgetting/dataset/uri", json!("file:///here/general.jsonl")),
        ),
        (
            "validation.forgetting.dataset.format",
            forgetting(json!({"dataset": {"format": "Text"}})),
            Honoured("/validation/forgetting/dataset/format", json!("Text")),
        ),
        (
            "validation.forgetting.dataset.secretRef.name",
            forgetting(json!({"dataset": {"secretRef": secret}})),
            Refused("spec.validation.forgetting.dataset.secretRef"),
        ),
        (
            "validation.forgetting.dataset.columnMap{}",
            forgetting(json!({"dataset": {"columnMap": {"text": "body"}}})),
            Refused("spec.validation.forgetting.dataset.columnMap"),
        ),
        (
            "validation.forgetting.maxLossIncrease",
            forgetting(json!({"maxLossIncrease": "0.2"})),
            Honoured("/validation/forgetting/maxLossIncrease", json!(0.2)),
        ),
        (
            "validation.onFailure",
            json!({"validation": {"onFailure": "Complete"}}),
            Honoured("/validation/failOnGate", json!(false)),
        ),
        (
            "earlyStopping.patience",
            json!({"earlyStopping": {"patience": 2}}),
            Honoured("/earlyStopping/patience", json!(2)),
        ),
        (
            "earlyStopping.minDelta",
            json!({"earlyStopping": {"patience": 2, "minDelta": "0.1"}}),
            Honoured("/earlyStopping/minDelta", json!(0.1)),
        ),
        ("output.uri", json!({"output": {"uri": "s3://b/k"}}), Warned("spec.output.uri")),
        ("output.secretRef.name", json!({"output": {"secretRef": secret}}), Refused("spec.output.secretRef")),
        ("output.format", json!({"output": {"format": "Merged"}}), Honoured("/output/format", json!("Merged"))),
        (
            "output.publishWhen",
            json!({"output": {"publishWhen": "Always"}}),
            Honoured("/output/publishAlways", json!(true)),
        ),
        ("failurePolicy.maxRetries", json!({"failurePolicy": {"maxRetries": 1}}), Warned("spec.failurePolicy")),
        ("failurePolicy.maxPreemptions", json!({"failurePolicy": {"maxPreemptions": 1}}), Warned("spec.failurePolicy")),
        ("suspend", json!({"suspend": true}), Refused("spec.suspend")),
        ("stopRequested", json!({"stopRequested": true}), Refused("spec.stopRequested")),
        ("startDeadlineSeconds", json!({"startDeadlineSeconds": 5}), Warned("spec.startDeadlineSeconds")),
        ("activeDeadlineSeconds", json!({"activeDeadlineSeconds": 5}), Warned("spec.activeDeadlineSeconds")),
        ("ttlSecondsAfterFinished", json!({"ttlSecondsAfterFinished": 5}), Warned("spec.ttlSecondsAfterFinished")),
        ("managedBy", json!({"managedBy": "other"}), Warned("spec.managedBy")),
    ]
}
