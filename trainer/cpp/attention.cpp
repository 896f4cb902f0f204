// Causal attention over packed examples on CPUs with AVX512-BF16, in bf16 and fp32. libtorch's own kernel reaches a tenth of the
// rate of its matrix products on the lengths of chat data, and its backward pass far less.
//
// One task is one example and one key-value head with its group of query heads. Products accumulate in fp32; scores, softmax
// and its gradient are fp32; probabilities and score gradients are rounded to the dtype where they enter a product, as in flash
// attention. Every sum has one order, whatever the number of threads.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "product.h"

namespace {

// Rows of a tile of scores.
constexpr int64_t TILE_ROWS = 4 * ROWS;
// Columns of a tile in the backward pass.
constexpr int64_t TILE_COLUMNS = 4 * LANES;

// Lanes of a vector that begins at `first` and lie in [from, to).
INLINE __mmask16 between(int64_t first, int64_t from, int64_t to) {
  const int64_t low = std::min<int64_t>(std::max<int64_t>(from - first, 0), LANES);
  const int64_t high = std::min<int64_t>(std::max<int64_t>(to - first, 0), LANES);
  return static_cast<__mmask16>(((1u << high) - 1u) & ~((1u << low) - 1u));
}

// The rows of one head of one example in a packed tensor [t, heads, d].
template <typename D> struct Rows {
  using Element = typename D::Element;
  Element *data;
  int64_t stride;

  Element *row(int64_t index) const { return data + index * stride; }
  Words words(int64_t first) const { return {reinterpret_cast<const uint32_t *>(row(first)), stride / D::PER_WORD, 1}; }
  // Those of a head that lies `index` heads of `size` behind.
  Rows after(int64_t index, int64_t size) const { return {data + index * size, stride}; }
};

// to[word of columns][row], columns of `to` padded with zeros to whole vectors: rows become lanes.
template <typename D> void pack_columns(Rows<D> from, int64_t length, int64_t size, Numbers<uint32_t> &to) {
  const int64_t stride = padded(length), words = size / D::PER_WORD;
  to.assign(words * stride, 0);
  for (int64_t row = 0; row < length; ++row) {
    const uint32_t *word = from.words(row).data;
    for (int64_t at = 0; at < words; ++at) {
      to[at * stride + row] = word[at];
    }
  }
}

// to[word of rows][column]; rows are padded with zeros to whole vectors.
AVX512_BF16 void pack_rows(Rows<Bf16> from, int64_t length, int64_t size, Numbers<uint32_t> &to) {
  to.resize(padded(length) / 2 * size);
  for (int64_t pair = 0; pair < padded(length) / 2; ++pair) {
    for (int64_t column = 0; column < size; column += LANES) {
      __m512i words = _mm512_setzero_si512();
      if (2 * pair < length) {
        const auto *low = reinterpret_cast<const __m256i *>(from.row(2 * pair) + column);
        words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(low));
      }
      if (2 * pair + 1 < length) {
        const auto *high = reinterpret_cast<const __m256i *>(from.row(2 * pair + 1) + column);
        words = _mm512_or_si512(words, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(high)), 16));
      }
      _mm512_storeu_si512(to.data() + pair * size + column, words);
    }
  }
}

void pack_rows(Rows<Fp32> from, int64_t length, int64_t size, Numbers<uint32_t> &to) {
  to.assign(padded(length) * size, 0);
  for (int64_t row = 0; row < length; ++row) {
    std::memcpy(to.data() + row * size, from.row(row), size * sizeof(float));
  }
}

// A packed tensor [t, heads, d].
template <typename D> struct Packed {
  typename D::Element *data;
  int64_t heads;
  int64_t size;

  Packed(void *handle, const char *name, at::IntArrayRef shape)
      : data(elements<typename D::Element>(handle, name, D::KIND, shape)), heads(shape[1]), size(shape[2]) {}
  Rows<D> head(int64_t token, int64_t index) const { return {data + (token * heads + index) * size, heads * size}; }
};

// Packed examples: the shapes that a call's tensors agree on, and where each example begins.
struct Examples {
  at::IntArrayRef query, key;
  int64_t tokens, count;
  const int32_t *starts;

