//! Logits, gradients and losses against transformers, PEFT and torch (`tests/golden/make_golden.py`).

use crds::run::{Lora, Method, Optimizer};
use harness::{
    StepsCase, base_model, device, examples, golden, has_base_model, max_difference, on_host, read_golden,
    start_adapters, steps_cases,
};
use serde::Deserialize;
use tch::{Device, Kind, Tensor};
use trainer::compute::linear::Adapters;
use trainer::compute::optim::Parameters;
use trainer::data::pack::{PackedBatch, pack};
use trainer::data::tokenizer::Tokenizer;
use trainer::ground::stop::Stop;
use trainer::judge::evaluate::{self, Measurement};
use trainer::judge::generate::{Limits, generate};
use trainer::model::{Built, DeviceBatch, Noise, Recompute, Source, build};
use trainer::store::weights::MappedFile;
use trainer::train::{StepConfig, StepStats, train_step};

/// Relative tolerance of losses and gradient norms over ten steps.
const STEP_TOLERANCE: f64 = 1e-4;
/// Largest distance of a gradient in bf16 from that in fp32, of its norm: an operation rounds by up to 0.4 %, a gradient of two
/// layers has tens behind it. The largest of a right one is 4.3 %.
const BF16_TOLERANCE: f64 = 6e-2;
/// How much farther from fp32 bf16 may be than it is in transformers.
const BF16_EXCESS: f64 = 1.5;
/// Absolute tolerance of fp32 logits.
const LOGIT_TOLERANCE: f64 = 2e-4;

fn built(folder: &std::path::Path, method: &Method, kind: Kind) -> Built {
    let device = device();
    tch::set_num_threads(1);
    let source =
        Source { folder, method: Some(method), optimizer: Optimizer::AdamW, kind, device, seed: 1, max_positions: 512 };
    build(&source).unwrap_or_else(|error| panic!("{error}"))
}

fn lora() -> Method {
    let lora = Lora { rank: 4, alpha: 8.0, dropout: 0.0, target_modules: Vec::new(), rank_stabilized: false };
    Method::LoRA { lora }
}

/// Gives each lora_B, which begins as zeros, other values: without them no gradient reaches lora_A.
fn fill_adapters(parameters: &mut Parameters) {
    let flat = parameters.flat_master().copy();
    for slot in parameters.slots().iter().filter(|slot| slot.name.contains("lora_B")) {
        let index = Tensor::arange(slot.len(), (Kind::Float, Device::Cpu));
        slot.view(&flat).copy_(&(index.cos() * 0.1).view(slot.shape.as_slice()));
    }
    parameters.set_master(&flat);
}

fn step_config(learning_rate: f64, case: &StepsCase, recompute: Recompute) -> StepConfig {
    StepConfig {
        learning_rate,
        weight_decay: case.weight_decay,
        max_grad_norm: case.max_grad_norm,
        noise: Noise { seed: 1, step: 0, neftune_alpha: None },
        recompute,
    }
}

fn relative(ours: f64, expected: f64) -> f64 {
    (ours - expected).abs() / expected.abs().max(1e-12)
}

#[derive(Deserialize)]
struct GoldenLogits {
    prompts: Vec<GoldenPrompt>,
    greedy: Greedy,
}

#[derive(Deserialize)]
struct GoldenPrompt {
    text: String,
    tokens: Vec<u32>,
    positions: Vec<i64>,
    columns: Vec<i64>,
    logits: Vec<Vec<f32>>,
}

#[derive(Deserialize)]
struct Greedy {
    tokens: Vec<u32>,
    answer: String,
}

fn single(tokens: &[u32]) -> DeviceBatch {
    let mut batch = PackedBatch::default();
    batch.push(0, tokens.iter().copied(), &vec![0; tokens.len()]);
    DeviceBatch::new(&batch, device())
}

