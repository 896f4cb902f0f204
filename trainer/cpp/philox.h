// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): four random words that are a function of a
// counter and a key alone. CPU and CUDA kernels are compiled from this one text; src/dropout.rs says what is counted.

#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PHILOX __device__ inline
#else
// Part of its caller, and compiled for the caller's instructions.
#define PHILOX inline __attribute__((always_inline))
#endif

namespace philox {

struct Words {
  uint32_t a, b, c, d;
};

// A recursion, because a loop over counters becomes one over vectors of them only where no loop is inside.
template <int ROUNDS> PHILOX Words rounds(Words counter, uint32_t low, uint32_t high) {
  const uint64_t first = static_cast<uint64_t>(0xD2511F53u) * counter.a;
  const uint64_t second = static_cast<uint64_t>(0xCD9E8D57u) * counter.c;
  const Words mixed{static_cast<uint32_t>(second >> 32) ^ counter.b ^ low, static_cast<uint32_t>(second),
                    static_cast<uint32_t>(first >> 32) ^ counter.d ^ high, static_cast<uint32_t>(first)};
  if constexpr (ROUNDS == 1) {
    return mixed;
  } else {
    return rounds<ROUNDS - 1>(mixed, low + 0x9E3779B9u, high + 0xBB67AE85u);
  }
}

PHILOX Words words(Words counter, uint64_t key) {
  return rounds<10>(counter, static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
}

} // namespace philox

#undef PHILOX
