// Attention of new tokens to what a key-value cache holds, and what is read off logits, in bf16 on CPUs with AVX512-BF16.
//
// A cache holds words of two bf16 that vdpbf16ps multiplies: keys [slot][head][pair of dims][column] and values
// [slot][head][pair of columns][dim]. So neither is packed again for every new token. Columns are a multiple of 16; unused
// ones hold any finite numbers. A prefix that all rows have in common is a cache of one slot beside it.
//
// One task is one row and one key-value head with its group of query heads. Scores and softmax are fp32, probabilities are
// rounded to bf16 where they enter the product, as in attention.cpp.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "avx512.h"
#include "guard.h"

namespace {

// Rows of a product whose sums stay in registers, beside four vectors of the other factor.
constexpr int MOST_ROWS = 6;
// Queries whose scores exist at once.
constexpr int64_t TILE = 4 * MOST_ROWS;

int64_t whole_vectors(int64_t size) { return (size + LANES - 1) / LANES * LANES; }

// c[R x 16 V] (+)= a[R x pairs] b[pairs x 16 V]
template <int R, int V>
INLINE void block(const uint32_t *a, int64_t a_stride, const uint32_t *b, int64_t b_stride, int64_t pairs, float *c,
                  int64_t c_stride, bool add) {
  __m512 sums[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      sums[r][v] = add ? _mm512_loadu_ps(c + r * c_stride + v * LANES) : _mm512_setzero_ps();
    }
  }
  for (int64_t p = 0; p < pairs; ++p) {
    for (int r = 0; r < R; ++r) {
      const __m512bh row = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[r * a_stride + p]));
      for (int v = 0; v < V; ++v) {
        const __m512bh columns = (__m512bh)_mm512_loadu_si512(b + p * b_stride + v * LANES);
        sums[r][v] = _mm512_dpbf16_ps(sums[r][v], row, columns);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      _mm512_storeu_ps(c + r * c_stride + v * LANES, sums[r][v]);
    }
  }
}

template <int R>
AVX512 void some_rows(const uint32_t *a, int64_t a_stride, const uint32_t *b, int64_t b_stride, int64_t pairs, float *c,
                      int64_t c_stride, int64_t columns, bool add) {
  int64_t at = 0;
  for (; at + 4 * LANES <= columns; at += 4 * LANES) {
    block<R, 4>(a, a_stride, b + at, b_stride, pairs, c + at, c_stride, add);
  }
  for (; at < columns; at += LANES) {
    block<R, 1>(a, a_stride, b + at, b_stride, pairs, c + at, c_stride, add);
  }
}

// c[count x columns] (+)= a[count x pairs] b[pairs x columns]; columns are whole vectors.
AVX512 void product(const uint32_t *a, int64_t a_stride, const uint32_t *b, int64_t b_stride, int64_t pairs, float *c,
                    int64_t c_stride, int64_t count, int64_t columns, bool add) {
  for (int64_t first = 0; first < count; first += MOST_ROWS) {
    const uint32_t *rows = a + first * a_stride;
    float *sums = c + first * c_stride;
    switch (std::min<int64_t>(count - first, MOST_ROWS)) {
    case 1: some_rows<1>(rows, a_stride, b, b_stride, pairs, sums, c_stride, columns, add); break;
    case 2: some_rows<2>(rows, a_stride, b, b_stride, pairs, sums, c_stride, columns, add); break;
    case 3: some_rows<3>(rows, a_stride, b, b_stride, pairs, sums, c_stride, columns, add); break;
    case 4: some_rows<4>(rows, a_stride, b, b_stride, pairs, sums, c_stride, columns, add); break;
    case 5: some_rows<5>(rows, a_stride, b, b_stride, pairs, sums, c_stride, columns, add); break;
    default: some_rows<6>(rows, a_stride, b, b_stride, pairs, sums, c_stride, columns, add); break;
    }
  }
}

// Keys and values of one layer. An undefined tensor is an empty cache.
struct Cache {
  uint32_t *keys = nullptr, *values = nullptr;
  int64_t slots = 0, heads = 0, size = 0, capacity = 0;

