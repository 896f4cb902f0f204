// The pointwise parts of a decoder layer and the loss, fused, on CPUs with AVX512-BF16: each reads its inputs and writes its
// outputs once. Arithmetic is fp32; where transformers rounds to bf16 in between, so do these.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "avx512.h"

namespace {

INLINE __m512 sigmoid(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

template <typename D> AVX512_BF16 void swiglu(const Element<D> *gate, const Element<D> *up, Element<D> *out, int64_t count) {
  for (int64_t at = 0; at < count; at += LANES) {
    const __m512 g = D::load(gate + at);
    D::store(out + at, _mm512_mul_ps(D::rounded(_mm512_mul_ps(g, sigmoid(g))), D::load(up + at)));
  }
}

template <typename D>
AVX512_BF16 void swiglu_backward(const Element<D> *gradient, const Element<D> *gate, const Element<D> *up, Element<D> *d_gate,
                            Element<D> *d_up, int64_t count) {
  const __m512 one = _mm512_set1_ps(1.0f);
  for (int64_t at = 0; at < count; at += LANES) {
    const __m512 d = D::load(gradient + at), g = D::load(gate + at), s = sigmoid(g);
    D::store(d_up + at, _mm512_mul_ps(D::rounded(_mm512_mul_ps(g, s)), d));
    // silu'(g) = s (1 + g (1 - s))
    const __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(g, _mm512_sub_ps(one, s), one));
    D::store(d_gate + at, _mm512_mul_ps(D::rounded(_mm512_mul_ps(d, D::load(up + at))), slope));
  }
}

template <typename D> AVX512_BF16 float inverse_rms(const Element<D> *x, int64_t columns, double eps) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t at = 0; at < columns; at += LANES) {
    const __m512 value = D::load(x + at);
    sum = _mm512_fmadd_ps(value, value, sum);
  }
  return 1.0f / std::sqrt(_mm512_reduce_add_ps(sum) / static_cast<float>(columns) + static_cast<float>(eps));
}

template <typename D>
AVX512_BF16 void rms_norm(const Element<D> *x, const Element<D> *weight, Element<D> *out, int64_t columns, double eps) {
  const __m512 inverse = _mm512_set1_ps(inverse_rms<D>(x, columns, eps));
  for (int64_t at = 0; at < columns; at += LANES) {
    D::store(out + at, _mm512_mul_ps(D::rounded(_mm512_mul_ps(D::load(x + at), inverse)), D::load(weight + at)));
  }
}

// out = residual + d(rms_norm)/dx, the norm's share rounded before the sum.
template <typename D>
AVX512_BF16 void rms_norm_backward(const Element<D> *gradient, const Element<D> *x, const Element<D> *weight,
                              const Element<D> *residual, Element<D> *out, int64_t columns, double eps) {
  const float inverse = inverse_rms<D>(x, columns, eps);
  const __m512 inverses = _mm512_set1_ps(inverse);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t at = 0; at < columns; at += LANES) {
    const __m512 scaled = D::rounded(_mm512_mul_ps(D::load(gradient + at), D::load(weight + at)));
    sum = _mm512_fmadd_ps(scaled, _mm512_mul_ps(D::load(x + at), inverses), sum);
  }
  const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / static_cast<float>(columns));
  for (int64_t at = 0; at < columns; at += LANES) {
    const __m512 scaled = D::rounded(_mm512_mul_ps(D::load(gradient + at), D::load(weight + at)));
    const __m512 normalized = _mm512_mul_ps(D::load(x + at), inverses);
    const __m512 own = D::rounded(_mm512_mul_ps(_mm512_fnmadd_ps(normalized, mean, scaled), inverses));
    D::store(out + at, _mm512_add_ps(own, D::load(residual + at)));
  }
}

// Rotates the halves of one head: out = x * cos + swap(x) * sin, where sin's first half is negated; `sign` -1 turns back.
template <typename D>
AVX512_BF16 void rotate(const Element<D> *x, const Element<D> *cos, const Element<D> *sin, Element<D> *out, int64_t size, float sign) {
  const int64_t half = size / 2;
  const __m512 signs = _mm512_set1_ps(sign);
  for (int64_t at = 0; at < size; at += LANES) {
    const Element<D> *other = at < half ? x + at + half : x + at - half;
    const __m512 turned = D::rounded(_mm512_mul_ps(D::load(other), D::load(sin + at)));
    const __m512 kept = D::rounded(_mm512_mul_ps(D::load(x + at), D::load(cos + at)));
    D::store(out + at, _mm512_fmadd_ps(turned, signs, kept));
  }
}

// Negative log-likelihood of `label`; the logits become its gradient times `scale`.
template <typename D> AVX512_BF16 float cross_entropy(Element<D> *logits, int64_t label, int64_t columns, float scale) {
  __m512 largest = D::load(logits);
  for (int64_t at = LANES; at < columns; at += LANES) {
    largest = _mm512_max_ps(largest, D::load(logits + at));
  }
  const __m512 peak = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
  __m512 sum = _mm512_setzero_ps();
  for (int64_t at = 0; at < columns; at += LANES) {
    sum = _mm512_add_ps(sum, exponential(_mm512_sub_ps(D::load(logits + at), peak)));
  }
  const float level = _mm512_cvtss_f32(peak) + std::log(_mm512_reduce_add_ps(sum));
  const int64_t at_label = label / LANES * LANES;
  const __mmask16 is_label = static_cast<__mmask16>(1u << (label - at_label));
  const float logit = _mm512_mask_reduce_add_ps(is_label, D::load(logits + at_label));
  const __m512 levels = _mm512_set1_ps(level), scales = _mm512_set1_ps(scale), one = _mm512_set1_ps(1.0f);
  for (int64_t at = 0; at < columns; at += LANES) {
    __m512 d = exponential(_mm512_sub_ps(D::load(logits + at), levels));
    d = at == at_label ? _mm512_mask_sub_ps(d, is_label, d, one) : d;
    D::store(logits + at, _mm512_mul_ps(d, scales));
  }
  return level - logit;
}

