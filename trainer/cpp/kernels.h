// Every kernel of ours on the CPU, what it is compiled for, and which of its variants runs on this processor. A function that is
// compiled for instructions beyond the baseline is reached through an entry that `recorded` guards, and so only where the
// processor has them.

#pragma once

#include <ATen/ATen.h>
#include <ATen/record_function.h>

#include <vector>

#include "guard.h"

// What code may be compiled for, each with all before it. Avx2 and Avx512 are what libtorch means by these words.
enum class Instructions : int { Baseline, Avx2, Avx512, Avx512Bf16 };

#if defined(__x86_64__)
// Marks a function that is compiled for a set of instructions.
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define AVX512_BF16 __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#endif

constexpr unsigned bit(Instructions instructions) { return 1u << static_cast<int>(instructions); }

struct Kernel {
  const char *name;
  // The sets of instructions that there is a variant for, as bits.
  unsigned variants;
};

// Kernel, and its variants.
#define FOR_EACH_KERNEL(kernel)                                                                                                  \
  kernel(attention, bit(Instructions::Avx512Bf16))                                                                               \
  kernel(attention_backward, bit(Instructions::Avx512Bf16))                                                                      \
  kernel(swiglu, bit(Instructions::Avx512Bf16))                                                                                  \
  kernel(swiglu_backward, bit(Instructions::Avx512Bf16))                                                                         \
  kernel(rms_norm, bit(Instructions::Avx512Bf16))                                                                                \
  kernel(rms_norm_backward, bit(Instructions::Avx512Bf16))                                                                       \
  kernel(rotate, bit(Instructions::Avx512Bf16))                                                                                  \
  kernel(cross_entropy, bit(Instructions::Avx512Bf16))                                                                           \
  kernel(linear, bit(Instructions::Avx512Bf16))                                                                                  \
  kernel(cached_attention, bit(Instructions::Avx512Bf16))                                                                        \
  kernel(argmax, bit(Instructions::Avx512Bf16))                                                                                  \
  kernel(score, bit(Instructions::Avx512Bf16))                                                                                   \
  kernel(adamw_8bit, bit(Instructions::Avx512) | bit(Instructions::Avx2) | bit(Instructions::Baseline))                          \
  kernel(dropout, bit(Instructions::Avx512) | bit(Instructions::Baseline))

namespace kernels {
#define DECLARE(kernel, variants) inline constexpr Kernel kernel{"finetune::" #kernel, variants};
FOR_EACH_KERNEL(DECLARE)
#undef DECLARE
} // namespace kernels

// What this processor has, as far as libtorch's own variable ATEN_CPU_CAPABILITY lets kernels use it: libtorch believes the
// variable and asks the processor only where it is not set.
Instructions instructions();

// The variant of a kernel that runs here: the last that the processor can run. Throws where there is none.
Instructions chosen(const Kernel &kernel);

// Runs body(variant); the profiler shows it by the kernel's name, with the shapes of its inputs.
template <typename F> int recorded(const Kernel &kernel, c10::ArrayRef<void *> inputs, F body) {
  return guarded([&] {
    const Instructions variant = chosen(kernel);
    std::vector<c10::IValue> values;
    for (void *input : inputs) {
      values.emplace_back(tensor(input));
    }
    RECORD_FUNCTION(kernel.name, c10::ArrayRef<const c10::IValue>(values.data(), values.size()));
    body(variant);
  });
}
