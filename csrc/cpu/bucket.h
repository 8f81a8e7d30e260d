// Stable counting sort of one sequence's active entries by token.
#pragma once

#include <vector>

#include "bits.h"

namespace splade_kernels::cpu {

// Memory that bucket_sequence reuses for the next sequence.
struct BucketScratch {
  std::vector<uint32_t> mask;
  std::vector<int32_t> cursors;
};

// Writes the sequence's vocabulary ids (words) and values from `offset` on, and the bounds of those rows that have
// entries. V < 2^31.
template <class Position>
void bucket_sequence(
    Row<Position> argmax, Row<uint32_t> grad, int64_t vocab_size, Segment segment, int64_t offset, int64_t* bounds,
    int32_t* words, uint32_t* values, BucketScratch& scratch) {
  if (segment.length == 0) return;
  const int64_t count = divide_up(vocab_size, kWord);
  scratch.mask.resize(static_cast<size_t>(count));
  scratch.cursors.assign(static_cast<size_t>(segment.length), 0);
  uint32_t* mask = scratch.mask.data();
  int32_t* cursors = scratch.cursors.data();

  for (int64_t w = 0; w < count; ++w) {
    mask[w] = nonzero_word<Float32>(grad, w, vocab_size);
    for_each_bit(mask[w], w, [&](int64_t v) { __builtin_prefetch(&argmax.data[v * argmax.stride]); });
  }
  for (int64_t w = 0; w < count; ++w) {
    uint32_t word = mask[w];
    for_each_bit(word, w, [&](int64_t v) {
      const int64_t position = argmax[v];
      if (position >= 0 && position < segment.length) {
        ++cursors[position];
      } else {
        word &= ~(uint32_t{1} << (v % kWord));
      }
    });
    mask[w] = word;
  }
  int32_t begin = 0;
  for (int64_t token = 0; token < segment.length; ++token) {
    const int32_t end = begin + cursors[token];
    if (end > begin) {
      bounds[2 * (segment.first + token)] = offset + begin;
      bounds[2 * (segment.first + token) + 1] = offset + end;
    }
    cursors[token] = begin;
    begin = end;
  }
  for (int64_t w = 0; w < count; ++w) {
    for_each_bit(mask[w], w, [&](int64_t v) {
      const int64_t slot = offset + cursors[argmax[v]]++;
      words[slot] = static_cast<int32_t>(v);
      values[slot] = grad[v];
    });
  }
}

}  // namespace splade_kernels::cpu
