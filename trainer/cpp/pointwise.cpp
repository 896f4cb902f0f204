// The pointwise parts of a decoder layer and the loss, fused, in bf16 on CPUs with AVX512-BF16: each reads its inputs and writes
// its outputs once. Arithmetic is fp32; where transformers rounds to bf16 in between, so do these.
//
// Rows are contiguous, a multiple of 16 wide.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "avx512.h"
#include "guard.h"

namespace {

// A contiguous bf16 tensor as rows of its last dimension.
struct Matrix {
  uint16_t *data;
  int64_t rows, columns;

  Matrix(const at::Tensor &tensor, const char *name)
      : data(static_cast<uint16_t *>(tensor.data_ptr())), rows(tensor.numel() / tensor.size(-1)), columns(tensor.size(-1)) {
    TORCH_CHECK(tensor.scalar_type() == at::kBFloat16 && tensor.is_contiguous() && columns % LANES == 0, name,
                " must be contiguous bf16, a multiple of 16 wide");
  }
  uint16_t *row(int64_t index) const { return data + index * columns; }
};

INLINE __m512 rounded(__m512 values) {
  const __m256i bits = (__m256i)_mm512_cvtneps_pbh(values);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

INLINE __m512 sigmoid(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

AVX512 void swiglu(const uint16_t *gate, const uint16_t *up, uint16_t *out, int64_t count) {
  for (int64_t at = 0; at < count; at += LANES) {
    const __m512 g = load_bf16(gate + at);
    store_bf16(out + at, _mm512_mul_ps(rounded(_mm512_mul_ps(g, sigmoid(g))), load_bf16(up + at)));
  }
}

AVX512 void swiglu_backward(const uint16_t *gradient, const uint16_t *gate, const uint16_t *up, uint16_t *d_gate,
                            uint16_t *d_up, int64_t count) {
  const __m512 one = _mm512_set1_ps(1.0f);
  for (int64_t at = 0; at < count; at += LANES) {
    const __m512 d = load_bf16(gradient + at), g = load_bf16(gate + at), s = sigmoid(g);
    store_bf16(d_up + at, _mm512_mul_ps(rounded(_mm512_mul_ps(g, s)), d));
    // silu'(g) = s (1 + g (1 - s))
    const __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(g, _mm512_sub_ps(one, s), one));
    store_bf16(d_gate + at, _mm512_mul_ps(rounded(_mm512_mul_ps(d, load_bf16(up + at))), slope));
  }
}

AVX512 float inverse_rms(const uint16_t *x, int64_t columns, double eps) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t at = 0; at < columns; at += LANES) {
    const __m512 value = load_bf16(x + at);
    sum = _mm512_fmadd_ps(value, value, sum);
  }
  return 1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / static_cast<float>(columns) + static_cast<float>(eps));
}

AVX512 void rms_norm(const uint16_t *x, const uint16_t *weight, uint16_t *out, int64_t columns, double eps) {
  const __m512 inverse = _mm512_set1_ps(inverse_rms(x, columns, eps));
  for (int64_t at = 0; at < columns; at += LANES) {
    store_bf16(out + at, _mm512_mul_ps(rounded(_mm512_mul_ps(load_bf16(x + at), inverse)), load_bf16(weight + at)));
  }
}

// out = residual + d(rms_norm)/dx, the norm's share rounded before the sum.
AVX512 void rms_norm_backward(const uint16_t *gradient, const uint16_t *x, const uint16_t *weight, const uint16_t *residual,
                              uint16_t *out, int64_t columns, double eps) {
  const float inverse = inverse_rms(x, columns, eps);
  const __m512 inverses = _mm512_set1_ps(inverse);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t at = 0; at < columns; at += LANES) {
    const __m512 scaled = rounded(_mm512_mul_ps(load_bf16(gradient + at), load_bf16(weight + at)));
    sum = _mm512_fmadd_ps(scaled, _mm512_mul_ps(load_bf16(x + at), inverses), sum);
  }
  const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / static_cast<float>(columns));
  for (int64_t at = 0; at < columns; at += LANES) {
    const __m512 scaled = rounded(_mm512_mul_ps(load_bf16(gradient + at), load_bf16(weight + at)));
    const __m512 normalized = _mm512_mul_ps(load_bf16(x + at), inverses);
    const __m512 own = rounded(_mm512_mul_ps(_mm512_fnmadd_ps(normalized, mean, scaled), inverses));
    store_bf16(out + at, _mm512_add_ps(own, load_bf16(residual + at)));
  }
}

// Rotates the halves of one head: out = x * cos + swap(x) * sin, where sin's first half is negated; `sign` -1 turns back.
AVX512 void rotate(const uint16_t *x, const uint16_t *cos, const uint16_t *sin, uint16_t *out, int64_t size, float sign) {
  const int64_t half = size / 2;
  const __m512 signs = _mm512_set1_ps(sign);
  for (int64_t at = 0; at < size; at += LANES) {
    const uint16_t *other = at < half ? x + at + half : x + at - half;
    const __m512 turned = rounded(_mm512_mul_ps(load_bf16(other), load_bf16(sin + at)));
    const __m512 kept = rounded(_mm512_mul_ps(load_bf16(x + at), load_bf16(cos + at)));
    store_bf16(out + at, _mm512_fmadd_ps(turned, signs, kept));
  }
}

