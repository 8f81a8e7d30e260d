// One row of dense → CSR: a mask of the entries, then their ids and values.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "bits.h"

namespace splade_kernels::cpu {

// Sets the bits of the non-zeros among the `count` largest entries of a row; returns how many. Ties go to the lowest
// id.
template <class F>
int64_t mask_row(
    Row<typename F::Bits> row, int64_t size, int64_t count, uint32_t* mask, std::vector<typename F::Bits>& keys) {
  using Bits = typename F::Bits;
  const int64_t words = divide_up(size, kWord);
  int64_t nonzeros = 0;
  for (int64_t w = 0; w < words; ++w) {
    mask[w] = nonzero_word<F>(row, w, size);
    nonzeros += std::popcount(mask[w]);
  }
  if (count >= size) return nonzeros;

  keys.clear();
  for (int64_t w = 0; w < words; ++w) for_each_bit(mask[w], w, [&](int64_t v) { keys.push_back(F::key(row[v])); });
  const int64_t positives = std::count_if(keys.begin(), keys.end(), F::positive);
  const int64_t kept = kept_nonzeros(count, positives, nonzeros, size);
  if (kept == nonzeros) return kept;
  if (kept == 0) {
    std::fill(mask, mask + words, 0);
    return 0;
  }
  const auto last = keys.begin() + (kept - 1);
  std::nth_element(keys.begin(), last, keys.end(), std::greater<Bits>());
  const Bits cut = *last;
  // Keys before `last` are at least the cut. Those equal to it are ties, and so is `last` itself.
  int64_t places = 1 + std::count(keys.begin(), last, cut);
  for (int64_t w = 0; w < words; ++w) {
    uint32_t word = mask[w];
    for_each_bit(mask[w], w, [&](int64_t v) {
      const Bits key = F::key(row[v]);
      if (key < cut || (key == cut && --places < 0)) word &= ~(uint32_t{1} << (v % kWord));
    });
    mask[w] = word;
  }
  return kept;
}

// Writes ids and values of the bits in a row's mask to [begin, end), which should have room for them; never past the
// end.
template <class Bits>
void gather_row(
    Row<Bits> row, int64_t size, const uint32_t* mask, int64_t begin, int64_t end, int64_t* columns, Bits* values) {
  const int64_t words = divide_up(size, kWord);
  // The row may have left the cache since its mask was made, and its few entries are far apart.
  for (int64_t w = 0; w < words; ++w) {
    for_each_bit(mask[w], w, [&](int64_t v) { __builtin_prefetch(&row.data[v * row.stride]); });
  }
  int64_t slot = begin;
  for (int64_t w = 0; w < words; ++w) {
    const int64_t left = size - w * kWord;
    const uint32_t word = left >= kWord ? mask[w] : mask[w] & ((uint32_t{1} << left) - 1);
    if (word == 0) continue;
    if (slot > end - std::popcount(word)) return;
    for_each_bit(word, w, [&](int64_t v) {
      columns[slot] = v;
      values[slot++] = row[v];
    });
  }
}

}  // namespace splade_kernels::cpu