#[test]
fn base_logits_and_greedy_answer_equal_transformers() {
    if !has_base_model() {
        return;
    }
    let golden: GoldenLogits = read_golden("logits.json");
    let folder = base_model();
    let tokenizer = Tokenizer::open(&folder).expect("a tokenizer");
    let Built { model, .. } = built(&folder, &lora(), Kind::Float);
    for prompt in &golden.prompts {
        assert_eq!(tokenizer.encode(&prompt.text).expect("encodes").ids, prompt.tokens);
        let logits = model.all_logits(&single(&prompt.tokens), Adapters::Off, &Stop::default()).expect("no stop");
        let ours = on_host(&logits)
            .index_select(0, &Tensor::from_slice(&prompt.positions))
            .index_select(1, &Tensor::from_slice(&prompt.columns));
        let expected = Tensor::from_slice(&prompt.logits.concat()).view(ours.size().as_slice());
        let difference = max_difference(&ours, &expected);
        assert!(difference <= LOGIT_TOLERANCE, "{:?}: logits differ by {difference}", prompt.text);
    }
    for kind in [Kind::Float, Kind::BFloat16] {
        let Built { model, .. } = built(&folder, &lora(), kind);
        let end_tokens = tokenizer.end_tokens().to_vec();
        let limits = Limits { max_new_tokens: 24, end_tokens, stop_text: None, cache_tokens: 4096 };
        // Beside another prompt with the same beginning, so that prefix sharing and padding take part.
        let other: Vec<u32> = [&golden.greedy.tokens[..], &golden.greedy.tokens[..7]].concat();
        let prompts = [golden.greedy.tokens.as_slice(), &other];
        let answers =
            generate(&model, &prompts, Adapters::On, &limits, &Stop::default(), &mut |_| ()).expect("no stop");
        assert_eq!(tokenizer.decode(&answers[0].tokens).expect("decodes"), golden.greedy.answer, "{kind:?}");
        assert!(answers[0].ended);
    }
}

/// Every token of an answer is the likeliest after all that stands before it, computed anew without a cache: in fp32, and in
/// bf16 with the kernels of `cpp/decode.cpp` to within its rounding.
#[test]
fn answers_in_few_slots_are_what_the_model_says_without_a_cache() {
    if !has_base_model() {
        return;
    }
    let golden: GoldenLogits = read_golden("logits.json");
    let folder = base_model();
    let begin = golden.greedy.tokens.as_slice();
    let prompts: Vec<Vec<u32>> =
        golden.prompts.iter().map(|prompt| [begin, &prompt.tokens[..prompt.tokens.len().min(20)]].concat()).collect();
    let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    assert!(prompts.len() > 2);
    // Logits are about 20, where neighbours in bf16 are an eighth apart.
    for (kind, most) in [(Kind::Float, 1e-3), (Kind::BFloat16, 0.5)] {
        let Built { model, .. } = built(&folder, &lora(), kind);
        // Two slots.
        let limits = Limits { max_new_tokens: 12, end_tokens: Vec::new(), stop_text: None, cache_tokens: 70 };
        let answers =
            generate(&model, &prompts, Adapters::Off, &limits, &Stop::default(), &mut |_| ()).expect("no stop");
        let mut likeliest = 0;
        for (&prompt, answer) in prompts.iter().zip(&answers) {
            assert_eq!(answer.tokens.len(), 12);
            let tokens = [prompt, &answer.tokens[..]].concat();
            let logits = model.all_logits(&single(&tokens), Adapters::Off, &Stop::default()).expect("no stop");
            let logits = on_host(&logits).narrow(0, prompt.len() as i64 - 1, 12).to_kind(Kind::Double);
            let chosen: Vec<i64> = answer.tokens.iter().map(|&token| i64::from(token)).collect();
            let chosen = logits.gather(1, &Tensor::from_slice(&chosen).unsqueeze(1), false).squeeze_dim(1);
            let gaps = Vec::<f64>::try_from(logits.amax([1i64].as_slice(), false) - chosen).expect("doubles");
            assert!(gaps.iter().all(|&gap| gap <= most), "{kind:?}: {gaps:?}");
            likeliest += gaps.iter().filter(|&&gap| gap == 0.0).count();
        }
        assert!(likeliest * 10 >= answers.len() * 12 * 9, "{kind:?}: {likeliest} of {}", answers.len() * 12);
    }
}

