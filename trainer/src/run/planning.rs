//! Everything that is known before anything is trained: rows, device, order, schedule, memory, and what would have to be
//! refused afterwards.

use crds::report::{PlanReport, Stage};
use crds::run::{Method, RunConfig};
use tch::Device;

use super::{Context, Error};
use crate::compute::attention::{self, makes_scores};
use crate::compute::device::{self, Chosen};
use crate::compute::shim::cuda;
use crate::data::generation::longest_answered;
use crate::data::order::Order;
use crate::ground::units::display_bytes;
use crate::judge::generate;
use crate::model::Spec;
use crate::run::plan::{self, Estimate};
use crate::run::prepare::{Prepared, Sources, prepare};
use crate::tell::record::{Event, Observer};
use crate::train::schedule::Schedule;

/// Said where an accelerator's memory is neither asked for nor told.
const UNKNOWN_MEMORY: &str = "nobody tells how much memory the accelerator has: the plan takes it as endless, and a run that does \
                              not fit ends when the memory does; acceleratorMemory of the profile tells it before one is taken";

/// Of an accelerator that is not here: an H100's.
const MULTIPROCESSORS: i64 = 132;

/// Where a run is prepared and where it is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Both in this process.
    Here,
    /// Prepared here, trained on another machine, of which only the resources are known.
    Elsewhere,
    /// Prepared on another machine, trained here: everything comes from the volume.
    Prepared,
}

