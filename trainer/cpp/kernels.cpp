// What the processor is asked, once.

#include "kernels.h"

#include <ATen/Version.h>

#include <string>

namespace {

constexpr const Kernel *ALL[] = {
#define ADDRESS(kernel, variants) &kernels::kernel,
    FOR_EACH_KERNEL(ADDRESS)
#undef ADDRESS
};

Instructions ask() {
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512bf16") ? Instructions::Avx512Bf16 : Instructions::Avx512;
#endif
  }
  return capability == "AVX2" ? Instructions::Avx2 : Instructions::Baseline;
}

// -1 where there is none.
int best(const Kernel &kernel) {
  int variant = static_cast<int>(instructions());
  while (variant >= 0 && (kernel.variants >> variant & 1u) == 0) {
    --variant;
  }
  return variant;
}

} // namespace

Instructions instructions() {
  static const Instructions found = ask();
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