/// Each family's logits, and an answer with a cache, which is the same beside others.
#[test]
fn every_familys_logits_and_answer_equal_transformers() {
    let mut checked = 0;
    for case in read_golden::<Vec<StepsCase>>("families.json").into_iter().filter(|case| case.name.ends_with("-lora")) {
        let file = MappedFile::open(&case.folder().join("logits.safetensors")).expect("golden logits");
        let read = |name: &str, kind: Kind| {
            let mapped = file.tensor(name).expect("a golden tensor");
            let shape: Vec<i64> = mapped.shape.iter().map(|&size| size as i64).collect();
            Tensor::from_data_size(mapped.data, &shape, kind)
        };
        let integers = |name: &str| Vec::<i64>::try_from(read(name, Kind::Int64)).expect("integers");
        let tokens: Vec<u32> = integers("tokens").into_iter().map(|token| token as u32).collect();
        let (expected, answer) = (read("logits", Kind::Float), integers("answer"));
        let Built { model, .. } = built(&case.folder(), &lora(), Kind::Float);
        let logits = model.all_logits(&single(&tokens), Adapters::Off, &Stop::default()).expect("no stop");
        let difference = max_difference(&on_host(&logits), &expected);
        assert!(difference <= LOGIT_TOLERANCE, "{}: logits differ by {difference}", case.name);
        let limits =
            Limits { max_new_tokens: answer.len() as i64, end_tokens: Vec::new(), stop_text: None, cache_tokens: 256 };
        let prompts = [&tokens[..9], &tokens[..5], &tokens[..9]];
        let answers =
            generate(&model, &prompts, Adapters::Off, &limits, &Stop::default(), &mut |_| ()).expect("no stop");
        for place in [0, 2] {
            let ours: Vec<i64> = answers[place].tokens.iter().map(|&token| i64::from(token)).collect();
            assert_eq!(ours, answer, "{}", case.name);
        }
        let theirs = case.bf16.as_ref().expect("measured").logits;
        let Built { model, .. } = built(&case.folder(), &lora(), Kind::BFloat16);
        let logits = model.all_logits(&single(&tokens), Adapters::Off, &Stop::default()).expect("no stop");
        let distance = (on_host(&logits) - &expected).norm().double_value(&[]) / expected.norm().double_value(&[]);
        assert!(distance <= theirs * BF16_EXCESS, "{}: bf16 is {distance} from fp32, transformers {theirs}", case.name);
        checked += 1;
    }
    assert_eq!(checked, 8);
}

#[test]
fn ten_steps_equal_transformers_peft_and_torch() {
    let cases = steps_cases();
    assert!(cases.len() >= 20);
    let has_base_model = has_base_model();
    for case in cases.into_iter().filter(|case| has_base_model || case.model != "base") {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let examples = examples(folder.path(), &case.examples);
        let Built { model, mut parameters } = built(&case.folder(), &case.method.method(), Kind::Float);
        start_adapters(&mut parameters);
        for (index, step) in case.steps.iter().enumerate() {
            let batches = pack(&examples, &step.examples, 4096);
            let config = step_config(step.learning_rate, &case, Recompute::Pointwise);
            let stats = train_step(&model, &mut parameters, &batches, &config, &Stop::default());
            let stats = stats.expect("no libtorch error").expect("no stop");
            let (loss, norm) = (stats.loss.double_value(&[]), stats.gradient_norm.double_value(&[]));
            let within =
                relative(loss, step.loss) <= STEP_TOLERANCE && relative(norm, step.gradient_norm) <= STEP_TOLERANCE;
            assert!(
                within,
                "{} step {index}: loss {loss} against {}, gradient norm {norm} against {}",
                case.name, step.loss, step.gradient_norm
            );
        }
    }
}

