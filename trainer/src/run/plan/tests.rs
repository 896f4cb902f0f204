use std::collections::BTreeMap;
use std::path::Path;

use crds::check::{Scope, check};
use crds::resolve::{Target, resolve};

use super::*;

const JOB: &str = "apiVersion: finetune.dev/v1alpha1\nkind: FineTuneJob\nmetadata: {name: rows}\nspec:\n  model: {uri: file://.}\n  \
                   dataset: {train: {uri: file://train.jsonl}}\n  method: {type: LoRA}\n";

/// Of an 8-billion-parameter Llama.
fn model() -> Spec {
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5
    });
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(folder.path().join("config.json"), config.to_string()).expect("writable");
    Spec::read(folder.path()).expect("a model")
}

/// What `work` makes of rows of 2048 tokens where so much memory is there.
fn with_inputs<T>(memory: i64, accelerator: bool, longest_answered: i64, work: impl FnOnce(&Inputs) -> T) -> T {
    let checked = check(JOB, Scope::Local).expect("a valid job");
    let target = Target::Local { folder: Path::new("."), claims: &BTreeMap::new() };
    let config = resolve(&checked.job, &crds::profile::built_in(), target).expect("resolves").config;
    let inputs = Inputs {
        model: &model(),
        config: &config,
        kind: Kind::BFloat16,
        accelerator,
        makes_scores: false,
        plain_cache: accelerator,
        multiprocessors: 132,
        longest: 2048,
        mean_length: 2048,
        longest_measured: 0,
        step_tokens: 8192,
        answered: 100,
        longest_answered,
        epoch_tokens: 1 << 20,
        total_steps: 100,
        steps_per_epoch: 100,
        memory,
        host_memory: i64::MAX,
        matmul_rate: 1e14,
    };
    work(&inputs)
}

fn planned(memory: i64, accelerator: bool, longest_answered: i64) -> Estimate {
    let estimate = with_inputs(memory, accelerator, longest_answered, plan).expect("fits");
    assert!(estimate.memory.total <= memory);
    estimate
}

/// What is recomputed and how many tokens are computed at once where so much memory is there.
fn chosen(memory: i64, accelerator: bool) -> (Recompute, i64) {
    let estimate = planned(memory, accelerator, 0);
    (estimate.recompute, estimate.micro_batch_tokens)
}

#[test]
fn caches_of_answers_take_the_place_of_activations() {
    // Nothing is asked.
    assert_eq!(planned(80 << 30, true, 0).cache_tokens, 0);
    let (silent, answering) = (planned(80 << 30, true, 0), planned(80 << 30, true, 512));
    assert_eq!(silent.memory.total, answering.memory.total);
    // 128 KiB a token, keys and values of 32 layers, and 4 KiB for copies of a layer's; what new tokens take leaves less.
    let room = answering.memory.activations / (132 << 10);
    assert!((room - 6144..=room).contains(&answering.cache_tokens), "{} of {room}", answering.cache_tokens);
}

#[test]
fn caches_of_answers_ask_for_no_more_memory_than_there_is() {
    // In the place of so many bytes, with so many for new tokens.
    let tokens = |memory, others: i64, forward| {
        let total = |bytes: i64| bytes.max(others);
        with_inputs(memory, false, 512, |inputs| caches(inputs, others, forward, 0, total).0)
    };
    let in_place_of =
        |others, forward| [i64::MAX, 2 << 30, 1 << 30, 128 << 20, 1].map(|memory| tokens(memory, others, forward));
    assert_eq!(in_place_of(0, 0), [16_384, 8192, 4096, 512, 512]);
    assert_eq!(in_place_of(1 << 28, 1 << 29), [16_384, 8192, 2048, 512, 512]);
    // What takes no more than the others is free.
    assert_eq!(in_place_of(2 << 30, 0), [16_384, 15_872, 15_872, 15_872, 15_872]);
    assert_eq!(in_place_of(3 << 30, 0), [24_064; 5]);
    // The copy of what is trained comes first, where it fits.
    let beside = |copy| with_inputs(2 << 30, false, 512, |inputs| caches(inputs, 0, 0, copy, |bytes| bytes).0);
    assert_eq!([0, 1 << 30, 4 << 30].map(beside), [8192, 4096, 8192]);
    // A hundred short rows need no more.
    assert_eq!(with_inputs(i64::MAX, false, 16, |inputs| caches(inputs, 0, 0, 0, |bytes| bytes).0), 1600);
}

