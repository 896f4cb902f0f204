// Attention of new tokens to what a key-value cache holds, and what is read off logits, in bf16 and fp32 on CPUs with
// AVX512-BF16.
//
// A cache holds words as product.h multiplies them, w numbers each, 2 in bf16 and 1 in fp32: keys [slot][head][d / w][column][w]
// and values [slot][head][column / w][d][w]. So neither is packed again for every new token. Columns are a multiple of 16;
// unused ones hold any finite numbers. A prefix that all rows have in common is a cache of one slot beside it.
//
// One task is one row and one key-value head with its group of query heads. Scores and softmax are fp32, probabilities are
// rounded to the dtype where they enter the product, as in attention.cpp.

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

// Queries whose scores exist at once.
constexpr int64_t TILE = 4 * ROWS;

// Keys and values of one layer. An undefined tensor is an empty cache.
template <typename D> struct Cache {
  uint32_t *keys = nullptr, *values = nullptr;
  int64_t slots = 0, heads = 0, size = 0, capacity = 0;

  Cache(const at::Tensor &k, const at::Tensor &v) {
    if (!k.defined()) {
      return;
    }
    for (const at::Tensor &tensor : {k, v}) {
      TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == D::KIND && tensor.is_contiguous() && tensor.dim() == 5 &&
                      tensor.size(1) > 0 && tensor.size(4) == D::PER_WORD,
                  "a cache must be contiguous ", D::KIND, " [slots, heads, …, …, ", D::PER_WORD, "] on the CPU");
    }
    slots = k.size(0), heads = k.size(1), size = D::PER_WORD * k.size(2), capacity = k.size(3);
    TORCH_CHECK(v.size(0) == slots && v.size(1) == heads && v.size(2) == capacity / D::PER_WORD && v.size(3) == size,
                "keys ", k.sizes(), " and values ", v.sizes(), " are of different caches");
    TORCH_CHECK(capacity % LANES == 0 && size % (2 * LANES) == 0, "columns must be a multiple of 16, a head of 32");
    keys = static_cast<uint32_t *>(k.data_ptr());
    values = static_cast<uint32_t *>(v.data_ptr());
  }
  int64_t place(int64_t slot, int64_t head) const { return (slot * heads + head) * capacity * size / D::PER_WORD; }
  uint32_t *head_keys(int64_t slot, int64_t head) const { return keys + place(slot, head); }
  uint32_t *head_values(int64_t slot, int64_t head) const { return values + place(slot, head); }
};

// Appends a token at `column`.
template <typename D>
void append(uint32_t *keys, uint32_t *values, const Element<D> *key, const Element<D> *value, int64_t column, int64_t capacity,
            int64_t size) {
  for (int64_t word = 0; word < size / D::PER_WORD; ++word) {
    std::memcpy(keys + word * capacity + column, key + word * D::PER_WORD, sizeof(uint32_t));
  }
  auto *to = reinterpret_cast<Element<D> *>(values + column / D::PER_WORD * size) + column % D::PER_WORD;
  for (int64_t dim = 0; dim < size; ++dim) {
    to[dim * D::PER_WORD] = value[dim];
  }
}

template <typename D> struct Space {
  Numbers<Element<D>> queries, probabilities;
  Numbers<float> scores, sums;
};

// Probabilities of one query, not yet divided by their sum, which is returned. It sees the columns below `prefix`, and
// `own` columns from `offset` on.
template <typename D>
AVX512_BF16 float softmax(const float *scores, Element<D> *probabilities, int64_t prefix, int64_t offset, int64_t own, int64_t columns,
                     float scale) {
  const auto lanes = [](int64_t count) { return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, LANES)) - 1u); };
  const auto seen = [&](int64_t at) { return at < offset ? lanes(prefix - at) : lanes(offset + own - at); };
  __m512 largest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (int64_t at = 0; at < columns; at += LANES) {
    largest = _mm512_mask_max_ps(largest, seen(at), largest, _mm512_loadu_ps(scores + at));
  }
  const __m512 peak = _mm512_set1_ps(_mm512_reduce_max_ps(largest)), scales = _mm512_set1_ps(scale);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t at = 0; at < columns; at += LANES) {
    const __m512 below = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + at), peak), scales);
    const __m512 p = _mm512_maskz_mov_ps(seen(at), exponential(below));
    sum = _mm512_add_ps(sum, p);
    D::store(probabilities + at, p);
  }
  return _mm512_reduce_add_ps(sum);
}

