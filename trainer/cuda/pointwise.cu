// The pointwise parts of a decoder layer and the loss, fused, in bf16 on CUDA: each reads its inputs and writes its outputs
// once, or comes back to a row that is still in the cache. Arithmetic is fp32, and rounded to bf16 where cpp/pointwise.cpp
// rounds, so that both devices compute the same thing. Masks of dropout are in bf16 or fp32, and have the same bits on both.
//
// Tensors are contiguous and begin at multiples of 16 bytes. Blocks are a whole number of warps of 32 threads; sums are taken
// in an order that only the block's size decides, so they have the same bits in every run.

#include <cuda_bf16.h>

#include <cfloat>
#include <cstdint>

#include "../cpp/philox.h"

namespace {

using bf16 = __nv_bfloat16;

// Elements of one load or store, 16 bytes.
constexpr int LANES = 8;
constexpr int WARP = 32;

struct Lanes {
  float at[LANES];
};

__device__ inline Lanes load(const bf16 *from) {
  const uint4 bits = *reinterpret_cast<const uint4 *>(from);
  const auto *pairs = reinterpret_cast<const __nv_bfloat162 *>(&bits);
  Lanes values;
  for (int pair = 0; pair < LANES / 2; ++pair) {
    const float2 wide = __bfloat1622float2(pairs[pair]);
    values.at[2 * pair] = wide.x;
    values.at[2 * pair + 1] = wide.y;
  }
  return values;
}

__device__ inline void store(bf16 *to, const Lanes &values) {
  uint4 bits;
  auto *pairs = reinterpret_cast<__nv_bfloat162 *>(&bits);
  for (int pair = 0; pair < LANES / 2; ++pair) {
    pairs[pair] = __floats2bfloat162_rn(values.at[2 * pair], values.at[2 * pair + 1]);
  }
  *reinterpret_cast<uint4 *>(to) = bits;
}

__device__ inline float rounded(float value) { return __bfloat162float(__float2bfloat16_rn(value)); }

// What follows is rounded to 8 bits of mantissa, so the fast exponential and division are as good as the exact ones.
__device__ inline float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

struct Sum {
  static constexpr float NEUTRAL = 0.0f;
  __device__ static float join(float a, float b) { return a + b; }
};

struct Max {
  static constexpr float NEUTRAL = -FLT_MAX;
  __device__ static float join(float a, float b) { return fmaxf(a, b); }
};

template <typename Op> __device__ float over_warp(float value) {
  for (int distance = WARP / 2; distance > 0; distance /= 2) {
    value = Op::join(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}

// The values of all threads of the block, joined, for each of them.
template <typename Op> __device__ float over_block(float value) {
  __shared__ float of_warps[WARP];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  value = over_warp<Op>(value);
  // Until all have read what was there before.
  __syncthreads();
  if (lane == 0) {
    of_warps[warp] = value;
  }
  __syncthreads();
  return over_warp<Op>(lane < warps ? of_warps[lane] : Op::NEUTRAL);
}

__device__ inline float inverse_rms(float sum_of_squares, int columns, float eps) {
  return rsqrtf(sum_of_squares / static_cast<float>(columns) + eps);
}

// Puts `next(value, column)` in the place of each element of a row, which may begin and end anywhere: whole vectors where
// they are aligned, single elements before and after them. With WRITES false the row stays as it is.
template <bool WRITES, typename F> __device__ void walk(bf16 *row, int columns, F next) {
  const int misplaced = static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(bf16) % LANES);
  const int first = min((LANES - misplaced) % LANES, columns);
  const int last = first + (columns - first) / LANES * LANES;
  for (int at = threadIdx.x; at < first + columns - last; at += blockDim.x) {
    const int column = at < first ? at : at - first + last;
    const float value = next(__bfloat162float(row[column]), column);
    if (WRITES) {
      row[column] = __float2bfloat16_rn(value);
    }
  }
  for (int at = first + threadIdx.x * LANES; at < last; at += blockDim.x * LANES) {
    Lanes values = load(row + at);
    for (int lane = 0; lane < LANES; ++lane) {
      values.at[lane] = next(values.at[lane], at + lane);
    }
    if (WRITES) {
      store(row + at, values);
    }
  }
}

// The first element of this thread where each takes one vector.
__device__ inline int64_t own_vector() { return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * LANES; }

template <typename T> struct alignas(4 * sizeof(T)) Four {
  T at[4];
};

// A mask [rows, columns] of dropout, as src/dropout.rs defines it: each thread makes the columns of one counter, the words of
// which are compared with `threshold`. `counters` are those of all rows.
template <typename T>
__device__ void dropout(const int64_t *keys, const int64_t *positions, T *out, unsigned counters, unsigned columns, unsigned site,
                        unsigned threshold, T kept) {
  // In 32 bits, where division is cheap.
  const unsigned counter = blockIdx.x * blockDim.x + threadIdx.x;
  if (counter >= counters) {
    return;
  }
  const unsigned of_row = (columns + 3) / 4, row = counter / of_row, inside = counter % of_row;
  const philox::Words words =
      philox::words({inside, static_cast<uint32_t>(positions[row]), site, 0}, static_cast<uint64_t>(keys[row]));
  const T dropped = T(0.0f);
  const Four<T> four{{words.a < threshold ? dropped : kept, words.b < threshold ? dropped : kept,
                      words.c < threshold ? dropped : kept, words.d < threshold ? dropped : kept}};
  T *to = out + static_cast<int64_t>(row) * columns + inside * 4;
  if (columns % 4 == 0) {
    *reinterpret_cast<Four<T> *>(to) = four;
    return;
  }
  for (unsigned place = 0; place < min(4u, columns - inside * 4); ++place) {
    to[place] = four.at[place];
  }
}

} // namespace

extern "C" {

// out = silu(gate) * up, of `count` elements, a multiple of 8.
__global__ void finetune_swiglu(const bf16 *__restrict__ gate, const bf16 *__restrict__ up, bf16 *__restrict__ out,
                                int64_t count) {
  const int64_t at = own_vector();
  if (at >= count) {
    return;
  }
  const Lanes g = load(gate + at), u = load(up + at);
  Lanes product;
  for (int lane = 0; lane < LANES; ++lane) {
    product.at[lane] = rounded(g.at[lane] * sigmoid(g.at[lane])) * u.at[lane];
  }
  store(out + at, product);
}

__global__ void finetune_swiglu_backward(const bf16 *__restrict__ gradient, const bf16 *__restrict__ gate,
                                         const bf16 *__restrict__ up, bf16 *__restrict__ d_gate, bf16 *__restrict__ d_up,
                                         int64_t count) {
  const int64_t at = own_vector();
  if (at >= count) {
    return;
  }
  const Lanes d = load(gradient + at), g = load(gate + at), u = load(up + at);
  Lanes dg, du;
  for (int lane = 0; lane < LANES; ++lane) {
    const float x = g.at[lane], s = sigmoid(x);
    du.at[lane] = rounded(x * s) * d.at[lane];
    // silu'(x) = s (1 + x (1 - s))
    dg.at[lane] = rounded(d.at[lane] * u.at[lane]) * (s * (1.0f + x * (1.0f - s)));
  }
  store(d_gate + at, dg);
  store(d_up + at, du);
}

// A block for each row; `columns` is a multiple of 8.
__global__ void finetune_rms_norm(const bf16 *__restrict__ x, const bf16 *__restrict__ weight, bf16 *__restrict__ out,
                                  int columns, float eps) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * columns;
  const int step = blockDim.x * LANES;
  float squares = 0.0f;
  for (int at = threadIdx.x * LANES; at < columns; at += step) {
    const Lanes values = load(x + row + at);
    for (int lane = 0; lane < LANES; ++lane) {
      squares += values.at[lane] * values.at[lane];
    }
  }
  const float inverse = inverse_rms(over_block<Sum>(squares), columns, eps);
  for (int at = threadIdx.x * LANES; at < columns; at += step) {
    Lanes values = load(x + row + at);
    const Lanes w = load(weight + at);
    for (int lane = 0; lane < LANES; ++lane) {
      values.at[lane] = rounded(values.at[lane] * inverse) * w.at[lane];
    }
    store(out + row + at, values);
  }
}

// out = residual + d(rms_norm)/dx, the norm's share rounded before the sum. A block for each row.
__global__ void finetune_rms_norm_backward(const bf16 *__restrict__ gradient, const bf16 *__restrict__ x,
                                           const bf16 *__restrict__ weight, const bf16 *__restrict__ residual,
                                           bf16 *__restrict__ out, int columns, float eps) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * columns;
  const int step = blockDim.x * LANES;
  float squares = 0.0f, products = 0.0f;
  for (int at = threadIdx.x * LANES; at < columns; at += step) {
    const Lanes d = load(gradient + row + at), values = load(x + row + at), w = load(weight + at);
    for (int lane = 0; lane < LANES; ++lane) {
      squares += values.at[lane] * values.at[lane];
      products += rounded(d.at[lane] * w.at[lane]) * values.at[lane];
    }
  }
  const float inverse = inverse_rms(over_block<Sum>(squares), columns, eps);
  // The mean of scaled * normalized, normalized = x * inverse.
  const float mean = over_block<Sum>(products) * inverse / static_cast<float>(columns);
  for (int at = threadIdx.x * LANES; at < columns; at += step) {
    const Lanes d = load(gradient + row + at), values = load(x + row + at), w = load(weight + at);
    Lanes sum = load(residual + row + at);
    for (int lane = 0; lane < LANES; ++lane) {
      const float scaled = rounded(d.at[lane] * w.at[lane]);
      sum.at[lane] += rounded((scaled - values.at[lane] * inverse * mean) * inverse);
    }
    store(out + row + at, sum);
  }
}