#[test]
fn what_the_plain_cache_takes_is_counted() {
    // Tokens that fit beside all else, and bytes of caches and attention.
    let caches = |kind, plain_cache, answered, longest_answered| {
        with_inputs(i64::MAX, true, 0, |inputs| {
            let inputs = Inputs { kind, plain_cache, answered, longest_answered, ..*inputs };
            let none = Method::LoRA {
                lora: Lora { rank: 1, alpha: 1.0, dropout: 0.0, target_modules: Vec::new(), rank_stabilized: false },
            };
            estimate_at(&inputs, &none, 1, Recompute::Layer).memory.activations
        })
    };
    let more = |kind, answered, longest| caches(kind, true, answered, longest) - caches(kind, false, answered, longest);
    let shape = [32, 128];
    for kind in [Kind::BFloat16, Kind::Float] {
        let element = kind.elt_size_in_bytes() as i64;
        for (answered, longest) in [(100, 512), (400, 512), (100, 4096), (1, 1)] {
            let tokens = longest.max(PROMPT_TOKENS as i64) + answered;
            let held = longest + CACHE_TOKENS.min(answered * longest).max(longest);
            let expected = pass_bytes(kind, shape, tokens, longest) + held * 2 * 1024 * element;
            assert_eq!(more(kind, answered, longest), expected, "{kind:?} {answered} {longest}");
        }
    }
    let pass = |tokens, longest| pass_bytes(Kind::BFloat16, shape, tokens, longest);
    // Scores in fp32 and in bf16, the mask, and outputs of each token.
    assert_eq!(pass(2, 100) - pass(1, 100), (4 + 2) * 32 * 100 + 100 + 6 * 4 * 32 * 128);
    assert_eq!(pass(10, 200) - pass(10, 100), 10 * ((4 + 2) * 32 * 100 + 100));
    // Larger matrices are made in parts, of one token at least.
    assert_eq!(pass(4096, 4096) - pass(2048, 4096), 2048 * (4096 + 6 * 4 * 32 * 128));
    assert_eq!(pass(1, 1 << 20) - pass(1, 1 << 19), ((4 + 2) * 32 + 1) << 19);
    // Where no product gives sums of bf16 in fp32, factors are copied.
    assert_eq!([true, false].map(|gpu| copied_bytes(Kind::BFloat16, 1024, gpu)), [4096, 8192]);
    assert_eq!([true, false].map(|gpu| copied_bytes(Kind::Float, 1024, gpu)), [8192, 8192]);
}

#[test]
fn what_an_accelerator_trains_is_copied_where_its_host_has_room() {
    let full = Method::Full { optimizer_in_backward: false };
    let room = |host_memory| {
        with_inputs(i64::MAX, true, 0, |inputs| {
            let inputs = Inputs { host_memory, ..*inputs };
            (estimate(&inputs, &inputs.config.method).has_room_for_copy, estimate(&inputs, &full).has_room_for_copy)
        })
    };
    // Masters and moments of eight billion weights are 90 GiB, of an adapter half a gibibyte.
    assert_eq!(
        [100, 64, 1, 0].map(|gibibytes| room(gibibytes << 30)),
        [(true, true), (true, false), (true, false), (false, false)]
    );
}

#[test]
fn a_merged_model_is_written_in_pieces_that_no_plan_counts() {
    let memory = |format| {
        with_inputs(40 << 30, true, 0, |inputs| {
            let mut config = inputs.config.clone();
            config.output.format = format;
            plan(&Inputs { config: &config, ..*inputs }).expect("8 billion weights in bf16 fit").memory
        })
    };
    assert_eq!(memory(crds::run::OutputFormat::Merged), memory(crds::run::OutputFormat::Adapter));
}

#[test]
fn smaller_micro_batches_come_before_another_forward_pass() {
    let choices = [80, 60, 40, 26, 24, 22].map(|gibibytes| chosen(gibibytes << 30, true));
    let (recomputed, tokens): (Vec<_>, Vec<_>) = choices.into_iter().unzip();
    let order = [Recompute::Nothing, Recompute::Pointwise, Recompute::Layer];
    let places: Vec<_> = recomputed.iter().map(|mode| order.iter().position(|other| other == mode)).collect();
    assert!(places.is_sorted(), "{recomputed:?}");
    for mode in order {
        assert!(recomputed.contains(&mode), "{recomputed:?} has no {mode:?}");
    }
    let cheap: Vec<_> =
        std::iter::zip(&recomputed, &tokens).filter(|(mode, _)| **mode == Recompute::Pointwise).collect();
    assert!(cheap.first().expect("one").1 > cheap.last().expect("one").1, "{recomputed:?} {tokens:?}");
    // On a CPU half as much memory again would gain 1 %.
    assert_eq!(chosen(1 << 40, false).0, Recompute::Pointwise);
}

#[test]
fn scores_are_counted_where_they_are_made() {
    let activations = |makes_scores, longest, longest_measured| {
        with_inputs(i64::MAX, true, 0, |inputs| {
            let inputs = Inputs { kind: Kind::Float, makes_scores, longest, longest_measured, ..*inputs };
            estimate(&inputs, &inputs.config.method).memory.activations
        })
    };
    let longer = |makes_scores| activations(makes_scores, 8192, 0) - activations(makes_scores, 2048, 0);
    // Two matrices of 32 heads in fp32.
    assert_eq!([longer(false), longer(true)], [0, 2 * 4 * 32 * (8192 * 8192 - 2048 * 2048)]);
    // A row that is measured and longer than all that are trained on.
    assert!(activations(true, 2048, 32_768) > 2 * 4 * 32 * 32_768 * 32_768);
    assert_eq!(activations(false, 2048, 32_768), activations(false, 2048, 0));
}