// New tokens of one row in one key-value head: query and out begin at its first query head, `stride` apart from token to
// token. The new keys and values are in the cache already.
template <typename D>
AVX512_BF16 void attend(const Element<D> *query, Element<D> *out, int64_t stride, int64_t tokens, int64_t group, int64_t length,
                   const Cache<D> &cache, int64_t slot, const Cache<D> &prefix, int64_t prefix_length, int64_t head, float scale,
                   Space<D> &space) {
  const int64_t size = cache.size, offset = padded(prefix_length);
  const int64_t width = offset + padded(length + tokens);
  space.queries.resize(TILE * size);
  space.sums.resize(TILE * size);
  space.scores.resize(TILE * width);
  space.probabilities.resize(TILE * width);
  const Words queries{reinterpret_cast<const uint32_t *>(space.queries.data()), size / D::PER_WORD, 1};
  const Words prefix_words{reinterpret_cast<const uint32_t *>(space.probabilities.data()), width / D::PER_WORD, 1};
  const Words own_words{prefix_words.data + offset / D::PER_WORD, prefix_words.row_stride, 1};
  for (int64_t first = 0; first < tokens * group; first += TILE) {
    const int64_t count = std::min(TILE, tokens * group - first);
    const auto at = [&](int64_t row) { return (first + row) / group * stride + (first + row) % group * size; };
    for (int64_t row = 0; row < count; ++row) {
      std::memcpy(space.queries.data() + row * size, query + at(row), size * sizeof(Element<D>));
    }
    const int64_t own_columns = padded(length + (first + count - 1) / group + 1), columns = offset + own_columns;
    if (offset > 0) {
      product<D>(queries, prefix.head_keys(0, head), prefix.capacity, size / D::PER_WORD, space.scores.data(), width, count, offset,
                 false);
    }
    product<D>(queries, cache.head_keys(slot, head), cache.capacity, size / D::PER_WORD, space.scores.data() + offset, width, count,
               own_columns, false);
    float inverse[TILE];
    for (int64_t row = 0; row < count; ++row) {
      const int64_t own = length + (first + row) / group + 1;
      inverse[row] = 1.0f / softmax<D>(space.scores.data() + row * width, space.probabilities.data() + row * width, prefix_length,
                                       offset, own, columns, scale);
    }
    if (offset > 0) {
      product<D>(prefix_words, prefix.head_values(0, head), size, offset / D::PER_WORD, space.sums.data(), size, count, size,
                 false);
    }
    product<D>(own_words, cache.head_values(slot, head), size, own_columns / D::PER_WORD, space.sums.data(), size, count, size,
               offset > 0);
    for (int64_t row = 0; row < count; ++row) {
      for (int64_t dim = 0; dim < size; dim += LANES) {
        const __m512 sums = _mm512_loadu_ps(space.sums.data() + row * size + dim);
        D::store(out + at(row) + dim, _mm512_mul_ps(sums, _mm512_set1_ps(inverse[row])));
      }
    }
  }
}

// The largest logit; NaN where there is one, as in torch.
template <typename D> AVX512_BF16 float largest(const Element<D> *logits, int64_t columns) {
  __m512 most = D::load(logits);
  __mmask16 unordered = _mm512_cmp_ps_mask(most, most, _CMP_UNORD_Q);
  for (int64_t at = LANES; at < columns; at += LANES) {
    const __m512 some = D::load(logits + at);
    unordered |= _mm512_cmp_ps_mask(some, some, _CMP_UNORD_Q);
    most = _mm512_max_ps(most, some);
  }
  return unordered != 0 ? std::numeric_limits<float>::quiet_NaN() : _mm512_reduce_max_ps(most);
}

