// What tch's generated bindings leave out. Every entry is guarded (guard.h).
// Tensors are passed as `at::Tensor*`; the caller keeps ownership of inputs and takes ownership of outputs.

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/Parallel.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/_fused_adamw.h>

#include <torch/headeronly/version.h>

#include "guard.h"

#include <string>

namespace {
thread_local std::string last_error;
} // namespace

extern "C" {

const char *ft_last_error() { return last_error.c_str(); }

void ft_set_error(const char *message) {
  last_error = message;
  // libtorch appends a stack trace after the first line.
  last_error = last_error.substr(0, last_error.find('\n'));
}

// One AdamW step over flat buffers. `step` is an fp32 scalar tensor that already counts this step; where `found_inf`
// (fp32 scalar) is 1 nothing moves.
int ft_fused_adamw(void *parameter, void *gradient, void *exp_avg, void *exp_avg_sq, void *step, double learning_rate,
                   double beta1, double beta2, double weight_decay, double eps, void *found_inf) {
  return guarded([&] {
    at::Tensor p[] = {tensor(parameter)}, g[] = {tensor(gradient)}, m[] = {tensor(exp_avg)}, v[] = {tensor(exp_avg_sq)},
               s[] = {tensor(step)};
    at::_fused_adamw_(p, g, m, v, {}, s, learning_rate, beta1, beta2, weight_decay, eps, /*amsgrad=*/false,
                      /*maximize=*/false, /*grad_scale=*/{}, tensor(found_inf));
  });
}

// Variable-length causal flash attention on CUDA: q [t, heads, d], k and v [t, kv_heads, d], cu_seqlens int32 [n + 1].
int ft_flash_attention(void *q, void *k, void *v, void *cu_seqlens, int64_t max_length, double scale, void **out,
                       void **logsumexp, void **rng_state, void **unused) {
  return guarded([&] {
    auto result = at::_flash_attention_forward(tensor(q), tensor(k), tensor(v), tensor(cu_seqlens), tensor(cu_seqlens),
                                               max_length, max_length, /*dropout_p=*/0.0, /*is_causal=*/true,
                                               /*return_debug_mask=*/false, scale);
    *out = new at::Tensor(std::get<0>(result));
    *logsumexp = new at::Tensor(std::get<1>(result));
    *rng_state = new at::Tensor(std::get<2>(result));
    *unused = new at::Tensor(std::get<3>(result));
  });
}

// A copy of a CPU tensor on a CUDA device. It goes through pinned memory, which the allocator keeps until the copy is done, so
// the host does not wait.
int ft_upload(void *host, int device, void **out) {
  return guarded([&] {
    const at::Device target(at::kCUDA, static_cast<c10::DeviceIndex>(device));
    *out = new at::Tensor(tensor(host).pin_memory().to(target, /*non_blocking=*/true));
  });
}

const char *ft_libtorch_version() { return TORCH_VERSION; }

// Bytes of memory of an accelerator, free or not.
int ft_device_total_bytes(int device, int64_t *bytes) {
  return guarded([&] { *bytes = static_cast<int64_t>(at::accelerator::getMemoryInfo(device).second); });
}

int ft_set_deterministic() {
  return guarded([] {
    at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/false);
    // Else every output that is about to be written is filled with NaN first: one more pass over memory.
    at::globalContext().setDeterministicFillUninitializedMemory(false);
  });
}

// Peak bytes allocated on an accelerator since the process began.
int ft_device_peak_bytes(int device, int64_t *bytes) {
  return guarded([&] { *bytes = at::accelerator::getDeviceStats(device).allocated_bytes[0].peak; });
}
}