/// Device, prepared rows and plan: everything that is known before anything is trained.
#[derive(Debug)]
pub struct Planned {
    /// Device, dtype, threads.
    pub chosen: Chosen,
    /// Rows and model folder.
    pub prepared: Prepared,
    /// Which examples make up each step.
    pub order: Order,
    /// Learning rates.
    pub schedule: Schedule,
    /// The configured method.
    pub estimate: Estimate,
    /// The other method, for comparison.
    pub alternative: Estimate,
    /// Bytes that there are; `None` where nobody tells.
    pub memory: Option<i64>,
    /// What attention computes with on an accelerator, and why.
    attention: Option<(&'static str, String)>,
}

/// Prepares and plans a run; refuses one that cannot fit before anything is allocated.
pub fn plan_run(
    config: &RunConfig,
    context: &Context,
    place: Place,
    observer: &mut dyn Observer,
) -> Result<Planned, Error> {
    let write = context.write_error();
    std::fs::create_dir_all(context.run).map_err(&write)?;
    observer.observe(&Event::Stage(Stage::Preparing)).map_err(&write)?;
    let from = if place == Place::Prepared { Sources::AsNoted } else { Sources::Anywhere };
    let prepared = prepare(config, context.run, from, context.access(config), context.stop)?;
    context.last_word.update(|report| {
        report.model_revision.clone_from(&prepared.base.revision);
        report.dataset_digest = Some(prepared.train.digest().to_owned());
    });
    observer.observe(&Event::Data(Box::new(prepared.report.clone()))).map_err(&write)?;
    let sample = Event::Sample { text: prepared.sample.clone(), path: prepared.sample_path.clone() };
    observer.observe(&sample).map_err(&write)?;
    check_gates(config, &prepared)?;
    let planned = plan(config, context, place, prepared)?;
    for event in planned.derived(config) {
        observer.observe(&event).map_err(&write)?;
    }
    Ok(planned)
}

fn plan(config: &RunConfig, context: &Context, place: Place, prepared: Prepared) -> Result<Planned, Error> {
    let precision = config.hyperparameters.precision;
    // Another machine's accelerator is planned for, and is not looked for here.
    let expected = place == Place::Elsewhere && config.resources.accelerator;
    let mut chosen = if expected {
        device::expect_accelerator(precision)
    } else {
        device::choose(precision, config.resources.cpus, context.cuda)
    };
    let accelerator = expected || chosen.device.is_cuda();
    let model = Spec::read(&prepared.base.folder)?;
    let head_size = model.first().attention.head_size;
    let hyperparameters = &config.hyperparameters;
    let batch_size = hyperparameters.batch_size.unsigned_abs() as usize;
    let order = Order::new(hyperparameters.seed, prepared.train.digest(), prepared.train.len(), batch_size);
    let total_steps = order.total_steps(hyperparameters.duration);
    let schedule = Schedule::new(
        hyperparameters.scheduler,
        hyperparameters.learning_rate,
        hyperparameters.warmup_ratio,
        total_steps,
    );
    if config.resources.accelerator && !accelerator {
        return Err(Error::NoAccelerator(chosen.device_reason));
    }
    let of = |device| if place == Place::Elsewhere { None } else { device::memory_limit(device) };
    // The limit is one of the host's memory, and says nothing about an accelerator's.
    let host_memory = of(Device::Cpu).into_iter().chain(config.resources.memory_bytes).min();
    let memory =
        if accelerator { of(chosen.device).or(config.resources.accelerator_memory_bytes) } else { host_memory };
    if accelerator && memory.is_none() {
        chosen.warnings.push(UNKNOWN_MEMORY.to_owned());
    }
    let longest = prepared.train.longest() as i64;
    let inputs = plan::Inputs {
        model: &model,
        config,
        kind: chosen.kind,
        accelerator,
        makes_scores: accelerator && makes_scores(chosen.kind, head_size, chosen.compute_capability),
        plain_cache: accelerator || generate::is_plain(chosen.kind, head_size, Device::Cpu),
        multiprocessors: cuda::properties().map_or(MULTIPROCESSORS, |gpu| gpu.multiprocessors.into()),
        longest,
        mean_length: prepared.train.total_tokens() as i64 / (prepared.train.len() as i64).max(1),
        longest_measured: prepared.longest_measured() as i64,
        step_tokens: (longest * hyperparameters.batch_size).min(prepared.train.total_tokens() as i64),
        answered: prepared.generation.len() as i64,
        longest_answered: longest_answered(&prepared.generation),
        epoch_tokens: prepared.train.total_tokens() as i64,
        total_steps,
        steps_per_epoch: order.steps_per_epoch(),
        memory: memory.unwrap_or(i64::MAX),
        host_memory: host_memory.unwrap_or(i64::MAX),
        matmul_rate: if expected {
            // Nothing here tells how fast it is: no time is estimated.
            f64::INFINITY
        } else {
            plan::measure_matmul_rate(&model, chosen.kind, chosen.device)
        },
    };
    let estimate = plan::plan(&inputs)?;
    let alternative = plan::estimate(&inputs, &plan::other_method(&config.method));
    let attention = accelerator.then(|| attention::describe(chosen.kind, head_size, chosen.compute_capability));
    Ok(Planned { chosen, prepared, order, schedule, estimate, alternative, memory, attention })
}

/// What the verdict, early stopping or the best checkpoint would hang on and cannot be measured is refused before training,
/// not after it.
fn check_gates(config: &RunConfig, prepared: &Prepared) -> Result<(), Error> {
    use crds::run::{Baseline, Gate, Metric, ValidationRows};
    let refuse = |text: String| Err(Error::CannotValidate(text));
    let validation = &config.validation;
    if config.dataset.validation != ValidationRows::None && prepared.validation.is_empty() {
        let text = format!(
            "no validation row has an answer token within the sequence length of {}, so nothing could be judged; raise \
             hyperparameters.maxSequenceLength or give other validation rows",
            prepared.report.max_sequence_length
        );
        return refuse(text);
    }
    if validation.forgetting.is_some() && prepared.forgetting.is_empty() {
        let text = format!(
            "no row of forgetting.dataset has a token to measure within the sequence length of {}; give other rows or leave \
             forgetting out",
            prepared.report.max_sequence_length
        );
        return refuse(text);
    }
    let gated = |gate: &Gate| match gate {
        Gate::AtMost { metric, .. } | Gate::AtLeast { metric, .. } | Gate::ImprovesOn { metric, .. } => *metric,
    };
    let metrics: Vec<Metric> = validation.gates.iter().map(gated).chain([validation.metric]).collect();
    if metrics.contains(&Metric::ExactMatch) && prepared.generation.is_empty() {
        return refuse("exactMatch needs validation rows with answers (messages, or prompt and completion)".into());
    }
    for gate in &validation.gates {
        let Gate::ImprovesOn { metric, baseline, .. } = gate else { continue };
        let metric_name = metric.name();
        match baseline {
            Baseline::Base if !validation.zero_shot => {
                return refuse(format!(
                    "a gate compares {metric_name} with the base model, which is not measured; set baselines.zeroShot: true"
                ));
            }
            Baseline::FewShot if validation.few_shot_examples == 0 => {
                return refuse(format!(
                    "a gate compares {metric_name} with examples in the prompt, which is not measured; set \
                     baselines.fewShot.examples to 1 or more"
                ));
            }
            Baseline::FewShot => {
                let measurable = match metric {
                    Metric::ExactMatch => prepared.generation.iter().any(|row| row.few_shot_prompt.is_some()),
                    Metric::EvalLoss | Metric::Perplexity | Metric::TokenAccuracy => {
                        prepared.few_shot.total_tokens() > 0
                    }
                };
                if !measurable {
                    return refuse(format!(
                        "a gate compares {metric_name} with examples in the prompt, and no validation row can be measured so: \
                         with {} examples before it none fits into the model's context, or the training rows have another \
                         shape; lower baselines.fewShot.examples",
                        validation.few_shot_examples
                    ));
                }
            }
            Baseline::Base => {}
        }
    }
    Ok(())
}

impl Planned {
    /// The plan as the report has it.
    pub fn report(&self) -> PlanReport {
        PlanReport {
            device: self.chosen.device_name.clone(),
            precision: format!("{:?}", self.chosen.kind),
            memory: self.estimate.memory,
            memory_available: self.memory.unwrap_or(0),
            measured_peak: 0,
            micro_batch_tokens: self.estimate.micro_batch_tokens,
            total_steps: self.schedule.total_steps,
            trainable_parameters: self.estimate.trainable_parameters,
            total_parameters: self.estimate.base_parameters,
            estimated_seconds: self.estimate.seconds,
            measured_seconds: 0.0,
        }
    }