// The first place of `peak`, the largest of these logits.
template <typename D> AVX512_BF16 int64_t place_of(float peak, const Element<D> *logits) {
  const bool unordered = std::isnan(peak);
  for (int64_t at = 0;; at += LANES) {
    const __m512 some = D::load(logits + at);
    const __mmask16 found = unordered ? _mm512_cmp_ps_mask(some, some, _CMP_UNORD_Q)
                                      : _mm512_cmp_ps_mask(some, _mm512_set1_ps(peak), _CMP_EQ_OQ);
    if (found != 0) {
      return at + __builtin_ctz(found);
    }
  }
}

// Negative log-likelihood of `label`, given the largest logit.
template <typename D>
AVX512_BF16 float negative_log_likelihood(const Element<D> *logits, int64_t label, float peak, int64_t columns) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t at = 0; at < columns; at += LANES) {
    sum = _mm512_add_ps(sum, exponential(_mm512_sub_ps(D::load(logits + at), _mm512_set1_ps(peak))));
  }
  const int64_t at_label = label / LANES * LANES;
  const __mmask16 is_label = static_cast<__mmask16>(1u << (label - at_label));
  const float logit = _mm512_mask_reduce_add_ps(is_label, D::load(logits + at_label));
  return std::log(_mm512_reduce_add_ps(sum)) + (peak - logit);
}

} // namespace

extern "C" {

// Appends new tokens to a cache and lets them attend to it. query, out [t, n, d]; key, value [t, k, d]; rows int32
// [rows, 4]: the first new token of a row, the one after its last, its slot, its tokens in the cache so far; together they
// are all t in order, and no two have the same slot; keys [slots, k, d / w, columns, w]; values [slots, k, columns / w, d, w];
// prefix_keys and prefix_values the same with one slot, undefined where there is no prefix. All but rows bf16 or fp32.
int ft_cpu_cached_attention(void *query, void *key, void *value, void *rows, void *keys, void *values, void *prefix_keys,
                            void *prefix_values, int64_t prefix_length, double scale, void *out) {
  return recorded_by_dtype(kernels::cached_attention, {query, key, value}, [&](auto dtype) {
    using D = decltype(dtype);
    const Cache<D> cache(tensor(keys), tensor(values)), prefix(tensor(prefix_keys), tensor(prefix_values));
    for (void *packed : {query, key, value, out}) {
      TORCH_CHECK(tensor(packed).is_cpu() && tensor(packed).scalar_type() == D::KIND && tensor(packed).is_contiguous() &&
                      tensor(packed).dim() == 3 && tensor(packed).size(2) == cache.size,
                  "query, key, value and out must be contiguous ", D::KIND, " [t, heads, ", cache.size, "]");
    }
    const int64_t heads = tensor(query).size(1), tokens = tensor(query).size(0), kv_heads = cache.heads, size = cache.size;
    TORCH_CHECK(tensor(key).sizes() == tensor(value).sizes() && tensor(key).size(0) == tokens && tensor(key).size(1) == kv_heads &&
                    tensor(out).sizes() == tensor(query).sizes() && heads % kv_heads == 0,
                "query ", tensor(query).sizes(), ", key ", tensor(key).sizes(), ", value ", tensor(value).sizes(), " and out ",
                tensor(out).sizes(), " for a cache of ", kv_heads, " heads");
    TORCH_CHECK(0 <= prefix_length && prefix_length <= prefix.capacity &&
                    (prefix_length == 0 || (prefix.slots == 1 && prefix.size == size && prefix.heads == kv_heads)),
                "the prefix is not one of this cache");
    TORCH_CHECK(tensor(rows).is_cpu() && tensor(rows).is_contiguous() && tensor(rows).dim() == 2 && tensor(rows).size(1) == 4,
                "rows must be contiguous [rows, 4]");
    const auto *q = static_cast<const Element<D> *>(tensor(query).data_ptr());
    const auto *k = static_cast<const Element<D> *>(tensor(key).data_ptr());
    const auto *v = static_cast<const Element<D> *>(tensor(value).data_ptr());
    auto *o = static_cast<Element<D> *>(tensor(out).data_ptr());
    const int32_t *row = tensor(rows).data_ptr<int32_t>();
    const int64_t count = tensor(rows).size(0), group = heads / kv_heads;
    std::vector<bool> taken(cache.slots);
    int64_t seen = 0;
    for (int64_t index = 0; index < count; ++index) {
      const int64_t first = row[4 * index], end = row[4 * index + 1], slot = row[4 * index + 2], length = row[4 * index + 3];
      TORCH_CHECK(first == seen && first <= end && end <= tokens, "row ", index, " has the tokens from ", first, " to ", end,
                  " of ", tokens, ", expected from ", seen);
      TORCH_CHECK(0 <= slot && slot < cache.slots && !taken[slot] && 0 <= length && length + end - first <= cache.capacity,
                  "row ", index, " adds ", end - first, " tokens to ", length, " in slot ", slot, " of ", cache.slots,
                  " with room for ", cache.capacity);
      taken[slot] = true;
      seen = end;
    }
    TORCH_CHECK(seen == tokens, tokens - seen, " tokens belong to no row");
    // On whichever thread is free: rows differ in length.
    std::atomic<int64_t> next{0};
    at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
      Space<D> space;
      for (int64_t task; (task = next++) < count * kv_heads;) {
        const int32_t *place = row + task / kv_heads * 4;
        const int64_t head = task % kv_heads, first = place[0], new_tokens = place[1] - first, slot = place[2], length = place[3];
        for (int64_t token = 0; token < new_tokens; ++token) {
          const int64_t from = ((first + token) * kv_heads + head) * size;
          append<D>(cache.head_keys(slot, head), cache.head_values(slot, head), k + from, v + from, length + token,
                    cache.capacity, size);
        }
        const int64_t at = (first * heads + head * group) * size;
        attend<D>(q + at, o + at, heads * size, new_tokens, group, length, cache, slot, prefix, prefix_length, head,
                  static_cast<float>(scale), space);
      }
    });
  });
}