#[test]
fn every_gradient_equals_autograd() {
    let mut checked = Vec::new();
    for case in steps_cases() {
        let Some(gradients) = &case.gradients else { continue };
        let file = MappedFile::open(&golden(gradients)).expect("golden gradients");
        let folder = tempfile::tempdir().expect("a temporary folder");
        let examples = examples(folder.path(), &case.examples);
        let Built { model, mut parameters } = built(&case.folder(), &case.method.method(), Kind::Float);
        start_adapters(&mut parameters);
        // A huge norm: the gradients stay as they are.
        let config = StepConfig { max_grad_norm: 1e30, ..step_config(0.0, &case, Recompute::Pointwise) };
        let batches = pack(&examples, &case.steps[0].examples, 4096);
        train_step(&model, &mut parameters, &batches, &config, &Stop::default()).expect("no libtorch error");
        assert_eq!(parameters.slots().len(), file.names().len(), "{}", case.name);
        for slot in parameters.slots() {
            let expected = file.tensor(&slot.name).unwrap_or_else(|| panic!("{}: no {}", case.name, slot.name));
            let expected = Tensor::from_data_size(expected.data, &slot.shape, Kind::Float);
            let ours = on_host(&parameters.gradient(slot).view());
            let scale = expected.abs().max().double_value(&[]).max(1e-6);
            let difference = max_difference(&ours, &expected) / scale;
            assert!(difference <= 1e-4, "{}: gradient of {} differs by {difference}", case.name, slot.name);
        }
        checked.push(case.name);
    }
    assert!(checked.len() >= 19, "{checked:?}");
}

/// The first step of a case from adapters that all have a gradient: what it tells, and what it trained.
fn first_step(
    case: &StepsCase,
    method: &Method,
    kind: Kind,
    max_tokens: i64,
    config: &StepConfig,
) -> (StepStats, Parameters) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let examples = examples(folder.path(), &case.examples);
    let Built { model, mut parameters } = built(&case.folder(), method, kind);
    start_adapters(&mut parameters);
    fill_adapters(&mut parameters);
    let batches = pack(&examples, &case.steps[0].examples, max_tokens);
    let stats = train_step(&model, &mut parameters, &batches, config, &Stop::default());
    (stats.expect("no libtorch error").expect("no stop"), parameters)
}

/// The kernels of `cpp/` and the dtypes of a run in bf16, against the same step in fp32.
#[test]
fn a_step_in_bf16_is_that_in_fp32_but_for_rounding() {
    // Rounding gathers from layer to layer: over the base's thirty it is 10 % in the first.
    for case in steps_cases().into_iter().filter(|case| case.model != "base") {
        let config = StepConfig { max_grad_norm: 1e30, ..step_config(0.0, &case, Recompute::Pointwise) };
        let [(exact_stats, exact), (stats, ours)] =
            [Kind::Float, Kind::BFloat16].map(|kind| first_step(&case, &case.method.method(), kind, 4096, &config));
        let losses = [&stats, &exact_stats].map(|stats| stats.loss.double_value(&[]));
        let most = case.bf16.as_ref().map_or(1e-2, |theirs| (theirs.loss * BF16_EXCESS).max(1e-3));
        assert!(relative(losses[0], losses[1]) <= most, "{}: losses {losses:?}, at most {most}", case.name);
        assert_eq!(ours.slots(), exact.slots());
        let most = case.bf16.as_ref().map_or(BF16_TOLERANCE, |theirs| theirs.farthest * BF16_EXCESS);
        let (mut distance, mut size) = (0.0, 0.0);
        for slot in exact.slots() {
            let gradient = exact.gradient(slot).view();
            let apart = (ours.gradient(slot).view() - &gradient).norm().double_value(&[]);
            let norm = gradient.norm().double_value(&[]);
            assert!(apart / norm <= most, "{}: gradient of {} differs by {}", case.name, slot.name, apart / norm);
            distance += apart * apart;
            size += norm * norm;
        }
        if let Some(theirs) = &case.bf16 {
            let whole = f64::sqrt(distance / size);
            assert!(whole <= theirs.gradient * BF16_EXCESS, "{}: {whole}, transformers {}", case.name, theirs.gradient);
        }
    }
}