// Negative log-likelihood of `label`; the logits become its gradient times `scale`.
AVX512 float cross_entropy(uint16_t *logits, int64_t label, int64_t columns, float scale) {
  __m512 largest = load_bf16(logits);
  for (int64_t at = LANES; at < columns; at += LANES) {
    largest = _mm512_max_ps(largest, load_bf16(logits + at));
  }
  const __m512 peak = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
  __m512 sum = _mm512_setzero_ps();
  for (int64_t at = 0; at < columns; at += LANES) {
    sum = _mm512_add_ps(sum, exponential(_mm512_sub_ps(load_bf16(logits + at), peak)));
  }
  const float level = _mm512_cvtss_f32(peak) + std::log(_mm512_reduce_add_ps(sum));
  const int64_t at_label = label / LANES * LANES;
  const __mmask16 is_label = static_cast<__mmask16>(1u << (label - at_label));
  const float logit = _mm512_mask_reduce_add_ps(is_label, load_bf16(logits + at_label));
  const __m512 levels = _mm512_set1_ps(level), scales = _mm512_set1_ps(scale), one = _mm512_set1_ps(1.0f);
  for (int64_t at = 0; at < columns; at += LANES) {
    __m512 d = exponential(_mm512_sub_ps(load_bf16(logits + at), levels));
    d = at == at_label ? _mm512_mask_sub_ps(d, is_label, d, one) : d;
    store_bf16(logits + at, _mm512_mul_ps(d, scales));
  }
  return level - logit;
}

// Elements that are worth a thread of their own.
constexpr int64_t LEAST = 16384;

int64_t least_rows(int64_t columns) { return std::max<int64_t>(1, LEAST / columns); }

} // namespace

extern "C" {

int ft_cpu_kernels_are_supported() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// silu(gate) * up
int ft_cpu_swiglu(void *gate, void *up, void *out) {
  return recorded("finetune::swiglu", {gate, up}, [&] {
    const Matrix g(tensor(gate), "gate"), u(tensor(up), "up"), o(tensor(out), "out");
    at::parallel_for(0, g.rows, least_rows(g.columns), [&](int64_t first, int64_t last) {
      swiglu(g.row(first), u.row(first), o.row(first), (last - first) * g.columns);
    });
  });
}

int ft_cpu_swiglu_backward(void *gradient, void *gate, void *up, void *d_gate, void *d_up) {
  return recorded("finetune::swiglu_backward", {gradient, gate, up}, [&] {
    const Matrix d(tensor(gradient), "gradient"), g(tensor(gate), "gate"), u(tensor(up), "up");
    const Matrix dg(tensor(d_gate), "d_gate"), du(tensor(d_up), "d_up");
    at::parallel_for(0, g.rows, least_rows(g.columns), [&](int64_t first, int64_t last) {
      swiglu_backward(d.row(first), g.row(first), u.row(first), dg.row(first), du.row(first), (last - first) * g.columns);
    });
  });
}

int ft_cpu_rms_norm(void *x, void *weight, double eps, void *out) {
  return recorded("finetune::rms_norm", {x, weight}, [&] {
    const Matrix input(tensor(x), "x"), w(tensor(weight), "weight"), o(tensor(out), "out");
    at::parallel_for(0, input.rows, least_rows(input.columns), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        rms_norm(input.row(row), w.data, o.row(row), input.columns, eps);
      }
    });
  });
}

// out = residual + the gradient of x.
int ft_cpu_rms_norm_backward(void *gradient, void *x, void *weight, double eps, void *residual, void *out) {
  return recorded("finetune::rms_norm_backward", {gradient, x, weight, residual}, [&] {
    const Matrix g(tensor(gradient), "gradient"), input(tensor(x), "x"), w(tensor(weight), "weight");
    const Matrix r(tensor(residual), "residual"), o(tensor(out), "out");
    at::parallel_for(0, input.rows, least_rows(input.columns), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        rms_norm_backward(g.row(row), input.row(row), w.data, r.row(row), o.row(row), input.columns, eps);
      }
    });
  });
}

// x and out [t, n, d], d a multiple of 32; cos and sin [t, 1, d]; `sign` -1 turns back.
int ft_cpu_rotate(void *x, void *cos, void *sin, double sign, void *out) {
  return recorded("finetune::rotate", {x, cos, sin}, [&] {
    const Matrix input(tensor(x), "x"), c(tensor(cos), "cos"), s(tensor(sin), "sin"), o(tensor(out), "out");
    TORCH_CHECK(input.columns % (2 * LANES) == 0, "x must be a multiple of 32 wide");
    const int64_t heads = input.rows / c.rows;
    at::parallel_for(0, c.rows, least_rows(heads * input.columns), [&](int64_t first, int64_t last) {
      for (int64_t row = first * heads; row < last * heads; ++row) {
        rotate(input.row(row), c.row(row / heads), s.row(row / heads), o.row(row), input.columns, static_cast<float>(sign));
      }
    });
  });
}

// logits [n, v], which become scale * (softmax - onehot); labels int64 [n]; losses fp32 [n], in nats.
int ft_cpu_cross_entropy(void *logits, void *labels, double scale, void *losses) {
  return recorded("finetune::cross_entropy", {logits, labels}, [&] {
    const Matrix l(tensor(logits), "logits");
    const int64_t *targets = tensor(labels).data_ptr<int64_t>();
    float *found = tensor(losses).data_ptr<float>();
    at::parallel_for(0, l.rows, 1, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        TORCH_CHECK(targets[row] >= 0 && targets[row] < l.columns, "label ", targets[row], " of ", l.columns);
        found[row] = cross_entropy(l.row(row), targets[row], l.columns, static_cast<float>(scale));
      }
    });
  });
}
}