  Examples(void *q, void *k, void *bounds) : query(tensor(q).sizes()), key(tensor(k).sizes()) {
    TORCH_CHECK(query.size() == 3 && key.size() == 3 && query[0] == key[0] && query[2] == key[2] && query[2] % (2 * LANES) == 0 &&
                    key[1] > 0 && query[1] % key[1] == 0,
                "query ", query, " and key ", key, " must be [t, n, d] and [t, k, d], n a multiple of k, d of 32");
    const int64_t all = tensor(bounds).numel();
    tokens = query[0], count = all - 1, starts = elements<int32_t>(bounds, "bounds", at::kInt, {all});
    TORCH_CHECK(all > 0 && starts[0] == 0 && starts[count] == tokens && std::is_sorted(starts, starts + all),
                "bounds must ascend from 0 to ", tokens, ", found ", at::ArrayRef<int32_t>(starts, all));
  }
};

struct Shape {
  int64_t length, group, size, tokens;
  float scale;
};

template <typename D> struct ForwardSpace {
  Numbers<uint32_t> keys, values;
  Numbers<float> scores, sums;
  Numbers<typename D::Element> probabilities;
};

// One example and one key-value head; `query`, `out` and `logsumexp` are of the first query head of the group.
template <typename D>
AVX512_BF16 void forward(const Shape &s, Rows<D> query, Rows<D> key, Rows<D> value, Rows<D> out, float *logsumexp,
                    ForwardSpace<D> &space) {
  const int64_t stride = padded(s.length);
  pack_columns(key, s.length, s.size, space.keys);
  pack_rows(value, s.length, s.size, space.values);
  space.scores.resize(TILE_ROWS * stride);
  space.probabilities.resize(TILE_ROWS * stride);
  space.sums.resize(TILE_ROWS * s.size);
  const __m512 scale = _mm512_set1_ps(s.scale);
  for (int64_t head = 0; head < s.group; ++head) {
    const Rows<D> q = query.after(head, s.size), o = out.after(head, s.size);
    for (int64_t first = 0; first < s.length; first += TILE_ROWS) {
      const int64_t count = std::min(TILE_ROWS, s.length - first);
      const int64_t columns = padded(first + count);
      product<D>(q.words(first), space.keys.data(), stride, s.size / D::PER_WORD, space.scores.data(), stride, count, columns,
                 false);
      float inverse[TILE_ROWS];
      for (int64_t row = 0; row < count; ++row) {
        const int64_t valid = first + row + 1;
        const float *scores = space.scores.data() + row * stride;
        typename D::Element *probabilities = space.probabilities.data() + row * stride;
        __m512 largest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
        for (int64_t at = 0; at < valid; at += LANES) {
          largest = _mm512_mask_max_ps(largest, between(at, 0, valid), largest, _mm512_loadu_ps(scores + at));
        }
        const float peak = _mm512_reduce_max_ps(largest);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t at = 0; at < columns; at += LANES) {
          const __m512 below = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + at), _mm512_set1_ps(peak)), scale);
          const __m512 p = _mm512_maskz_mov_ps(between(at, 0, valid), exponential(below));
          sum = _mm512_add_ps(sum, p);
          D::store(probabilities + at, p);
        }
        const float total = _mm512_reduce_add_ps(sum);
        inverse[row] = 1.0f / total;
        logsumexp[head * s.tokens + first + row] = peak * s.scale + std::log(total);
      }
      const Words p{reinterpret_cast<const uint32_t *>(space.probabilities.data()), stride / D::PER_WORD, 1};
      product<D>(p, space.values.data(), s.size, columns / D::PER_WORD, space.sums.data(), s.size, count, s.size, false);
      for (int64_t row = 0; row < count; ++row) {
        for (int64_t at = 0; at < s.size; at += LANES) {
          const __m512 sums = _mm512_loadu_ps(space.sums.data() + row * s.size + at);
          D::store(o.row(first + row) + at, _mm512_mul_ps(sums, _mm512_set1_ps(inverse[row])));
        }
      }
    }
  }
}

struct BackwardSpace {
  Numbers<uint32_t> query_columns, query_rows, gradient_columns, gradient_rows, key_rows;
  Numbers<float> logsumexp, shares, d_query, d_key, d_value;
};

// Writes fp32 sums [length, size] in the dtype.
template <typename D>
AVX512_BF16 void round_rows(const Numbers<float> &from, Rows<D> to, int64_t length, int64_t size) {
  for (int64_t row = 0; row < length; ++row) {
    for (int64_t at = 0; at < size; at += LANES) {
      D::store(to.row(row) + at, _mm512_loadu_ps(from.data() + row * size + at));
    }
  }
}

