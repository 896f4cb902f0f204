//! Where the time of a step goes: every operation beside what the machine could do. `finetune-trainer profile`.
//!
//! The roofline of an operation is the larger of its arithmetic at the machine's measured matrix-product rate and its
//! traffic at the measured memory bandwidth; both are measured here, in the same process, in what the run computes in, and for no
//! longer than a few seconds on the slowest machine.

mod cost;
mod lines;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crds::run::RunConfig;
use tch::{Device, Kind, Tensor};

pub use self::lines::Line;
use crate::compute::device::matmul_rate;
use crate::compute::shim;
use crate::data::pack::pack;
use crate::model::{Built, build};
use crate::run::{Context, Error, Place, loop_plan, model_source, plan_run};
use crate::tell::record::Observer;
use crate::train::train_step;

/// Steps before anything is measured: they fill caches of kernels and memory.
const WARM_STEPS: i64 = 2;
/// How often the step is timed without the profiler.
const TIMED_STEPS: i64 = 5;
/// Attempts of which the fastest counts, for what the machine can do, unless they take longer than [`PATIENCE`].
const ATTEMPTS: usize = 10;
/// What a measurement of the machine may take, its last attempt not counted.
const PATIENCE: Duration = Duration::from_secs(1);
/// Products that are measured together: on a GPU one takes less time than its launch.
const PRODUCTS: Duration = Duration::from_millis(100);
/// Rows and columns of the matrices that the peak is measured with.
const PEAK_SIZE: i64 = 2048;
/// Elements that are copied to measure the bandwidth: larger than any cache.
const COPIED: i64 = 1 << 27;
/// Lines of the table; the rest is one more.
const LINES: usize = 16;

/// What the machine can do.
#[derive(Clone, Copy, Debug)]
pub struct Peaks {
    /// FLOP/s of a large matrix product in fp32.
    pub fp32: f64,
    /// The same in bf16; `None` where the run does not compute in it.
    pub bf16: Option<f64>,
    /// Bytes read and written in a second.
    pub bandwidth: f64,
}

impl Peaks {
    /// Measures what a run in `kind` uses.
    fn measure(kind: Kind, device: Device) -> Self {
        let rate = |kind| {
            let attempt = || matmul_rate([PEAK_SIZE; 3], (kind, device), PRODUCTS);
            attempts(attempt).fold(0.0, f64::max)
        };
        let (from, mut to) =
            (Tensor::ones([COPIED], (Kind::Float, device)), Tensor::zeros([COPIED], (Kind::Float, device)));
        let copy = || {
            let started = Instant::now();
            to.copy_(&from);
            wait(device);
            2.0 * 4.0 * COPIED as f64 / started.elapsed().as_secs_f64()
        };
        let bandwidth = attempts(copy).fold(0.0, f64::max);
        Self { fp32: rate(Kind::Float), bf16: (kind == Kind::BFloat16).then(|| rate(kind)), bandwidth }
    }

    fn matmul(&self, kind: Kind) -> f64 {
        match kind {
            Kind::BFloat16 => self.bf16.unwrap_or(self.fp32),
            _ => self.fp32,
        }
    }
}

/// The results of several attempts.
fn attempts(mut attempt: impl FnMut() -> f64) -> impl Iterator<Item = f64> {
    let started = Instant::now();
    let mut count = 0;
    std::iter::from_fn(move || {
        let goes_on = count == 0 || count < ATTEMPTS && started.elapsed() < PATIENCE;
        count += 1;
        goes_on.then(&mut attempt)
    })
}

/// Waits until the device has done what it was asked for.
fn wait(device: Device) {
    if let Device::Cuda(index) = device {
        tch::Cuda::synchronize(index as i64);
    }
}

/// A profiled step.
#[derive(Debug)]
pub struct Profile {
    /// The machine.
    pub peaks: Peaks,
    /// Where the step ran.
    pub device: Device,
    /// Dtype of the activations.
    pub kind: Kind,
    /// Tokens of the step, and those that are trained.
    pub tokens: (usize, usize),
    /// Median seconds of the step without the profiler.
    pub seconds: f64,
    /// Seconds of the step under the profiler.
    pub profiled_seconds: f64,
    /// By operation and dtype.
    pub lines: BTreeMap<String, Line>,
    /// The Chrome trace.
    pub trace: PathBuf,
}

