// AdamW with its moments in 8 bits, one pass over the data: each block's codes become numbers, the block is updated, its numbers
// become codes again. Codes and scales have the bits of what optim/blockwise.rs writes out in torch operations; that is why this
// file is compiled without contraction of products and sums.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "guard.h"

#if defined(__x86_64__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif

namespace {

constexpr int64_t BLOCK = 256;
// Buckets are the upper half of a number's bits: KEYS of them from FIRST_KEY, 2^-23, to 1, for each sign.
constexpr int32_t FIRST_KEY = (127 - 23) << 7, KEYS = (127 << 7) - FIRST_KEY + 1;
constexpr float SMALLEST_SCALE = 1e-12f;

// Codes 0 to 255 stand for the values, which ascend. A number belongs to the highest code whose threshold it reaches; the
// threshold between a code and the next stands at the code. A bucket holds the code of its lowest number.
struct Codec {
  const float *values, *thresholds;
  const uint8_t *buckets;
};

struct Moment {
  uint8_t *codes;
  float *scales;
  Codec codec;
};

struct Constants {
  float decay, one_minus_beta1, one_minus_beta2, eps, step_size, root;
};

CLONES void decode(const uint8_t *codes, float scale, const float *values, float *out, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    out[i] = values[codes[i]] * scale;
  }
}

CLONES void update(float *parameter, const float *gradient, float *exp_avg, float *exp_avg_sq, int64_t count,
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

CLONES float largest(const float *numbers, int64_t count) {
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

CLONES void encode(const float *numbers, float scale, Codec codec, uint8_t *codes, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    const float number = numbers[i] / scale;
    uint32_t bits;
    std::memcpy(&bits, &number, 4);
    const int32_t key = std::clamp(static_cast<int32_t>((bits & 0x7fffffff) >> 16) - FIRST_KEY, 0, KEYS - 1);
    const uint8_t code = codec.buckets[key + static_cast<int32_t>(bits >> 31) * KEYS];
    codes[i] = code + (number >= codec.thresholds[code]);
  }
}

void update_blocks(float *parameter, const float *gradient, Moment exp_avg, Moment exp_avg_sq, int64_t count,
                   const Constants &constants) {
  float m[BLOCK], v[BLOCK];
  for (int64_t start = 0, block = 0; start < count; start += BLOCK, block++) {
    const int64_t length = std::min(BLOCK, count - start);
    decode(exp_avg.codes + start, exp_avg.scales[block], exp_avg.codec.values, m, length);
    decode(exp_avg_sq.codes + start, exp_avg_sq.scales[block], exp_avg_sq.codec.values, v, length);
    update(parameter + start, gradient + start, m, v, length, constants);
    exp_avg.scales[block] = largest(m, length);
    exp_avg_sq.scales[block] = largest(v, length);
    encode(m, exp_avg.scales[block], exp_avg.codec, exp_avg.codes + start, length);
    encode(v, exp_avg_sq.scales[block], exp_avg_sq.codec, exp_avg_sq.codes + start, length);
  }
}

template <typename T> T *data(void *handle, at::ScalarType type, int64_t count, const char *name) {
  const at::Tensor &held = tensor(handle);
  TORCH_CHECK(held.scalar_type() == type && held.is_contiguous() && held.device().is_cpu() && held.numel() == count, name,
              " must be a contiguous ", type, " tensor of ", count, " elements on the CPU");
  return static_cast<T *>(held.data_ptr());
}

Codec codec(void *values, void *thresholds, void *buckets) {
  return {data<float>(values, at::kFloat, 256, "values"), data<float>(thresholds, at::kFloat, 256, "thresholds"),
          data<uint8_t>(buckets, at::kByte, 2 * KEYS, "buckets")};
}

} // namespace

extern "C" {

// One step over a range that begins with a block. `rates` has step size and root of the second bias correction, fp32. Where
// `found_inf` (fp32 scalar) is 1 nothing moves. A moment is its codes, its scales, and the codec's three tables.
int ft_cpu_adamw_8bit(void *parameter, void *gradient, void *const *exp_avg, void *const *exp_avg_sq, void *rates,
                      void *found_inf, double decay, double one_minus_beta1, double one_minus_beta2, double eps) {
  return recorded("finetune::adamw_8bit", {parameter, gradient}, [&] {
    if (*data<float>(found_inf, at::kFloat, 1, "found_inf") != 0.0f) {
      return;
    }
    const int64_t count = tensor(parameter).numel(), blocks = (count + BLOCK - 1) / BLOCK;
    auto *p = data<float>(parameter, at::kFloat, count, "parameter");
    const auto *g = data<float>(gradient, at::kFloat, count, "gradient");
    const auto moment = [&](void *const *parts) {
      return Moment{data<uint8_t>(parts[0], at::kByte, count, "codes"), data<float>(parts[1], at::kFloat, blocks, "scales"),
                    codec(parts[2], parts[3], parts[4])};
    };
    const Moment m = moment(exp_avg), v = moment(exp_avg_sq);
    const float *rate = data<float>(rates, at::kFloat, 2, "rates");
    const Constants constants{static_cast<float>(decay),           static_cast<float>(one_minus_beta1),
                              static_cast<float>(one_minus_beta2), static_cast<float>(eps), rate[0], rate[1]};
    at::parallel_for(0, blocks, 64, [&](int64_t first, int64_t last) {
      const int64_t start = first * BLOCK, length = std::min(count, last * BLOCK) - start;
      const auto from = [&](const Moment &whole) {
        return Moment{whole.codes + start, whole.scales + first, whole.codec};
      };
      update_blocks(p + start, g + start, from(m), from(v), length, constants);
    });
  });
}
}
