// What the kernels for CPUs with AVX512-BF16 share. Only functions marked AVX512 use these instructions: they are called where
// ft_cpu_kernels_are_supported says so.

#pragma once

#include <immintrin.h>

#include <cstdint>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define INLINE AVX512 inline __attribute__((always_inline))

// fp32 numbers of a vector.
constexpr int64_t LANES = 16;

// e^x for x that is not NaN; within 2 ulp.
INLINE __m512 exponential(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 sum = _mm512_set1_ps(1.0f / 720);
  for (float coefficient : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(coefficient));
  }
  return _mm512_scalef_ps(sum, n);
}

INLINE void store_bf16(uint16_t *to, __m512 values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), (__m256i)_mm512_cvtneps_pbh(values));
}

INLINE __m512 load_bf16(const uint16_t *from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