#[test]
fn packing_and_micro_batches_change_nothing_beyond_rounding_and_recomputation_nothing_at_all() {
    for case in steps_cases().into_iter().filter(|case| case.model != "base") {
        let step = |max_tokens, recompute| {
            let config = step_config(1e-2, &case, recompute);
            let (stats, parameters) = first_step(&case, &case.method.method(), Kind::Float, max_tokens, &config);
            (stats, on_host(&parameters.flat_master().copy()))
        };
        let (packed, packed_weights) = step(4096, Recompute::Pointwise);
        for max_tokens in [1, 12, 30] {
            let (split, split_weights) = step(max_tokens, Recompute::Pointwise);
            assert!(relative(split.loss.double_value(&[]), packed.loss.double_value(&[])) < 1e-5, "{}", case.name);
            let norms = [&split, &packed].map(|stats| stats.gradient_norm.double_value(&[]));
            assert!(relative(norms[0], norms[1]) < 1e-5, "{}: {norms:?}", case.name);
            // AdamW's first step divides each gradient by its own size, which magnifies rounding of the tiniest ones.
            let moved = (&split_weights - &packed_weights).abs().mean(Kind::Double).double_value(&[]);
            assert!(moved < 1e-5, "{}: weights differ by {moved}", case.name);
        }
        for recompute in [Recompute::Nothing, Recompute::Layer] {
            let (other, other_weights) = step(4096, recompute);
            assert_eq!(other.loss.double_value(&[]), packed.loss.double_value(&[]), "{}", case.name);
            assert_eq!(other_weights, packed_weights, "{}", case.name);
        }
    }
}

#[test]
fn recomputation_sees_the_dropout_of_the_forward_pass() {
    let cases = steps_cases();
    let case = cases.iter().find(|case| case.name == "tiny-llama-lora").expect("a golden case");
    let method = |dropout| match case.method.method() {
        Method::LoRA { lora } => Method::LoRA { lora: Lora { dropout, ..lora } },
        other => panic!("{other:?}"),
    };
    for kind in [Kind::Float, Kind::BFloat16] {
        let step = |dropout, recompute| {
            let config = step_config(1e-2, case, recompute);
            let (stats, parameters) = first_step(case, &method(dropout), kind, 4096, &config);
            (stats.loss.double_value(&[]), parameters.flat_master().copy())
        };
        let (loss, weights) = step(0.3, Recompute::Nothing);
        for recompute in [Recompute::Pointwise, Recompute::Layer] {
            assert_eq!(step(0.3, recompute), (loss, weights.copy()), "{kind:?} {recompute:?}");
        }
        let (without, _) = step(0.0, Recompute::Nothing);
        assert!(relative(without, loss) > 1e-4, "{kind:?}: dropout has no effect");
    }
}

#[test]
fn evaluation_equals_the_training_loss_and_counts_the_likeliest_tokens() {
    let cases = steps_cases();
    let (mut right, mut all) = (0, 0);
    let names =
        ["tiny-llama-full", "smollm2-lora"].into_iter().filter(|name| *name == "tiny-llama-full" || has_base_model());
    for name in names {
        let case = cases.iter().find(|case| case.name == name).expect("a golden case");
        let folder = tempfile::tempdir().expect("a temporary folder");
        let step = &case.steps[0];
        let chosen: Vec<_> = step.examples.iter().map(|&index| case.examples[index].clone()).collect();
        let examples = examples(folder.path(), &chosen);
        let Built { model, .. } = built(&case.folder(), &case.method.method(), Kind::Float);
        let (mut correct, mut tokens) = (0, 0);
        for example in &chosen {
            let logits = model.all_logits(&single(&example.tokens), Adapters::On, &Stop::default()).expect("no stop");
            let likeliest: Vec<i64> = on_host(&logits.argmax(-1, false)).try_into().expect("integers");
            let next = example.tokens.iter().zip(&example.trained).skip(1);
            for (likeliest, (&token, _)) in likeliest.iter().zip(next).filter(|(_, (_, trained))| **trained == 1) {
                correct += i32::from(*likeliest == i64::from(token));
                tokens += 1;
            }
        }
        for max_tokens in [1, 4096] {
            let losses = evaluate::score(&model, &examples, Adapters::On, max_tokens, &Stop::default());
            let scores = Measurement { losses: losses.expect("no stop"), ..Measurement::default() }.scores();
            assert!(relative(scores.eval_loss.expect("measured"), step.loss) < 1e-5, "{name}: {scores:?}");
            assert_eq!(scores.token_accuracy, Some(f64::from(correct) / f64::from(tokens)), "{name}");
        }
        right += correct;
        all += tokens;
    }
    // A model with random weights alone may have none right.
    assert!(right < all && (right > 0 || harness::is_on_gpu()), "{right} of {all}");
}