// Rotates the halves of each head: out = x * cos + sign * swap(x) * sin, where sin's first half is negated. x and out
// [tokens, heads, size], cos and sin [tokens, size], size a multiple of 16; `vectors` is those of half of x.
__global__ void finetune_rotate(const bf16 *__restrict__ x, const bf16 *__restrict__ cos, const bf16 *__restrict__ sin,
                                bf16 *__restrict__ out, unsigned vectors, unsigned heads, unsigned size, float sign) {
  // In 32 bits, where division is cheap.
  const unsigned vector = blockIdx.x * blockDim.x + threadIdx.x;
  if (vector >= vectors) {
    return;
  }
  const unsigned half = size / 2, of_head = half / LANES;
  const unsigned head = vector / of_head, inside = vector % of_head * LANES;
  const int64_t low = static_cast<int64_t>(head) * size + inside;
  const int64_t table = static_cast<int64_t>(head / heads) * size + inside;
  const Lanes x_low = load(x + low), x_high = load(x + low + half);
  const Lanes cos_low = load(cos + table), cos_high = load(cos + table + half);
  const Lanes sin_low = load(sin + table), sin_high = load(sin + table + half);
  Lanes out_low, out_high;
  for (int lane = 0; lane < LANES; ++lane) {
    out_low.at[lane] =
        rounded(x_low.at[lane] * cos_low.at[lane]) + sign * rounded(x_high.at[lane] * sin_low.at[lane]);
    out_high.at[lane] =
        rounded(x_high.at[lane] * cos_high.at[lane]) + sign * rounded(x_low.at[lane] * sin_high.at[lane]);
  }
  store(out + low, out_low);
  store(out + low + half, out_high);
}

