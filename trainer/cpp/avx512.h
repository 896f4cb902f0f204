// What the kernels for CPUs with AVX512-BF16 share, in bf16 and fp32. Only functions marked AVX512_BF16 use these instructions, and
// they are called by entries of kernels.h only.

#pragma once

#include <ATen/ATen.h>

#include <immintrin.h>

#include <cstdint>

#include "kernels.h"

#define INLINE AVX512_BF16 inline __attribute__((always_inline))

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

// A dtype as the kernels take it: elements in memory, and words of 32 bits whose elements are multiplied together.
struct Bf16 {
  using Element = uint16_t;
  static constexpr int64_t PER_WORD = 2;
  static constexpr auto KIND = at::kBFloat16;

  static INLINE __m512 load(const Element *from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static INLINE void store(Element *to, __m512 values) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), (__m256i)_mm512_cvtneps_pbh(values));
  }
  static INLINE __m512 rounded(__m512 values) {
    const __m256i bits = (__m256i)_mm512_cvtneps_pbh(values);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static INLINE __m512 multiply_add(__m512 sum, uint32_t word, __m512i words) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(word)), (__m512bh)words);
  }
  static INLINE __m256 multiply_add(__m256 sum, uint32_t word, __m256i words) {
    return _mm256_dpbf16_ps(sum, (__m256bh)_mm256_set1_epi32(static_cast<int>(word)), (__m256bh)words);
  }
};

struct Fp32 {
  using Element = float;
  static constexpr int64_t PER_WORD = 1;
  static constexpr auto KIND = at::kFloat;

  static INLINE __m512 load(const Element *from) { return _mm512_loadu_ps(from); }
  static INLINE void store(Element *to, __m512 values) { _mm512_storeu_ps(to, values); }
  static INLINE __m512 rounded(__m512 values) { return values; }
  static INLINE __m512 multiply_add(__m512 sum, uint32_t word, __m512i words) {
    const __m512 one = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(word)));
    return _mm512_fmadd_ps(one, _mm512_castsi512_ps(words), sum);
  }
  static INLINE __m256 multiply_add(__m256 sum, uint32_t word, __m256i words) {
    const __m256 one = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(word)));
    return _mm256_fmadd_ps(one, _mm256_castsi256_ps(words), sum);
  }
};

template <typename D> using Element = typename D::Element;

// A contiguous tensor as rows of its last dimension, a multiple of 16 wide.
template <typename D> struct Matrix {
  Element<D> *data;
  at::IntArrayRef shape;
  int64_t columns, rows;

  Matrix(void *handle, const char *name) : Matrix(handle, name, tensor(handle).sizes()) {}
  Matrix(void *handle, const char *name, at::IntArrayRef expected)
      : data(elements<Element<D>>(handle, name, D::KIND, expected)), shape(tensor(handle).sizes()), columns(shape.back()) {
    TORCH_CHECK(columns > 0 && columns % LANES == 0, name, " must be a multiple of 16 wide, found ", shape);
    rows = tensor(handle).numel() / columns;
  }
  Element<D> *row(int64_t index) const { return data + index * columns; }
};

// Runs body(Bf16{}) or body(Fp32{}), as the first of its inputs is.
template <typename F> int recorded_by_dtype(const Kernel &kernel, c10::ArrayRef<void *> inputs, F body) {
  return recorded(kernel, inputs, [&](Instructions variant) {
    TORCH_INTERNAL_ASSERT(variant == Instructions::Avx512Bf16, kernel.name, " has no other variant");
    if (tensor(inputs.front()).scalar_type() == at::kBFloat16) {
      body(Bf16{});
    } else {
      body(Fp32{});
    }
  });
}