// Elements that are worth a thread of their own.
constexpr int64_t LEAST = 16384;

int64_t least_rows(int64_t columns) { return LEAST / std::clamp<int64_t>(columns, 1, LEAST); }

} // namespace

extern "C" {

// silu(gate) * up
int ft_cpu_swiglu(void *gate, void *up, void *out) {
  return recorded_by_dtype(kernels::swiglu, {gate, up}, [&](auto dtype) {
    using D = decltype(dtype);
    const Matrix<D> g(gate, "gate"), u(up, "up", g.shape), o(out, "out", g.shape);
    at::parallel_for(0, g.rows, least_rows(g.columns), [&](int64_t first, int64_t last) {
      swiglu<D>(g.row(first), u.row(first), o.row(first), (last - first) * g.columns);
    });
  });
}

int ft_cpu_swiglu_backward(void *gradient, void *gate, void *up, void *d_gate, void *d_up) {
  return recorded_by_dtype(kernels::swiglu_backward, {gradient, gate, up}, [&](auto dtype) {
    using D = decltype(dtype);
    const Matrix<D> g(gate, "gate"), u(up, "up", g.shape), d(gradient, "gradient", g.shape);
    const Matrix<D> dg(d_gate, "d_gate", g.shape), du(d_up, "d_up", g.shape);
    at::parallel_for(0, g.rows, least_rows(g.columns), [&](int64_t first, int64_t last) {
      swiglu_backward<D>(d.row(first), g.row(first), u.row(first), dg.row(first), du.row(first), (last - first) * g.columns);
    });
  });
}

int ft_cpu_rms_norm(void *x, void *weight, double eps, void *out) {
  return recorded_by_dtype(kernels::rms_norm, {x, weight}, [&](auto dtype) {
    using D = decltype(dtype);
    const Matrix<D> input(x, "x"), w(weight, "weight", {input.columns}), o(out, "out", input.shape);
    at::parallel_for(0, input.rows, least_rows(input.columns), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        rms_norm<D>(input.row(row), w.data, o.row(row), input.columns, eps);
      }
    });
  });
}

// out = residual + the gradient of x.
int ft_cpu_rms_norm_backward(void *gradient, void *x, void *weight, double eps, void *residual, void *out) {
  return recorded_by_dtype(kernels::rms_norm_backward, {gradient, x, weight, residual}, [&](auto dtype) {
    using D = decltype(dtype);
    const Matrix<D> input(x, "x"), w(weight, "weight", {input.columns}), g(gradient, "gradient", input.shape);
    const Matrix<D> r(residual, "residual", input.shape), o(out, "out", input.shape);
    at::parallel_for(0, input.rows, least_rows(input.columns), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        rms_norm_backward<D>(g.row(row), input.row(row), w.data, r.row(row), o.row(row), input.columns, eps);
      }
    });
  });
}

// x and out [t, n, d], d a multiple of 32; cos and sin [t, 1, d]; `sign` -1 turns back.
int ft_cpu_rotate(void *x, void *cos, void *sin, double sign, void *out) {
  return recorded_by_dtype(kernels::rotate, {x, cos, sin}, [&](auto dtype) {
    using D = decltype(dtype);
    const Matrix<D> input(x, "x"), o(out, "out", input.shape);
    TORCH_CHECK(input.shape.size() == 3 && input.columns % (2 * LANES) == 0, "x must be [t, n, d], d a multiple of 32, found ",
                input.shape);
    const int64_t tokens = input.shape[0], heads = input.shape[1];
    const Matrix<D> c(cos, "cos", {tokens, 1, input.columns}), s(sin, "sin", c.shape);
    at::parallel_for(0, tokens, least_rows(heads * input.columns), [&](int64_t first, int64_t last) {
      for (int64_t row = first * heads; row < last * heads; ++row) {
        rotate<D>(input.row(row), c.row(row / heads), s.row(row / heads), o.row(row), input.columns, static_cast<float>(sign));
      }
    });
  });
}

// logits [n, v], which become scale * (softmax - onehot); labels int64 [n]; losses fp32 [n], in nats.
int ft_cpu_cross_entropy(void *logits, void *labels, double scale, void *losses) {
  return recorded_by_dtype(kernels::cross_entropy, {logits, labels}, [&](auto dtype) {
    using D = decltype(dtype);
    const Matrix<D> l(logits, "logits");
    const auto *targets = elements<int64_t>(labels, "labels", at::kLong, {l.rows});
    auto *found = elements<float>(losses, "losses", at::kFloat, {l.rows});
    at::parallel_for(0, l.rows, 1, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        TORCH_CHECK(targets[row] >= 0 && targets[row] < l.columns, "label ", targets[row], " of ", l.columns);
        found[row] = cross_entropy<D>(l.row(row), targets[row], l.columns, static_cast<float>(scale));
      }
    });
  });
}
}