/// Trains a few steps from the base model and profiles one. Nothing is saved but the prepared rows and the trace.
pub fn profile(
    config: &RunConfig,
    context: &Context,
    trace: &Path,
    observer: &mut dyn Observer,
) -> Result<Profile, Error> {
    let planned = plan_run(config, context, Place::Here, observer)?;
    let device = planned.chosen.device;
    let Built { model, mut parameters } = build(&model_source(config, &planned))?;
    let plan = loop_plan(config, &planned);
    let micro_batches =
        |number: i64| pack(plan.examples, &plan.order.examples(number), planned.estimate.micro_batch_tokens);
    let mut step = |number: i64| -> Result<f64, Error> {
        let (micro_batches, constants) = (micro_batches(number), plan.step_config(number));
        let started = Instant::now();
        let stats = train_step(&model, &mut parameters, &micro_batches, &constants, context.stop);
        let stats = stats.map_err(|error| Error::Train(error.into()))?.ok_or(Error::Stopped { step: number })?;
        // Reading a number waits for the device.
        let _ = stats.loss.double_value(&[]);
        Ok(started.elapsed().as_secs_f64())
    };
    (0..WARM_STEPS).try_for_each(|number| step(number).map(drop))?;
    // The same step each time: its seconds, its tokens and its arithmetic are set against each other.
    let measured = WARM_STEPS;
    let mut times = (0..TIMED_STEPS).map(|_| step(measured)).collect::<Result<Vec<f64>, Error>>()?;
    times.sort_by(f64::total_cmp);
    let (profiled, operations) =
        shim::profile(device.is_cuda(), trace, || step(measured)).map_err(|error| Error::Train(error.into()))?;
    let profiled_seconds = profiled?;
    let batches = micro_batches(measured);
    let tokens =
        batches.iter().fold((0, 0), |(all, trained), batch| (all + batch.tokens.len(), trained + batch.labels.len()));
    let peaks = Peaks::measure(planned.chosen.kind, device);
    let lines = lines::lines(&operations, device.is_cuda(), &peaks);
    let seconds = times[times.len() / 2];
    Ok(Profile {
        peaks,
        device,
        kind: planned.chosen.kind,
        tokens,
        seconds,
        profiled_seconds,
        lines,
        trace: trace.to_path_buf(),
    })
}

impl Profile {
    /// Arithmetic of matrix products and attention over the step's time, as a share of the matrix-product rate.
    pub fn share_of_peak(&self) -> f64 {
        self.lines.values().map(|line| line.flops).sum::<f64>() / self.seconds / self.peaks.matmul(self.kind)
    }

    /// What the profiled step was beside its lines, and for how many seconds. On a device nothing ran there meanwhile: it waited
    /// for the host to launch something.
    pub fn rest(&self) -> (&'static str, f64) {
        let name = if self.device.is_cuda() { "launch gaps" } else { "outside of operations" };
        let seconds: f64 = self.lines.values().map(|line| line.seconds).sum();
        // The profiler's clock is not that of the step: where there is no rest, it may come out below zero.
        (name, (self.profiled_seconds - seconds).max(0.0))
    }
}