// The place of the largest of each row of logits [n, v], bf16 or fp32, the first of several and of NaN: places int64 [n].
int ft_cpu_argmax(void *logits, void *places) {
  return recorded_by_dtype(kernels::argmax, {logits}, [&](auto dtype) {
    using D = decltype(dtype);
    const Matrix<D> l(logits, "logits");
    int64_t *found = elements<int64_t>(places, "places", at::kLong, {l.rows});
    at::parallel_for(0, l.rows, 1, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        found[row] = place_of<D>(largest<D>(l.row(row), l.columns), l.row(row));
      }
    });
  });
}

// The negative log-likelihood of each label, int64 [n], under its row of logits [n, v], bf16 or fp32: losses fp32 [n] in nats;
// and whether the label is what ft_cpu_argmax finds: correct bool [n].
int ft_cpu_score(void *logits, void *labels, void *losses, void *correct) {
  return recorded_by_dtype(kernels::score, {logits, labels}, [&](auto dtype) {
    using D = decltype(dtype);
    const Matrix<D> l(logits, "logits");
    const int64_t *targets = elements<int64_t>(labels, "labels", at::kLong, {l.rows});
    float *loss = elements<float>(losses, "losses", at::kFloat, {l.rows});
    bool *hit = elements<bool>(correct, "correct", at::kBool, {l.rows});
    at::parallel_for(0, l.rows, 1, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        TORCH_CHECK(targets[row] >= 0 && targets[row] < l.columns, "label ", targets[row], " of ", l.columns);
        const float peak = largest<D>(l.row(row), l.columns);
        loss[row] = negative_log_likelihood<D>(l.row(row), targets[row], peak, l.columns);
        hit[row] = place_of<D>(peak, l.row(row)) == targets[row];
      }
    });
  });
}
}
