// AdamW with its moments in 8 bits, one pass over the data: each block's codes become numbers, the block is updated, its numbers
// become codes again. Codes and scales have the bits of what optim/blockwise.rs writes out in torch operations; that is why this
// file is compiled without contraction of products and sums.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Compiled for the instructions of the variant that it becomes part of.
#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int64_t BLOCK = 256;
constexpr float SMALLEST_SCALE = 1e-12f;

// Codes 0 to 255 stand for the values, which ascend. A number belongs to the highest code whose threshold it reaches. Thresholds
// stand in a tree, from its root at 1: below node n are 2 n and 2 n + 1, for numbers under the threshold of n and for the others.
struct Codec {
  const float *values, *tree;
};

struct Moment {
  uint8_t *codes;
  float *scales;
  Codec codec;
};

struct Constants {
  float decay, one_minus_beta1, one_minus_beta2, eps, step_size, root;
};

struct OneByOne {
  static INLINE void decode(const uint8_t *codes, float scale, const float *values, float *out, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
      out[i] = values[codes[i]] * scale;
    }
  }
  static INLINE void encode(const float *numbers, float scale, const float *tree, uint8_t *codes, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
      const float number = numbers[i] / scale;
      int32_t node = 1;
      while (node < 256) {
        node = 2 * node + (number >= tree[node]);
      }
      codes[i] = static_cast<uint8_t>(node - 256);
    }
  }
};

#if defined(__x86_64__)
// table[index] of a table of 2^BITS numbers, which lies in registers: a gather would read them one by one.
template <int BITS> AVX512 INLINE __m512 look_up(const float *table, __m512i index) {
  if constexpr (BITS <= 4) {
    return _mm512_permutexvar_ps(index, _mm512_loadu_ps(table));
  } else if constexpr (BITS == 5) {
    return _mm512_permutex2var_ps(_mm512_loadu_ps(table), index, _mm512_loadu_ps(table + 16));
  } else {
    constexpr int HALF = 1 << (BITS - 1);
    const __mmask16 upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(HALF));
    return _mm512_mask_blend_ps(upper, look_up<BITS - 1>(table, index), look_up<BITS - 1>(table + HALF, index));
  }
}

// From a node's place in its level of the tree to that of the leaf below it.
template <int LEVEL> AVX512 INLINE __m512i descend(__m512 numbers, const float *tree, __m512i place) {
  if constexpr (LEVEL == 8) {
    return place;
  } else {
    const __mmask16 reached = _mm512_cmp_ps_mask(numbers, look_up<LEVEL>(tree + (1 << LEVEL), place), _CMP_GE_OQ);
    const __m512i left = _mm512_add_epi32(place, place);
    return descend<LEVEL + 1>(numbers, tree, _mm512_mask_add_epi32(left, reached, left, _mm512_set1_epi32(1)));
  }
}

// Whole vectors, and what is left one by one.
struct InVectors {
  static AVX512 void decode(const uint8_t *codes, float scale, const float *values, float *out, int64_t count) {
    const int64_t whole = count - count % 16;
    for (int64_t i = 0; i < whole; i += 16) {
      const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(codes + i)));
      _mm512_storeu_ps(out + i, _mm512_mul_ps(look_up<8>(values, index), _mm512_set1_ps(scale)));
    }
    OneByOne::decode(codes + whole, scale, values, out + whole, count - whole);
  }
  static AVX512 void encode(const float *numbers, float scale, const float *tree, uint8_t *codes, int64_t count) {
    const int64_t whole = count - count % 16;
    for (int64_t i = 0; i < whole; i += 16) {
      const __m512 number = _mm512_div_ps(_mm512_loadu_ps(numbers + i), _mm512_set1_ps(scale));
      const __m512i code = descend<0>(number, tree, _mm512_setzero_si512());
      _mm_storeu_si128(reinterpret_cast<__m128i *>(codes + i), _mm512_cvtepi32_epi8(code));
    }
    OneByOne::encode(numbers + whole, scale, tree, codes + whole, count - whole);
  }
};
#endif

INLINE void update(float *parameter, const float *gradient, float *exp_avg, float *exp_avg_sq, int64_t count,
                   const Constants c) {
  for (int64_t i = 0; i < count; i++) {
    const float g = gradient[i];
    const float m = exp_avg[i] + (g - exp_avg[i]) * c.one_minus_beta1;
    const float v = exp_avg_sq[i] + (g * g - exp_avg_sq[i]) * c.one_minus_beta2;
    parameter[i] = parameter[i] * c.decay - m * c.step_size / (std::sqrt(v) / c.root + c.eps);
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
  }
}

INLINE float largest(const float *numbers, int64_t count) {
  // Numbers without a sign order as their bits do.
  int32_t largest = 0;
  for (int64_t i = 0; i < count; i++) {
    int32_t bits;
    std::memcpy(&bits, numbers + i, 4);
    largest = std::max(largest, bits & 0x7fffffff);
  }
  float result;
  std::memcpy(&result, &largest, 4);
  return std::max(result, SMALLEST_SCALE);
}