// Tiles of transposed scores: a row is a key, a lane a query.
template <typename D>
AVX512_BF16 void backward(const Shape &s, Rows<D> gradient, Rows<D> query, Rows<D> key, Rows<D> value, Rows<D> out,
                     const float *logsumexp, Rows<D> d_query, Rows<D> d_key, Rows<D> d_value, BackwardSpace &space) {
  const int64_t stride = padded(s.length);
  const __m512 scale = _mm512_set1_ps(s.scale);
  alignas(64) float scores[TILE_ROWS * TILE_COLUMNS], d_probabilities[TILE_ROWS * TILE_COLUMNS];
  alignas(64) typename D::Element probabilities[TILE_ROWS * TILE_COLUMNS], d_scores[TILE_ROWS * TILE_COLUMNS];
  // Score gradients of two keys in one word: the factor of d_query, which is summed over keys.
  alignas(64) uint32_t d_score_pairs[TILE_ROWS / 2 * TILE_COLUMNS];
  pack_rows(key, s.length, s.size, space.key_rows);
  space.d_key.assign(stride * s.size, 0.0f);
  space.d_value.assign(stride * s.size, 0.0f);
  for (int64_t head = 0; head < s.group; ++head) {
    const Rows<D> q = query.after(head, s.size), o = out.after(head, s.size);
    const Rows<D> g = gradient.after(head, s.size);
    pack_columns(q, s.length, s.size, space.query_columns);
    pack_columns(g, s.length, s.size, space.gradient_columns);
    pack_rows(q, s.length, s.size, space.query_rows);
    pack_rows(g, s.length, s.size, space.gradient_rows);
    space.logsumexp.assign(stride, 0.0f);
    space.shares.assign(stride, 0.0f);
    for (int64_t row = 0; row < s.length; ++row) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t at = 0; at < s.size; at += LANES) {
        sum = _mm512_fmadd_ps(D::load(g.row(row) + at), D::load(o.row(row) + at), sum);
      }
      space.shares[row] = _mm512_reduce_add_ps(sum);
      space.logsumexp[row] = logsumexp[head * s.tokens + row];
    }
    space.d_query.assign(stride * s.size, 0.0f);
    for (int64_t first = 0; first < s.length; first += TILE_ROWS) {
      const int64_t keys = std::min(TILE_ROWS, s.length - first);
      for (int64_t from = first / LANES * LANES; from < s.length; from += TILE_COLUMNS) {
        const int64_t columns = std::min(TILE_COLUMNS, stride - from);
        product<D>(key.words(first), space.query_columns.data() + from, stride, s.size / D::PER_WORD, scores, TILE_COLUMNS, keys,
                   columns, false);
        product<D>(value.words(first), space.gradient_columns.data() + from, stride, s.size / D::PER_WORD, d_probabilities,
                   TILE_COLUMNS, keys, columns, false);
        for (int64_t at = 0; at < columns; at += LANES) {
          const __m512 level = _mm512_loadu_ps(space.logsumexp.data() + from + at);
          const __m512 share = _mm512_loadu_ps(space.shares.data() + from + at);
          __m512i even = _mm512_setzero_si512();
          for (int64_t row = 0; row < keys; ++row) {
            const int64_t place = row * TILE_COLUMNS + at;
            const __mmask16 seen = between(from + at, first + row, s.length);
            const __m512 exponent = _mm512_fmsub_ps(_mm512_loadu_ps(scores + place), scale, level);
            const __m512 p = _mm512_maskz_mov_ps(seen, exponential(exponent));
            const __m512 change = _mm512_sub_ps(_mm512_loadu_ps(d_probabilities + place), share);
            const __m512 d = _mm512_maskz_mov_ps(seen, _mm512_mul_ps(_mm512_mul_ps(p, change), scale));
            D::store(probabilities + place, p);
            D::store(d_scores + place, d);
            if constexpr (D::PER_WORD == 2) {
              const auto *stored = reinterpret_cast<const __m256i *>(d_scores + place);
              const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(stored));
              even = row % 2 == 0 ? wide : _mm512_or_si512(even, _mm512_slli_epi32(wide, 16));
              _mm512_storeu_si512(d_score_pairs + row / 2 * TILE_COLUMNS + at, even);
            }
          }
        }
        const Words p{reinterpret_cast<const uint32_t *>(probabilities), TILE_COLUMNS / D::PER_WORD, 1};
        const Words d{reinterpret_cast<const uint32_t *>(d_scores), TILE_COLUMNS / D::PER_WORD, 1};
        const uint32_t *of_keys = D::PER_WORD == 2 ? d_score_pairs : d.data;
        const int64_t queries = columns / D::PER_WORD, from_word = from / D::PER_WORD * s.size;
        product<D>(p, space.gradient_rows.data() + from_word, s.size, queries, space.d_value.data() + first * s.size, s.size,
                   keys, s.size, true);
        product<D>(d, space.query_rows.data() + from_word, s.size, queries, space.d_key.data() + first * s.size, s.size, keys,
                   s.size, true);
        product<D>({of_keys, 1, TILE_COLUMNS}, space.key_rows.data() + first / D::PER_WORD * s.size, s.size,
                   (keys + D::PER_WORD - 1) / D::PER_WORD, space.d_query.data() + from * s.size, s.size,
                   std::min(columns, s.length - from), s.size, true);
      }
    }
    round_rows(space.d_query, d_query.after(head, s.size), s.length, s.size);
  }
  round_rows(space.d_key, d_key, s.length, s.size);
  round_rows(space.d_value, d_value, s.length, s.size);
}

