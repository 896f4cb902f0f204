//! Adds up what the profiler saw, by operation and dtype. No time counts twice, so that the lines and the time that none of them
//! has are the step.

use std::collections::BTreeMap;

use tch::Kind;

use super::Peaks;
use super::cost::{bytes, flops, tensors};
use crate::compute::shim::Operation;

/// All calls of one operation on one dtype; on a device, of those that launched something there.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Line {
    /// Number of them.
    pub calls: usize,
    /// Their own time, without that of what they called; on a device that of the kernels that they launched. In seconds.
    pub seconds: f64,
    /// Floating-point operations of matrix products and attention; other arithmetic is not counted.
    pub flops: f64,
    /// Bytes of the inputs and of one output of the size of the largest, at least.
    pub bytes: f64,
    /// Seconds at the roofline.
    pub bound: f64,
}

/// Adds up operations: where the step ran on a device by what it did there, otherwise by what the host did.
pub(super) fn lines(operations: &[Operation], on_device: bool, peaks: &Peaks) -> BTreeMap<String, Line> {
    let mut lines: BTreeMap<String, Line> = BTreeMap::new();
    for (operation, time) in if on_device { device_times(operations) } else { host_times(operations) } {
        let tensors = tensors(&operation.inputs);
        let kind = tensors
            .iter()
            .map(|(kind, _)| *kind)
            .find(|kind| matches!(kind, Kind::BFloat16 | Kind::Half | Kind::Float | Kind::Double));
        let name = operation.name.trim_start_matches("aten::");
        let key = kind.map_or_else(|| name.to_owned(), |kind| format!("{name} {}", short(kind)));
        let line = lines.entry(key).or_default();
        let (flops, bytes) = (flops(name, &tensors), bytes(name, &tensors));
        line.calls += 1;
        line.seconds += time as f64 * 1e-9;
        line.flops += flops;
        line.bytes += bytes;
        line.bound += (flops / peaks.matmul(kind.unwrap_or(Kind::Float))).max(bytes / peaks.bandwidth);
    }
    lines
}

/// Calls, and how long each took without what it called itself, ns.
fn host_times(operations: &[Operation]) -> Vec<(&Operation, u64)> {
    let mut calls: Vec<&Operation> = operations.iter().filter(|operation| !operation.on_device).collect();
    // The caller before what it calls, which begins with it or later.
    calls.sort_by_key(|call| (call.start, std::cmp::Reverse(call.duration)));
    let mut own: Vec<u64> = calls.iter().map(|call| call.duration).collect();
    let mut callers: Vec<usize> = Vec::new();
    for (index, call) in calls.iter().enumerate() {
        while callers.last().is_some_and(|&caller| calls[caller].start + calls[caller].duration <= call.start) {
            callers.pop();
        }
        if let Some(&caller) = callers.last() {
            own[caller] = own[caller].saturating_sub(call.duration);
        }
        callers.push(index);
    }
    calls.into_iter().zip(own).collect()
}

/// Calls that launched kernels, and kernels that no call launched; how long the device worked for each, ns. Where kernels
/// overlap, the time is that of the one that began first.
fn device_times(operations: &[Operation]) -> Vec<(&Operation, u64)> {
    let mut kernels: Vec<usize> = (0..operations.len()).filter(|&index| operations[index].on_device).collect();
    kernels.sort_by_key(|&index| operations[index].start);
    // By the call, which has one cost however many kernels it took.
    let mut times: BTreeMap<usize, u64> = BTreeMap::new();
    let mut busy_until = 0;
    for index in kernels {
        let (kernel, end) = (&operations[index], operations[index].start + operations[index].duration);
        let own = end.saturating_sub(kernel.start.max(busy_until));
        busy_until = busy_until.max(end);
        *times.entry(kernel.launched_by.unwrap_or(index)).or_default() += own;
    }
    times.into_iter().map(|(index, time)| (&operations[index], time)).collect()
}

