// Products of small matrices whose sums stay in registers, in the dtypes of avx512.h.
//
// A word is two bf16 that are multiplied together, both products added to an fp32 lane, or one fp32.

#pragma once

#include <new>
#include <vector>

#include "avx512.h"

namespace {

// Rows of a product whose sums stay in registers, beside four vectors of the other factor.
constexpr int ROWS = 6;

// Memory in which a vector that begins at a multiple of its size is in one line of the cache: one across two lines takes twice as
// long to load.
template <typename T> struct CacheAligned {
  using value_type = T;

  CacheAligned() = default;
  template <typename U> CacheAligned(const CacheAligned<U> &) {}
  T *allocate(size_t count) { return static_cast<T *>(::operator new(count * sizeof(T), std::align_val_t{64})); }
  void deallocate(T *memory, size_t) { ::operator delete(memory, std::align_val_t{64}); }
  template <typename U> bool operator==(const CacheAligned<U> &) const { return true; }
  template <typename U> bool operator!=(const CacheAligned<U> &) const { return false; }
};

template <typename T> using Numbers = std::vector<T, CacheAligned<T>>;

// Numbers up to whole vectors, or to parts of one.
int64_t padded(int64_t size, int64_t part = LANES) { return (size + part - 1) / part * part; }

// Factor `a`: its word of a row and of an inner place is at a[row * row_stride + place * place_stride].
struct Words {
  const uint32_t *data;
  int64_t row_stride;
  int64_t place_stride;
};

// c[R x 16 V] (+)= a[R x words] b[words x 16 V]; with HALF, 8 columns more, and V may be 0, which no array may.
template <typename D, int R, int V, bool HALF>
INLINE void block(Words a, const uint32_t *b, int64_t b_stride, int64_t words, float *c, int64_t c_stride, bool add) {
  __m512 sums[R][V + 1];
  [[maybe_unused]] __m256 halves[R];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      sums[r][v] = add ? _mm512_loadu_ps(c + r * c_stride + v * LANES) : _mm512_setzero_ps();
    }
    if constexpr (HALF) {
      halves[r] = add ? _mm256_loadu_ps(c + r * c_stride + V * LANES) : _mm256_setzero_ps();
    }
  }
  for (int64_t p = 0; p < words; ++p) {
    __m512i columns[V + 1];
    [[maybe_unused]] __m256i half;
    for (int v = 0; v < V; ++v) {
      columns[v] = _mm512_loadu_si512(b + p * b_stride + v * LANES);
    }
    if constexpr (HALF) {
      half = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(b + p * b_stride + V * LANES));
    }
    for (int r = 0; r < R; ++r) {
      const uint32_t row = a.data[r * a.row_stride + p * a.place_stride];
      for (int v = 0; v < V; ++v) {
        sums[r][v] = D::multiply_add(sums[r][v], row, columns[v]);
      }
      if constexpr (HALF) {
        halves[r] = D::multiply_add(halves[r], row, half);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      _mm512_storeu_ps(c + r * c_stride + v * LANES, sums[r][v]);
    }
    if constexpr (HALF) {
      _mm256_storeu_ps(c + r * c_stride + V * LANES, halves[r]);
    }
  }
}

template <typename D, int V, bool HALF = false>
AVX512_BF16 void rows(Words a, const uint32_t *b, int64_t b_stride, int64_t words, float *c, int64_t c_stride, int64_t count,
                 bool add) {
  for (; count >= ROWS; count -= ROWS, a.data += ROWS * a.row_stride, c += ROWS * c_stride) {
    block<D, ROWS, V, HALF>(a, b, b_stride, words, c, c_stride, add);
  }
  switch (count) {
  case 5: block<D, 5, V, HALF>(a, b, b_stride, words, c, c_stride, add); break;
  case 4: block<D, 4, V, HALF>(a, b, b_stride, words, c, c_stride, add); break;
  case 3: block<D, 3, V, HALF>(a, b, b_stride, words, c, c_stride, add); break;
  case 2: block<D, 2, V, HALF>(a, b, b_stride, words, c, c_stride, add); break;
  case 1: block<D, 1, V, HALF>(a, b, b_stride, words, c, c_stride, add); break;
  default: break;
  }
}

// c[count x columns] (+)= a[count x words] b[words x columns]; columns are a multiple of half a vector.
template <typename D>
AVX512_BF16 void product(Words a, const uint32_t *b, int64_t b_stride, int64_t words, float *c, int64_t c_stride, int64_t count,
                    int64_t columns, bool add) {
  int64_t at = 0;
  for (; at + 4 * LANES <= columns; at += 4 * LANES) {
    rows<D, 4>(a, b + at, b_stride, words, c + at, c_stride, count, add);
  }
  for (; at + 2 * LANES <= columns; at += 2 * LANES) {
    rows<D, 2>(a, b + at, b_stride, words, c + at, c_stride, count, add);
  }
  switch (columns - at) {
  case LANES + LANES / 2: rows<D, 1, true>(a, b + at, b_stride, words, c + at, c_stride, count, add); break;
  case LANES: rows<D, 1>(a, b + at, b_stride, words, c + at, c_stride, count, add); break;
  case LANES / 2: rows<D, 0, true>(a, b + at, b_stride, words, c + at, c_stride, count, add); break;
  default: break;
  }
}

} // namespace
