// Products of few rows with weights, in bf16 and fp32 on CPUs with AVX512-BF16. libtorch's product brings the whole weight into
// an order of its own in every call, which takes longer than multiplying it with the newest tokens of a hundred answers. Here
// the few rows are brought into order, and the weight is read as it lies in memory, once for all of them.
//
// A lane is a row of x. Sums are fp32 and rounded once.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "product.h"

namespace {

// Rows of x whose sums are there at once.
constexpr int64_t TILE = 4 * LANES;
// Words of a row that are multiplied before the next output's: those of a tile stay in the first-level cache.
constexpr int64_t DEPTH = 96;
// Outputs whose sums wait for the next words.
constexpr int64_t OUTPUTS = 48;
static_assert(OUTPUTS % LANES == 0 && OUTPUTS % ROWS == 0, "no tile of sums is cut but the last");
// Vectors that are worth a thread of their own when rows are brought into order.
constexpr int64_t LEAST_VECTORS = 512;

INLINE __m512 low_pairs(__m512 a, __m512 b) {
  return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}

INLINE __m512 high_pairs(__m512 a, __m512 b) {
  return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}

// Rows become columns.
INLINE void transpose(__m512 (&m)[LANES]) {
  __m512 t[LANES];
#pragma GCC unroll 8
  for (int i = 0; i < LANES; i += 2) {
    t[i] = _mm512_unpacklo_ps(m[i], m[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(m[i], m[i + 1]);
  }
  // In each quarter of a vector: one column of four rows.
#pragma GCC unroll 4
  for (int i = 0; i < LANES; i += 4) {
    m[i] = low_pairs(t[i], t[i + 2]);
    m[i + 1] = high_pairs(t[i], t[i + 2]);
    m[i + 2] = low_pairs(t[i + 1], t[i + 3]);
    m[i + 3] = high_pairs(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 even_low = _mm512_shuffle_f32x4(m[i], m[i + 4], 0x88), odd_low = _mm512_shuffle_f32x4(m[i], m[i + 4], 0xdd);
    const __m512 even_high = _mm512_shuffle_f32x4(m[i + 8], m[i + 12], 0x88);
    const __m512 odd_high = _mm512_shuffle_f32x4(m[i + 8], m[i + 12], 0xdd);
    t[i] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    t[i + 8] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
    t[i + 12] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
  }
  std::copy(t, t + LANES, m);
}

// x [rows, words] in tiles of TILE rows, each [word][row]; rows of the last tile are padded with zeros to whole vectors.
struct RowsAsLanes {
  int64_t rows, words;
  at::Tensor memory;
  uint32_t *data;

  RowsAsLanes(const uint32_t *x, int64_t rows, int64_t words)
      : rows(rows), words(words), memory(at::empty({padded(rows) * words}, at::kInt)),
        data(static_cast<uint32_t *>(memory.data_ptr())) {
    const int64_t vectors = padded(rows) / LANES;
    at::parallel_for(0, vectors, std::max<int64_t>(1, LEAST_VECTORS / words), [&](int64_t first, int64_t last) {
      for (int64_t vector = first; vector < last; ++vector) {
        order(x, vector * LANES);
      }
    });
  }
  int64_t width(int64_t tile) const { return std::min(TILE, padded(rows) - tile * TILE); }
  // Without the second half of the last vector where no row is in it.
  int64_t computed_width(int64_t tile) const { return std::min(TILE, padded(rows, LANES / 2) - tile * TILE); }
  uint32_t *tile(int64_t index) const { return data + index * TILE * words; }

private:
  AVX512_BF16 void order(const uint32_t *x, int64_t row) {
    const int64_t stride = width(row / TILE), count = std::min(LANES, rows - row);
    uint32_t *to = tile(row / TILE) + row % TILE;
    for (int64_t word = 0; word < words; word += LANES) {
      const int64_t some = std::min(LANES, words - word);
      const auto there = static_cast<__mmask16>((1u << some) - 1u);
      __m512 block[LANES];
      for (int64_t lane = 0; lane < LANES; ++lane) {
        block[lane] = lane < count ? _mm512_maskz_loadu_ps(there, x + (row + lane) * words + word) : _mm512_setzero_ps();
      }
      transpose(block);
      for (int64_t lane = 0; lane < some; ++lane) {
        _mm512_storeu_ps(to + (word + lane) * stride, block[lane]);
      }
    }
  }
};

// What becomes of what is in the output already.
enum class Before { Replaced, AddedTo };

// Brings sums [output][row of a tile] to out [rows][outputs]. What is beside them in a vector is read, whatever it is, and goes
// nowhere.
template <typename D>
AVX512_BF16 void write_transposed(const float *sums, int64_t rows, int64_t outputs, Element<D> *out, int64_t stride, Before before) {
  for (int64_t output = 0; output < outputs; output += LANES) {
    const int64_t some = std::min(LANES, outputs - output);
    for (int64_t row = 0; row < rows; row += LANES) {
      __m512 block[LANES];
      for (int64_t lane = 0; lane < LANES; ++lane) {
        block[lane] = lane < some ? _mm512_loadu_ps(sums + (output + lane) * TILE + row) : _mm512_setzero_ps();
      }
      transpose(block);
      for (int64_t lane = 0; lane < std::min(LANES, rows - row); ++lane) {
        Element<D> *to = out + (row + lane) * stride + output;
        if (some == LANES) {
          D::store(to, before == Before::AddedTo ? _mm512_add_ps(D::load(to), block[lane]) : block[lane]);
          continue;
        }
        Element<D> whole[LANES] = {};
        std::memcpy(whole, to, some * sizeof(Element<D>));
        D::store(whole, before == Before::AddedTo ? _mm512_add_ps(D::load(whole), block[lane]) : block[lane]);
        std::memcpy(to, whole, some * sizeof(Element<D>));
      }
    }
  }
}

// Some words of the next rows of the weight are on their way from memory while those before them are multiplied. There need
// not be such rows.
void prefetch(const uint32_t *weight, int64_t stride, int64_t words) {
  for (int row = 0; row < ROWS; ++row) {
    for (int64_t word = 0; word < words; word += LANES) {
      __builtin_prefetch(weight + row * stride + word);
    }
  }
}

// Some outputs of a product: rows of its weight, and the places of the first row's outputs.
template <typename D> struct Piece {
  const uint32_t *weight;
  Element<D> *out;
  int64_t outputs, stride;
};

template <typename D> AVX512_BF16 void some_outputs(const RowsAsLanes &x, const Piece<D> &piece, Before before) {
  const auto [weight, out, outputs, stride] = piece;
  alignas(64) float sums[OUTPUTS * TILE];
  for (int64_t tile = 0; tile * TILE < x.rows; ++tile) {
    const int64_t width = x.width(tile);
    for (int64_t word = 0; word < x.words; word += DEPTH) {
      const int64_t depth = std::min(DEPTH, x.words - word);
      const uint32_t *after = word + depth < x.words ? weight + word + depth : weight + outputs * x.words;
      for (int64_t output = 0; output < outputs; output += ROWS) {
        const uint32_t *from = weight + output * x.words + word;
        prefetch(output + ROWS < outputs ? from + ROWS * x.words : after, x.words, depth);
        product<D>({from, x.words, 1}, x.tile(tile) + word * width, width, depth, sums + output * TILE, TILE,
                   std::min<int64_t>(ROWS, outputs - output), x.computed_width(tile), word > 0);
      }
    }
    write_transposed<D>(sums, std::min(TILE, x.rows - tile * TILE), outputs, out + tile * TILE * stride, stride, before);
  }
}

} // namespace

extern "C" {

// x [t, in] times each weight [out, in] transposed, in bf16 or fp32: written to its out [t, out], or added to it where `add` is
// not 0. The first of the inputs is x, the others are weights; there is an out for each weight.
int ft_cpu_linear(void *const *inputs, void *const *outs, int num_weights, int add) {
  return recorded_by_dtype(kernels::linear, {inputs, static_cast<size_t>(num_weights) + 1}, [&](auto dtype) {
    using D = decltype(dtype);
    const at::Tensor &x = tensor(inputs[0]);
    TORCH_CHECK(x.dim() == 2, "x must be a matrix, found ", x.sizes());
    const int64_t rows = x.size(0), width = x.size(1), words = width / D::PER_WORD;
    TORCH_CHECK(width > 0 && width % D::PER_WORD == 0, "x must be a multiple of ", D::PER_WORD, " wide, found ", x.sizes());
    const auto *from = elements<const uint32_t>(inputs[0], "x", D::KIND, {rows, width});
    std::vector<Piece<D>> pieces;
    for (int index = 0; index < num_weights; ++index) {
      const at::Tensor &weight = tensor(inputs[1 + index]);
      TORCH_CHECK(weight.dim() == 2, "weight must be a matrix, found ", weight.sizes());
      const int64_t outputs = weight.size(0);
      const auto *w = elements<const uint32_t>(inputs[1 + index], "weight", D::KIND, {outputs, width});
      auto *out = elements<Element<D>>(outs[index], "out", D::KIND, {rows, outputs});
      for (int64_t output = 0; output < outputs; output += OUTPUTS) {
        pieces.push_back({w + output * words, out + output, std::min(OUTPUTS, outputs - output), outputs});
      }
    }
    const RowsAsLanes lanes(from, rows, words);
    const Before before = add ? Before::AddedTo : Before::Replaced;
    at::parallel_for(0, static_cast<int64_t>(pieces.size()), 1, [&](int64_t first, int64_t last) {
      for (int64_t piece = first; piece < last; ++piece) {
        some_outputs<D>(lanes, pieces[piece], before);
      }
    });
  });
}
}