// Negative log-likelihoods, fp32 [rows], of `labels`; the logits [rows, columns] become scale * (softmax - onehot). A block for
// each row. A label that is no column gives NaN, which ends the run, instead of a read outside of the row.
__global__ void finetune_cross_entropy(bf16 *logits, const int64_t *__restrict__ labels, float *__restrict__ losses,
                                       int columns, float scale) {
  bf16 *row = logits + static_cast<int64_t>(blockIdx.x) * columns;
  const int64_t label = labels[blockIdx.x];
  const bool known = label >= 0 && label < columns;
  // Read before the first barrier, behind which the row is overwritten.
  const float logit = known ? __bfloat162float(row[label]) : nanf("");
  // Each thread's largest logit so far, and the sum of exponentials relative to it.
  float peak = Max::NEUTRAL, sum = 0.0f;
  walk<false>(row, columns, [&](float value, int) {
    if (value > peak) {
      sum *= expf(peak - value);
      peak = value;
    }
    sum += expf(value - peak);
    return value;
  });
  const float highest = over_block<Max>(peak);
  const float level = highest + logf(over_block<Sum>(sum * expf(peak - highest)));
  walk<true>(row, columns, [&](float value, int column) {
    return (expf(value - level) - (column == label ? 1.0f : 0.0f)) * scale;
  });
  if (threadIdx.x == 0) {
    losses[blockIdx.x] = level - logit;
  }
}

__global__ void finetune_dropout(const int64_t *__restrict__ keys, const int64_t *__restrict__ positions, bf16 *__restrict__ out,
                                 unsigned counters, unsigned columns, unsigned site, unsigned threshold, float kept) {
  dropout(keys, positions, out, counters, columns, site, threshold, __float2bfloat16_rn(kept));
}

__global__ void finetune_dropout_fp32(const int64_t *__restrict__ keys, const int64_t *__restrict__ positions,
                                      float *__restrict__ out, unsigned counters, unsigned columns, unsigned site,
                                      unsigned threshold, float kept) {
  dropout(keys, positions, out, counters, columns, site, threshold, kept);
}
}