// Calls work(example, key-value head, workspace), each pair once, on whichever thread is free: examples differ in length.
template <typename Space, typename F> void for_each_task(int64_t examples, int64_t kv_heads, F work) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    Space space;
    for (int64_t task; (task = next++) < examples * kv_heads;) {
      work(task / kv_heads, task % kv_heads, space);
    }
  });
}

} // namespace

extern "C" {

// query, out [t, n, d] and key, value [t, k, d], bf16 or fp32; logsumexp fp32 [n, t]; bounds int32
// [examples + 1], ascending from 0 to t.
int ft_cpu_attention(void *query, void *key, void *value, void *bounds, double scale, void *out, void *logsumexp) {
  return recorded_by_dtype(kernels::attention, {query, key, value}, [&](auto dtype) {
    using D = decltype(dtype);
    const Examples examples(query, key, bounds);
    const Packed<D> q(query, "query", examples.query), k(key, "key", examples.key);
    const Packed<D> v(value, "value", examples.key), o(out, "out", examples.query);
    const int64_t tokens = examples.tokens, group = q.heads / k.heads;
    auto *levels = elements<float>(logsumexp, "logsumexp", at::kFloat, {q.heads, tokens});
    for_each_task<ForwardSpace<D>>(examples.count, k.heads, [&](int64_t example, int64_t head, ForwardSpace<D> &space) {
      const int64_t start = examples.starts[example], length = examples.starts[example + 1] - start;
      const Shape shape{length, group, q.size, tokens, static_cast<float>(scale)};
      forward<D>(shape, q.head(start, head * group), k.head(start, head), v.head(start, head), o.head(start, head * group),
              levels + head * group * tokens + start, space);
    });
  });
}

// The gradients of query, key and value, in tensors of their shapes.
int ft_cpu_attention_backward(void *gradient, void *query, void *key, void *value, void *out, void *logsumexp,
                              void *bounds, double scale, void *d_query, void *d_key, void *d_value) {
  return recorded_by_dtype(kernels::attention_backward, {gradient, query, key, value}, [&](auto dtype) {
    using D = decltype(dtype);
    const Examples examples(query, key, bounds);
    const Packed<D> q(query, "query", examples.query), k(key, "key", examples.key), v(value, "value", examples.key);
    const Packed<D> o(out, "out", examples.query), g(gradient, "gradient", examples.query);
    const Packed<D> dq(d_query, "d_query", examples.query);
    const Packed<D> dk(d_key, "d_key", examples.key), dv(d_value, "d_value", examples.key);
    const int64_t tokens = examples.tokens, group = q.heads / k.heads;
    const auto *levels = elements<float>(logsumexp, "logsumexp", at::kFloat, {q.heads, tokens});
    for_each_task<BackwardSpace>(examples.count, k.heads, [&](int64_t example, int64_t head, BackwardSpace &space) {
      const int64_t start = examples.starts[example], length = examples.starts[example + 1] - start;
      const Shape shape{length, group, q.size, tokens, static_cast<float>(scale)};
      backward<D>(shape, g.head(start, head * group), q.head(start, head * group), k.head(start, head), v.head(start, head),
               o.head(start, head * group), levels + head * group * tokens + start, dq.head(start, head * group),
               dk.head(start, head), dv.head(start, head), space);
    });
  });
}
}
