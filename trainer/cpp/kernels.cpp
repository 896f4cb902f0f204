// What the processor is asked, once.

#include "kernels.h"

#include <ATen/Version.h>

#include <algorithm>
#include <iterator>
#include <string>

namespace {

constexpr const Kernel *ALL[] = {
#define ADDRESS(kernel, variants) &kernels::kernel,
    FOR_EACH_KERNEL(ADDRESS)
#undef ADDRESS
};

Instructions ask_processor() {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    return Instructions::Baseline;
  }
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq")) {
    return Instructions::Avx2;
  }
  return __builtin_cpu_supports("avx512bf16") ? Instructions::Avx512Bf16 : Instructions::Avx512;
#else
  return Instructions::Baseline;
#endif
}

// What libtorch's own kernels may use.
Instructions ask_libtorch() {
  const std::string capability = at::get_cpu_capability();
  // It has no word for products of bf16, which come with this one.
  return capability == "AVX512" ? Instructions::Avx512Bf16 : capability == "AVX2" ? Instructions::Avx2 : Instructions::Baseline;
}

// Of the kernels that this thread enters: for tests, which run each variant.
thread_local Instructions most = Instructions::Avx512Bf16;

// -1 where there is none.
int best(const Kernel &kernel) {
  int variant = static_cast<int>(std::min(instructions(), most));
  while (variant >= 0 && (kernel.variants >> variant & 1u) == 0) {
    --variant;
  }
  return variant;
}

} // namespace

Instructions instructions() {
  static const Instructions found = std::min(ask_processor(), ask_libtorch());
  return found;
}

Instructions chosen(const Kernel &kernel) {
  const int variant = best(kernel);
  TORCH_CHECK(variant >= 0, kernel.name, " has no variant for the instructions that this processor has, or that "
              "ATEN_CPU_CAPABILITY lets it use");
  return static_cast<Instructions>(variant);
}

extern "C" {

int ft_cpu_instructions() { return static_cast<int>(instructions()); }

// What the processor has, whatever may be used of it.
int ft_cpu_processor() { return static_cast<int>(ask_processor()); }

// Lets this thread enter no variant for more than these instructions.
void ft_cpu_limit(int instructions) { most = static_cast<Instructions>(instructions); }

// Whether libtorch's products in bf16 use AMX here.
int ft_cpu_has_tiles() {
#if defined(__x86_64__)
  return instructions() >= Instructions::Avx512 && __builtin_cpu_supports("amx-bf16") != 0;
#else
  return 0;
#endif
}

// The kernel at a place of the table: its name, and the variant that runs here or -1. Null behind the last.
const char *ft_cpu_kernel(int index, int *variant) {
  if (index < 0 || index >= static_cast<int>(std::size(ALL))) {
    return nullptr;
  }
  *variant = best(*ALL[index]);
  return ALL[index]->name;
}
}
