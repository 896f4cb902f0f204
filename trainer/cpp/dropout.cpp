// Masks of dropout, as src/dropout.rs defines and writes them out. Integers alone decide, so every variant gives the same bits.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "philox.h"

// Compiled for the instructions of the variant that it becomes part of.
#define INLINE inline __attribute__((always_inline))

namespace {

// Counters at once, as many as a vector of AVX-512 holds, and the columns that their words are for.
constexpr int64_t COUNTERS = 16, COLUMNS = 4 * COUNTERS;
// Elements that are worth a thread of their own.
constexpr int64_t LEAST = 16384;

// What a mask is made from, and its place; `Bits` are those of an element in bf16 or fp32.
template <typename Bits> struct Rows {
  const int64_t *keys, *positions;
  uint32_t site, threshold;
  Bits kept;
  Bits *out;
  int64_t columns;
};

// `rows` by value: nothing that is written may be one of its numbers.
template <typename Bits> INLINE void fill(const Rows<Bits> rows, int64_t first_row, int64_t last_row) {
  const auto element = [&](uint32_t word) { return word >= rows.threshold ? rows.kept : Bits(0); };
  for (int64_t row = first_row; row < last_row; row++) {
    const auto key = static_cast<uint64_t>(rows.keys[row]);
    const auto position = static_cast<uint32_t>(rows.positions[row]);
    for (int64_t column = 0; column < rows.columns; column += COLUMNS) {
      Bits elements[COLUMNS];
      for (uint32_t i = 0; i < COUNTERS; i++) {
        const philox::Words words = philox::words({static_cast<uint32_t>(column / 4) + i, position, rows.site, 0}, key);
        elements[4 * i] = element(words.a);
        elements[4 * i + 1] = element(words.b);
        elements[4 * i + 2] = element(words.c);
        elements[4 * i + 3] = element(words.d);
      }
      std::copy_n(elements, std::min(COLUMNS, rows.columns - column), rows.out + row * rows.columns + column);
    }
  }
}

template <typename Bits> void fill_baseline(const Rows<Bits> &rows, int64_t first, int64_t last) {
  fill(rows, first, last);
}

#if defined(__x86_64__)
template <typename Bits> AVX512 void fill_avx512(const Rows<Bits> &rows, int64_t first, int64_t last) {
  fill(rows, first, last);
}
#endif

template <typename Bits> void fill_all(const Rows<Bits> &rows, int64_t count, Instructions variant) {
  auto *filled = fill_baseline<Bits>;
#if defined(__x86_64__)
  if (variant == Instructions::Avx512) {
    filled = fill_avx512<Bits>;
  }
#endif
  TORCH_INTERNAL_ASSERT(variant == Instructions::Avx512 || variant == Instructions::Baseline, "the table has a variant of dropout "
                        "that is not here");
  at::parallel_for(0, count, LEAST / std::clamp<int64_t>(rows.columns, 1, LEAST),
                   [&](int64_t first, int64_t last) { filled(rows, first, last); });
}

template <typename To, typename From> To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

} // namespace

extern "C" {

// out [t, columns], bf16 or fp32: `kept`, a number of that dtype, or 0 where a column's word is below `threshold`. keys and
// positions int64 [t].
int ft_cpu_dropout(void *keys, void *positions, uint32_t site, uint32_t threshold, double kept, void *out) {
  return recorded(kernels::dropout, {keys, out}, [&](Instructions variant) {
    const at::IntArrayRef shape = tensor(out).sizes();
    TORCH_CHECK(shape.size() == 2, "out must be a matrix, found ", shape);
    const auto *key = elements<int64_t>(keys, "keys", at::kLong, {shape[0]});
    const auto *position = elements<int64_t>(positions, "positions", at::kLong, {shape[0]});
    const auto value = static_cast<float>(kept);
    const auto fill_with = [&](auto bits, at::ScalarType type) {
      using Bits = decltype(bits);
      auto *to = elements<Bits>(out, "out", type, shape);
      fill_all<Bits>({key, position, site, threshold, bits, to, shape[1]}, shape[0], variant);
    };
    if (tensor(out).scalar_type() == at::kBFloat16) {
      fill_with(bits_of<uint16_t>(c10::BFloat16(value)), at::kBFloat16);
    } else {
      fill_with(bits_of<uint32_t>(value), at::kFloat);
    }
  });
}
}