/// In percent; none of nothing.
fn percent(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { 100.0 * part / whole } else { 0.0 }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (tokens, trained) = self.tokens;
        writeln!(
            f,
            "a step of {tokens} tokens, {trained} of them trained: {:.1} ms, {:.0} tokens/s ({:.1} ms under the profiler)",
            self.seconds * 1e3,
            tokens as f64 / self.seconds,
            self.profiled_seconds * 1e3
        )?;
        let bf16 = self.peaks.bf16.map_or(String::new(), |rate| format!("{:.0} GFLOP/s in bf16, ", rate * 1e-9));
        writeln!(
            f,
            "this machine: matrix products {bf16}{:.0} GFLOP/s in fp32; memory {:.1} GB/s",
            self.peaks.fp32 * 1e-9,
            self.peaks.bandwidth * 1e-9
        )?;
        writeln!(
            f,
            "matrix products, and attention where it is libtorch's, over the whole step: {:.0} % of that rate",
            100.0 * self.share_of_peak()
        )?;
        writeln!(
            f,
            "\n{:<52} {:>6} {:>9} {:>6} {:>9} {:>8} {:>9}",
            "operation", "calls", "ms", "share", "GFLOP", "GB", "roofline"
        )?;
        let (rest, rest_seconds) = self.rest();
        let total = rest_seconds + self.lines.values().map(|line| line.seconds).sum::<f64>();
        let mut sorted: Vec<(&str, Line)> =
            self.lines.iter().map(|(name, line)| (name.as_str(), line.clone())).collect();
        sorted.sort_by(|a, b| b.1.seconds.total_cmp(&a.1.seconds));
        let mut others = Line::default();
        for (_, line) in sorted.split_off(LINES.min(sorted.len())) {
            others.calls += line.calls;
            others.seconds += line.seconds;
            others.flops += line.flops;
            others.bytes += line.bytes;
            others.bound += line.bound;
        }
        for (name, line) in sorted.iter().map(|(name, line)| (*name, line)).chain([("others", &others)]) {
            writeln!(
                f,
                // Names of kernels can have hundreds of letters.
                "{name:<52.60} {:>6} {:>9.1} {:>5.1}% {:>9.1} {:>8.2} {:>8.0}%",
                line.calls,
                line.seconds * 1e3,
                percent(line.seconds, total),
                line.flops * 1e-9,
                line.bytes * 1e-9,
                percent(line.bound, line.seconds)
            )?;
        }
        writeln!(f, "{rest:<52} {:>6} {:>9.1} {:>5.1}%", "", rest_seconds * 1e3, percent(rest_seconds, total))?;
        write!(
            f,
            "\nroofline: what the operation would take at the rates above, as a share of what it took. Chrome trace: {}",
            self.trace.display()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEAKS: Peaks = Peaks { fp32: 1e9, bf16: Some(2e9), bandwidth: 1e9 };

    /// A step of 100 ms, of `lines` with the milliseconds of each.
    fn profile(device: Device, lines: &[(&str, f64)]) -> Profile {
        let line = |seconds| Line { calls: 1, seconds, flops: 1e6, bytes: 1.0, bound: seconds / 2.0 };
        Profile {
            peaks: PEAKS,
            device,
            kind: Kind::BFloat16,
            tokens: (64, 60),
            seconds: 0.08,
            profiled_seconds: 0.1,
            lines: lines.iter().map(|(name, milliseconds)| ((*name).to_owned(), line(milliseconds * 1e-3))).collect(),
            trace: "trace.json".into(),
        }
    }

    /// The rows of the printed table: name, milliseconds, percent of the step.
    fn rows(profile: &Profile) -> Vec<(String, f64, f64)> {
        let row = |line: &str| {
            let (name, numbers) = line.split_once("  ").expect("a name and numbers");
            let mut numbers = numbers.split('%').next()?.split_whitespace().rev();
            let (percent, milliseconds) = (numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?);
            Some((name.to_owned(), milliseconds, percent))
        };
        let text = profile.to_string();
        let table = text.lines().skip_while(|line| !line.starts_with("operation ")).skip(1);
        table.take_while(|line| !line.is_empty()).map(|line| row(line).unwrap_or_else(|| panic!("{line}"))).collect()
    }

    #[test]
    fn the_rows_add_up_to_the_step() {
        let kernel = "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>(int)";
        let names: Vec<String> = (0..LINES).map(|number| format!("operation {number}")).collect();
        let mut many: Vec<(&str, f64)> = names.iter().map(|name| (name.as_str(), 3.0)).collect();
        many.extend([("mm bf16", 20.0), (kernel, 10.0)]);
        for (device, rest) in [(Device::Cuda(0), "launch gaps"), (Device::Cpu, "outside of operations")] {
            let profile = profile(device, &many);
            assert!((profile.share_of_peak() - 18.0 * 1e6 / 0.08 / 2e9).abs() < 1e-12);
            let rows = rows(&profile);
            assert_eq!(rows.len(), LINES + 2, "{rows:?}");
            assert_eq!(rows[0], ("mm bf16".into(), 20.0, 20.0));
            assert_eq!(rows[1], (kernel[..60].into(), 10.0, 10.0));
            assert_eq!(rows[LINES..], [("others".into(), 6.0, 6.0), (rest.into(), 22.0, 22.0)]);
            assert_eq!(rows.iter().map(|(_, milliseconds, _)| milliseconds).sum::<f64>(), 100.0);
            assert_eq!(rows.iter().map(|(_, _, percent)| percent).sum::<f64>(), 100.0);
        }
    }

    #[test]
    fn a_line_or_a_rest_without_time_has_no_share() {
        let rows = rows(&profile(Device::Cuda(0), &[("mm bf16", 125.0), ("Memset (Device)", 0.0)]));
        let expected =
            [("mm bf16", 125.0, 100.0), ("Memset (Device)", 0.0, 0.0), ("others", 0.0, 0.0), ("launch gaps", 0.0, 0.0)];
        assert_eq!(rows, expected.map(|(name, milliseconds, percent)| (name.to_owned(), milliseconds, percent)));
    }

    #[test]
    fn libtorch_tells_what_it_computes() {
        tch::set_num_threads(1);
        let folder = tempfile::tempdir().expect("writable");
        let trace = folder.path().join("trace.json");
        let (a, b) =
            (Tensor::ones([64, 32], (Kind::Float, Device::Cpu)), Tensor::ones([32, 16], (Kind::Float, Device::Cpu)));
        let (sum, operations) =
            shim::profile(false, &trace, || a.matmul(&b).sum(Kind::Float).double_value(&[])).expect("a profile");
        assert_eq!(sum, f64::from(64 * 16 * 32));
        assert!(operations.iter().all(|operation| !operation.on_device && operation.launched_by.is_none()));
        let lines = lines::lines(&operations, false, &PEAKS);
        assert_eq!(lines["mm fp32"].flops, f64::from(2 * 64 * 32 * 16), "{lines:?}");
        let text = std::fs::read_to_string(&trace).expect("a trace");
        let trace: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        assert!(trace["traceEvents"].as_array().is_some_and(|events| !events.is_empty()));
    }
}