  Cache(const at::Tensor &k, const at::Tensor &v) {
    if (!k.defined()) {
      return;
    }
    for (const at::Tensor &tensor : {k, v}) {
      TORCH_CHECK(tensor.scalar_type() == at::kBFloat16 && tensor.is_contiguous() && tensor.dim() == 5 && tensor.size(4) == 2,
                  "a cache must be contiguous bf16 [slots, heads, …, …, 2]");
    }
    slots = k.size(0), heads = k.size(1), size = 2 * k.size(2), capacity = k.size(3);
    TORCH_CHECK(v.size(0) == slots && v.size(1) == heads && v.size(2) == capacity / 2 && v.size(3) == size,
                "keys ", k.sizes(), " and values ", v.sizes(), " are of different caches");
    TORCH_CHECK(capacity % LANES == 0 && size % (2 * LANES) == 0, "columns must be a multiple of 16, a head of 32");
    keys = static_cast<uint32_t *>(k.data_ptr());
    values = static_cast<uint32_t *>(v.data_ptr());
  }
  uint32_t *head_keys(int64_t slot, int64_t head) const { return keys + (slot * heads + head) * capacity * size / 2; }
  uint32_t *head_values(int64_t slot, int64_t head) const { return values + (slot * heads + head) * capacity * size / 2; }
};

// Appends a token at `column`.
void append(uint32_t *keys, uint32_t *values, const uint16_t *key, const uint16_t *value, int64_t column, int64_t capacity,
            int64_t size) {
  for (int64_t pair = 0; pair < size / 2; ++pair) {
    std::memcpy(keys + pair * capacity + column, key + 2 * pair, sizeof(uint32_t));
  }
  auto *to = reinterpret_cast<uint16_t *>(values + column / 2 * size) + column % 2;
  for (int64_t dim = 0; dim < size; ++dim) {
    to[2 * dim] = value[dim];
  }
}

struct Space {
  std::vector<uint16_t> queries, probabilities;
  std::vector<float> scores, sums;
};

// Probabilities of one query, not yet divided by their sum, which is returned. It sees the columns below `prefix`, and
// `own` columns from `offset` on.
AVX512 float softmax(const float *scores, uint16_t *probabilities, int64_t prefix, int64_t offset, int64_t own, int64_t columns,
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
    Bf16::store(probabilities + at, p);
  }
  return _mm512_reduce_add_ps(sum);
}

// New tokens of one row in one key-value head: query and out begin at its first query head, `stride` apart from token to
// token. The new keys and values are in the cache already.
AVX512 void attend(const uint16_t *query, uint16_t *out, int64_t stride, int64_t tokens, int64_t group, int64_t length,
                   const Cache &cache, int64_t slot, const Cache &prefix, int64_t prefix_length, int64_t head, float scale,
                   Space &space) {
  const int64_t size = cache.size, offset = whole_vectors(prefix_length);
  const int64_t width = offset + whole_vectors(length + tokens);
  space.queries.resize(TILE * size);
  space.sums.resize(TILE * size);
  space.scores.resize(TILE * width);
  space.probabilities.resize(TILE * width);
  for (int64_t first = 0; first < tokens * group; first += TILE) {
    const int64_t count = std::min(TILE, tokens * group - first);
    const auto at = [&](int64_t row) { return (first + row) / group * stride + (first + row) % group * size; };
    for (int64_t row = 0; row < count; ++row) {
      std::memcpy(space.queries.data() + row * size, query + at(row), size * sizeof(uint16_t));
    }
    const int64_t own_columns = whole_vectors(length + (first + count - 1) / group + 1), columns = offset + own_columns;
    const auto *words = reinterpret_cast<const uint32_t *>(space.queries.data());
    if (offset > 0) {
      product(words, size / 2, prefix.head_keys(0, head), prefix.capacity, size / 2, space.scores.data(), width, count, offset,
              false);
    }
    product(words, size / 2, cache.head_keys(slot, head), cache.capacity, size / 2, space.scores.data() + offset, width, count,
            own_columns, false);
    float inverse[TILE];
    for (int64_t row = 0; row < count; ++row) {
      const int64_t own = length + (first + row) / group + 1;
      inverse[row] = 1.0f / softmax(space.scores.data() + row * width, space.probabilities.data() + row * width, prefix_length,
                                    offset, own, columns, scale);
    }
    const auto *p = reinterpret_cast<const uint32_t *>(space.probabilities.data());
    if (offset > 0) {
      product(p, width / 2, prefix.head_values(0, head), size, offset / 2, space.sums.data(), size, count, size, false);
    }
    product(p + offset / 2, width / 2, cache.head_values(slot, head), size, own_columns / 2, space.sums.data(), size, count, size,
            offset > 0);
    for (int64_t row = 0; row < count; ++row) {
      for (int64_t dim = 0; dim < size; dim += LANES) {
        const __m512 sums = _mm512_loadu_ps(space.sums.data() + row * size + dim);
        Bf16::store(out + at(row) + dim, _mm512_mul_ps(sums, _mm512_set1_ps(inverse[row])));
      }
    }
  }
}

