// Finds the non-zeros of a row, 32 at a time. This loop reads all of the input; any compiler vectorises it for the
// baseline instruction set of a 64-bit machine.
#pragma once

#include <bit>
#include <cstring>

#include "../arithmetic.h"

namespace splade_kernels::cpu {

static_assert(std::endian::native == std::endian::little, "the mask gathers eight bytes at a time");

// A row of V elements, `stride` apart.
template <class T>
struct Row {
  const T* data;
  int64_t stride;

  T operator[](int64_t v) const { return data[v * stride]; }
};

// Bit i is set when element i of 32 is neither 0 nor -0.
template <class F>
inline uint32_t nonzero_bits(const typename F::Bits* x) {
  using Bits = typename F::Bits;
  // Most mask words of a sparse row are zero, which an OR over the elements detects in a quarter of the time.
  Bits any = 0;
  for (int i = 0; i < kWord; ++i) any = static_cast<Bits>(any | x[i]);
  if (!F::nonzero(any)) return 0;
  uint8_t flags[kWord];
  for (int i = 0; i < kWord; ++i) flags[i] = F::nonzero(x[i]);
  uint32_t word = 0;
  for (int i = 0; i < kWord; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, flags + i, sizeof(eight));
    // The bit of byte j moves to bit 56 + j: 8 j + 7 (8 - j).
    word |= static_cast<uint32_t>((eight * 0x0102040810204080) >> 56) << i;
  }
  return word;
}

// The same for the elements [32 w, 32 w + 32) of a row of any stride; bits past the end of the row are 0.
template <class F>
inline uint32_t nonzero_word(Row<typename F::Bits> row, int64_t w, int64_t size) {
  const int64_t first = w * kWord;
  if (row.stride == 1 && first + kWord <= size) return nonzero_bits<F>(row.data + first);
  typename F::Bits copy[kWord] = {};
  for (int64_t i = 0; i < kWord && first + i < size; ++i) copy[i] = row[first + i];
  return nonzero_bits<F>(copy);
}

// Calls f(v) for every bit of word w, ascending.
template <class Function>
inline void for_each_bit(uint32_t word, int64_t w, Function&& f) {
  const int64_t first = w * kWord;
  if (word == ~uint32_t{0}) {
    for (int i = 0; i < kWord; ++i) f(first + i);
    return;
  }
  for (; word != 0; word &= word - 1) f(first + std::countr_zero(word));
}

}  // namespace splade_kernels::cpu