    /// What was derived, and why.
    fn derived(&self, config: &RunConfig) -> Vec<Event> {
        let hyperparameters = &config.hyperparameters;
        let chosen = &self.chosen;
        let estimate = &self.estimate;
        let derived = |name, value: String, reason: String| Event::Derived { name, value, reason };
        let method = match &config.method {
            Method::LoRA { lora } | Method::QLoRA { lora, .. } => {
                format!("LoRA, rank {}, alpha {}", lora.rank, lora.alpha)
            }
            Method::Full { .. } => "full fine-tuning".to_owned(),
        };
        let share = 100.0 * estimate.trainable_parameters as f64 / estimate.base_parameters as f64;
        let mut events = vec![
            derived("device", chosen.device_name.clone(), chosen.device_reason.clone()),
            derived("precision", format!("{:?}", chosen.kind), chosen.kind_reason.clone()),
        ];
        if let Some((how, why)) = &self.attention {
            events.push(derived("attention", (*how).to_owned(), why.clone()));
        }
        events.extend([
            derived("threads", chosen.threads.to_string(), chosen.threads_reason.clone()),
            derived(
                "method",
                method,
                format!(
                    "{} of {} parameters trained, {share:.2} %",
                    estimate.trainable_parameters, estimate.base_parameters
                ),
            ),
            derived(
                "steps",
                self.schedule.total_steps.to_string(),
                format!(
                    "{} rows / {} examples a step = {} steps a pass; {:?}",
                    self.prepared.train.len(),
                    hyperparameters.batch_size,
                    self.order.steps_per_epoch(),
                    hyperparameters.duration
                ),
            ),
            derived(
                "learning rate",
                format!("{:e}", hyperparameters.learning_rate),
                format!("{:?} after {} warm-up steps", hyperparameters.scheduler, self.schedule.warmup_steps),
            ),
            derived(
                "micro-batch",
                format!("{} tokens", estimate.micro_batch_tokens),
                format!("backward pass recomputes: {:?}; the result does not depend on it", estimate.recompute),
            ),
        ]);
        if estimate.cache_tokens > 0 {
            let rows = format!("for {} rows to answer, as far as memory goes", self.prepared.generation.len());
            events.push(derived("caches of answers", format!("{} tokens", estimate.cache_tokens), rows));
        }
        if estimate.seconds > 0.0 {
            let seconds = crate::tell::display::display_duration(estimate.seconds);
            events.push(derived("estimated time", seconds, "from a measured matrix product".into()));
        }
        events.extend(chosen.warnings.iter().cloned().map(Event::Warning));
        events.push(Event::Plan(Box::new(self.report())));
        events
    }

    /// What `plan` prints: the configured method beside the other.
    pub fn describe(&self, config: &RunConfig) -> String {
        let cost = |seconds: f64| {
            config
                .resources
                .price_per_hour
                .map_or(String::new(), |price| format!(", cost {:.4}", seconds / 3600.0 * price))
        };
        let line = |name: &str, estimate: &Estimate| {
            format!(
                "{name:<6} {:>10} of memory{}, {:>9} trained parameters, about {} for {} steps{}",
                display_bytes(estimate.memory.total),
                if estimate.fits { "" } else { " (does not fit)" },
                estimate.trainable_parameters,
                crate::tell::display::display_duration(estimate.seconds),
                self.schedule.total_steps,
                cost(estimate.seconds)
            )
        };
        let (own, other) = match config.method {
            Method::Full { .. } => ("Full", "LoRA"),
            Method::LoRA { .. } | Method::QLoRA { .. } => ("LoRA", "Full"),
        };
        format!("{}\n{}", line(own, &self.estimate), line(other, &self.alternative))
    }
}