// The largest logit; NaN where there is one, as in torch.
AVX512 float largest(const uint16_t *logits, int64_t columns) {
  __m512 most = Bf16::load(logits);
  __mmask16 unordered = _mm512_cmp_ps_mask(most, most, _CMP_UNORD_Q);
  for (int64_t at = LANES; at < columns; at += LANES) {
    const __m512 some = Bf16::load(logits + at);
    unordered |= _mm512_cmp_ps_mask(some, some, _CMP_UNORD_Q);
    most = _mm512_max_ps(most, some);
  }
  return unordered != 0 ? std::numeric_limits<float>::quiet_NaN() : _mm512_reduce_max_ps(most);
}

// The first place of `peak`, the largest of these logits.
AVX512 int64_t place_of(float peak, const uint16_t *logits) {
  const bool unordered = std::isnan(peak);
  for (int64_t at = 0;; at += LANES) {
    const __m512 some = Bf16::load(logits + at);
    const __mmask16 found = unordered ? _mm512_cmp_ps_mask(some, some, _CMP_UNORD_Q)
                                      : _mm512_cmp_ps_mask(some, _mm512_set1_ps(peak), _CMP_EQ_OQ);
    if (found != 0) {
      return at + __builtin_ctz(found);
    }
  }
}

// Negative log-likelihood of `label`.
AVX512 float negative_log_likelihood(const uint16_t *logits, int64_t label, float peak, int64_t columns) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t at = 0; at < columns; at += LANES) {
    sum = _mm512_add_ps(sum, exponential(_mm512_sub_ps(Bf16::load(logits + at), _mm512_set1_ps(peak))));
  }
  const uint32_t bits = static_cast<uint32_t>(logits[label]) << 16;
  float logit;
  std::memcpy(&logit, &bits, sizeof logit);
  return std::log(_mm512_reduce_add_ps(sum)) + (peak - logit);
}

struct Logits {
  const uint16_t *data;
  int64_t rows, columns;

  explicit Logits(const at::Tensor &tensor)
      : data(static_cast<const uint16_t *>(tensor.data_ptr())), rows(tensor.size(0)), columns(tensor.size(1)) {
    TORCH_CHECK(tensor.scalar_type() == at::kBFloat16 && tensor.is_contiguous() && tensor.dim() == 2 && columns > 0 &&
                    columns % LANES == 0,
                "logits must be contiguous bf16 [rows, a multiple of 16]");
  }
  const uint16_t *row(int64_t index) const { return data + index * columns; }

  // The data of a tensor that has a number for each row.
  template <typename T> T *of_each_row(void *handle, const char *name) const {
    TORCH_CHECK(tensor(handle).is_contiguous() && tensor(handle).dim() == 1 && tensor(handle).size(0) == rows, name,
                " must be contiguous [", rows, "]");
    return tensor(handle).data_ptr<T>();
  }
};

} // namespace