const fn short(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "bf16",
        Kind::Half => "fp16",
        Kind::Double => "fp64",
        _ => "fp32",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEAKS: Peaks = Peaks { fp32: 1e9, bf16: Some(2e9), bandwidth: 1e9 };
    /// Of a product with 2 · 4 · 8 · 2 = 128 FLOP.
    const FACTORS: &str = "c10::BFloat16 4 8;c10::BFloat16 8 2";

    fn call(name: &str, start: u64, duration: u64, inputs: &str) -> Operation {
        Operation { name: name.into(), start, duration, on_device: false, launched_by: None, inputs: inputs.into() }
    }

    fn kernel(name: &str, start: u64, duration: u64, launched_by: Option<usize>) -> Operation {
        Operation { on_device: true, launched_by, ..call(name, start, duration, "") }
    }

    /// Calls and nanoseconds of each line.
    fn times(lines: &BTreeMap<String, Line>) -> Vec<(&str, usize, i64)> {
        lines.iter().map(|(name, line)| (name.as_str(), line.calls, (line.seconds * 1e9).round() as i64)).collect()
    }

    #[test]
    fn the_time_of_a_call_is_its_own() {
        let all = [
            call("aten::mm", 110, 50, FACTORS),
            call("aten::matmul", 100, 100, FACTORS),
            call("aten::add", 200, 30, "c10::BFloat16 4 2;c10::BFloat16 4 2;"),
            kernel("gemm", 120, 500, Some(0)),
        ];
        let lines = lines(&all, false, &PEAKS);
        assert_eq!(times(&lines), [("add bf16", 1, 30), ("matmul bf16", 1, 50), ("mm bf16", 1, 50)]);
        assert_eq!(lines["matmul bf16"].bytes, 0.0);
        let mm = &lines["mm bf16"];
        assert_eq!((mm.flops, mm.bytes), (128.0, 2.0 * (32.0 + 16.0 + 8.0)));
        assert!((mm.bound - 112e-9).abs() < 1e-15, "its traffic takes longer than its arithmetic: {mm:?}");
        assert_eq!(lines["add bf16"].bytes, 3.0 * 16.0);
    }

    #[test]
    fn kernels_are_put_down_to_the_call_that_launched_them() {
        // The host is done before the device begins.
        let all = [
            call("aten::matmul", 100, 30, FACTORS),
            call("aten::mm", 105, 20, FACTORS),
            call("cudaLaunchKernel", 110, 5, ""),
            call("aten::mm", 140, 20, FACTORS),
            call("aten::view", 170, 5, FACTORS),
            kernel("gemm_split_k", 1000, 40, Some(1)),
            kernel("reduce_split_k", 1040, 10, Some(1)),
            kernel("gemm", 1050, 30, Some(3)),
        ];
        let lines = lines(&all, true, &PEAKS);
        assert_eq!(times(&lines), [("mm bf16", 2, 80)]);
        let mm = &lines["mm bf16"];
        assert_eq!((mm.flops, mm.bytes), (2.0 * 128.0, 2.0 * 112.0), "of two calls, not of three kernels");
        assert!((mm.bound - 2.0 * 112e-9).abs() < 1e-15, "{mm:?}");
    }

    #[test]
    fn a_kernel_that_no_call_launched_has_its_own_name() {
        let all = [
            kernel("finetune_swiglu", 100, 20, None),
            kernel("finetune_swiglu", 120, 20, None),
            kernel("Memcpy HtoD (Pinned -> Device)", 200, 5, None),
        ];
        let lines = lines(&all, true, &PEAKS);
        assert_eq!(times(&lines), [("Memcpy HtoD (Pinned -> Device)", 1, 5), ("finetune_swiglu", 2, 40)]);
        assert!(lines.values().all(|line| (line.flops, line.bytes, line.bound) == (0.0, 0.0, 0.0)), "{lines:?}");
    }

    #[test]
    fn time_in_which_kernels_overlap_counts_once() {
        let all = [
            call("aten::mm", 0, 10, FACTORS),
            call("aten::copy_", 10, 10, "c10::BFloat16 4 2;c10::BFloat16 4 2"),
            // Told out of order: from 100 to 200, within it, beyond it, and after a gap of 50.
            kernel("elementwise", 300, 10, Some(1)),
            kernel("Memcpy DtoD", 150, 100, Some(1)),
            kernel("gemm", 100, 100, Some(0)),
            kernel("Memset (Device)", 120, 20, None),
        ];
        assert_eq!(
            times(&lines(&all, true, &PEAKS)),
            [("Memset (Device)", 1, 0), ("copy_ bf16", 1, 60), ("mm bf16", 1, 100)]
        );
    }
}