template <typename Coder>
INLINE void update_blocks(float *parameter, const float *gradient, Moment exp_avg, Moment exp_avg_sq, int64_t count,
                          const Constants constants) {
  float m[BLOCK], v[BLOCK];
  for (int64_t start = 0, block = 0; start < count; start += BLOCK, block++) {
    const int64_t length = std::min(BLOCK, count - start);
    Coder::decode(exp_avg.codes + start, exp_avg.scales[block], exp_avg.codec.values, m, length);
    Coder::decode(exp_avg_sq.codes + start, exp_avg_sq.scales[block], exp_avg_sq.codec.values, v, length);
    update(parameter + start, gradient + start, m, v, length, constants);
    exp_avg.scales[block] = largest(m, length);
    exp_avg_sq.scales[block] = largest(v, length);
    Coder::encode(m, exp_avg.scales[block], exp_avg.codec.tree, exp_avg.codes + start, length);
    Coder::encode(v, exp_avg_sq.scales[block], exp_avg_sq.codec.tree, exp_avg_sq.codes + start, length);
  }
}

using UpdateBlocks = void(float *, const float *, Moment, Moment, int64_t, const Constants &);

void update_blocks_baseline(float *parameter, const float *gradient, Moment exp_avg, Moment exp_avg_sq, int64_t count,
                            const Constants &constants) {
  update_blocks<OneByOne>(parameter, gradient, exp_avg, exp_avg_sq, count, constants);
}

#if defined(__x86_64__)
AVX2 void update_blocks_avx2(float *parameter, const float *gradient, Moment exp_avg, Moment exp_avg_sq, int64_t count,
                             const Constants &constants) {
  update_blocks<OneByOne>(parameter, gradient, exp_avg, exp_avg_sq, count, constants);
}

AVX512 void update_blocks_avx512(float *parameter, const float *gradient, Moment exp_avg, Moment exp_avg_sq, int64_t count,
                                 const Constants &constants) {
  update_blocks<InVectors>(parameter, gradient, exp_avg, exp_avg_sq, count, constants);
}
#endif

UpdateBlocks *variant_for(Instructions instructions) {
  switch (instructions) {
#if defined(__x86_64__)
  case Instructions::Avx512: return update_blocks_avx512;
  case Instructions::Avx2: return update_blocks_avx2;
#endif
  case Instructions::Baseline: return update_blocks_baseline;
  default: TORCH_INTERNAL_ASSERT(false, "the table has a variant of adamw_8bit that is not here");
  }
}

Codec codec(void *values, void *tree) {
  return {elements<float>(values, "values", at::kFloat, {256}), elements<float>(tree, "tree", at::kFloat, {256})};
}

} // namespace

extern "C" {

// One step over a range that begins with a block. `rates` has step size and root of the second bias correction, fp32. Where
// `found_inf` (fp32 scalar) is 1 nothing moves. A moment is its codes, its scales, and the codec's two tables.
int ft_cpu_adamw_8bit(void *parameter, void *gradient, void *const *exp_avg, void *const *exp_avg_sq, void *rates,
                      void *found_inf, double decay, double one_minus_beta1, double one_minus_beta2, double eps) {
  return recorded(kernels::adamw_8bit, {parameter, gradient}, [&](Instructions variant) {
    UpdateBlocks *const update = variant_for(variant);
    if (*elements<float>(found_inf, "found_inf", at::kFloat, {}) != 0.0f) {
      return;
    }
    const int64_t count = tensor(parameter).numel(), blocks = (count + BLOCK - 1) / BLOCK;
    auto *p = elements<float>(parameter, "parameter", at::kFloat, {count});
    const auto *g = elements<float>(gradient, "gradient", at::kFloat, {count});
    const auto moment = [&](void *const *parts) {
      return Moment{elements<uint8_t>(parts[0], "codes", at::kByte, {count}),
                    elements<float>(parts[1], "scales", at::kFloat, {blocks}), codec(parts[2], parts[3])};
    };
    const Moment m = moment(exp_avg), v = moment(exp_avg_sq);
    const float *rate = elements<float>(rates, "rates", at::kFloat, {2});
    const Constants constants{static_cast<float>(decay),           static_cast<float>(one_minus_beta1),
                              static_cast<float>(one_minus_beta2), static_cast<float>(eps), rate[0], rate[1]};
    at::parallel_for(0, blocks, 64, [&](int64_t first, int64_t last) {
      const int64_t start = first * BLOCK, length = std::min(count, last * BLOCK) - start;
      const auto from = [&](const Moment &whole) {
        return Moment{whole.codes + start, whole.scales + first, whole.codec};
      };
      update(p + start, g + start, from(m), from(v), length, constants);
    });
  });
}
}