extern "C" {

// Appends new tokens to a cache and lets them attend to it. query, out [t, n, d]; key, value [t, k, d]; rows int32
// [rows, 4]: the first new token of a row, the one after its last, its slot, its tokens in the cache so far; together they
// are all t in order, and no two have the same slot; keys [slots, k, d / 2, columns, 2]; values [slots, k, columns / 2, d, 2];
// prefix_keys and prefix_values the same with one slot, undefined where there is no prefix. All bf16 but rows.
int ft_cpu_cached_attention(void *query, void *key, void *value, void *rows, void *keys, void *values, void *prefix_keys,
                            void *prefix_values, int64_t prefix_length, double scale, void *out) {
  return recorded("finetune::cached_attention", {query, key, value}, [&] {
    const Cache cache(tensor(keys), tensor(values)), prefix(tensor(prefix_keys), tensor(prefix_values));
    for (void *packed : {query, key, value, out}) {
      TORCH_CHECK(tensor(packed).scalar_type() == at::kBFloat16 && tensor(packed).is_contiguous() && tensor(packed).dim() == 3 &&
                      tensor(packed).size(2) == cache.size,
                  "query, key, value and out must be contiguous bf16 [t, heads, ", cache.size, "]");
    }
    const int64_t heads = tensor(query).size(1), tokens = tensor(query).size(0), kv_heads = cache.heads, size = cache.size;
    TORCH_CHECK(tensor(key).sizes() == tensor(value).sizes() && tensor(key).size(0) == tokens && tensor(key).size(1) == kv_heads &&
                    tensor(out).sizes() == tensor(query).sizes() && heads % kv_heads == 0,
                "query ", tensor(query).sizes(), ", key ", tensor(key).sizes(), ", value ", tensor(value).sizes(), " and out ",
                tensor(out).sizes(), " for a cache of ", kv_heads, " heads");
    TORCH_CHECK(0 <= prefix_length && prefix_length <= prefix.capacity &&
                    (prefix_length == 0 || (prefix.slots == 1 && prefix.size == size && prefix.heads == kv_heads)),
                "the prefix is not one of this cache");
    TORCH_CHECK(tensor(rows).is_contiguous() && tensor(rows).dim() == 2 && tensor(rows).size(1) == 4,
                "rows must be contiguous [rows, 4]");
    const auto *q = static_cast<const uint16_t *>(tensor(query).data_ptr());
    const auto *k = static_cast<const uint16_t *>(tensor(key).data_ptr());
    const auto *v = static_cast<const uint16_t *>(tensor(value).data_ptr());
    auto *o = static_cast<uint16_t *>(tensor(out).data_ptr());
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
      Space space;
      for (int64_t task; (task = next++) < count * kv_heads;) {
        const int32_t *place = row + task / kv_heads * 4;
        const int64_t head = task % kv_heads, first = place[0], new_tokens = place[1] - first, slot = place[2], length = place[3];
        for (int64_t token = 0; token < new_tokens; ++token) {
          const int64_t from = ((first + token) * kv_heads + head) * size;
          append(cache.head_keys(slot, head), cache.head_values(slot, head), k + from, v + from, length + token, cache.capacity,
                 size);
        }
        const int64_t at = (first * heads + head * group) * size;
        attend(q + at, o + at, heads * size, new_tokens, group, length, cache, slot, prefix, prefix_length, head,
               static_cast<float>(scale), space);
      }
    });
  });
}

// The place of the largest of each row of logits [n, v], the first of several and of NaN: places int64 [n].
int ft_cpu_argmax(void *logits, void *places) {
  return recorded("finetune::argmax", {logits}, [&] {
    const Logits l(tensor(logits));
    int64_t *found = l.of_each_row<int64_t>(places, "places");
    at::parallel_for(0, l.rows, 1, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        found[row] = place_of(largest(l.row(row), l.columns), l.row(row));
      }
    });
  });
}

// The negative log-likelihood of each label, int64 [n], under its row of logits [n, v]: losses fp32 [n] in nats; and whether the
// label is what ft_cpu_argmax finds: correct bool [n].
int ft_cpu_score(void *logits, void *labels, void *losses, void *correct) {
  return recorded("finetune::score", {logits, labels}, [&] {
    const Logits l(tensor(logits));
    const int64_t *targets = l.of_each_row<int64_t>(labels, "labels");
    float *loss = l.of_each_row<float>(losses, "losses");
    bool *hit = l.of_each_row<bool>(correct, "correct");
    at::parallel_for(0, l.rows, 1, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        TORCH_CHECK(targets[row] >= 0 && targets[row] < l.columns, "label ", targets[row], " of ", l.columns);
        const float peak = largest(l.row(row), l.columns);
        loss[row] = negative_log_likelihood(l.row(row), targets[row], peak, l.columns);
        hit[row] = place_of(peak, l.row(row)) == targets[row];
      }
    });
  });
}
}
