// Both gradients of the maximum in one pass over the vocabulary: each row of W is read once, each row of dW written
// once, and dh accumulated.
//
// The columns are cut into tiles of 32. A thread owns whole tiles, of h, W, dh and dW alike, so no sum is shared, and
// the bits do not depend on the number of threads. h and dh are held tile by tile, [tiles, rows, 32]: rows of a tile
// 32 floats apart fill all sets of a cache, where rows of 768 floats fill one in sixteen.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "bits.h"

namespace splade_kernels::cpu {

// Columns per tile: four vectors of AVX2 each for the row of W and its gradient, of sixteen that there are.
constexpr int64_t kTile = 32;
// Vocabulary entries that a thread takes through all its tiles before the next ones, so that memory is still read and
// written a row at a time, more or less.
constexpr int64_t kVocabularyBlock = 1024;
// Bytes of h and dh that are in use at once, where rows are few enough for several tiles: half of a small L2 cache.
constexpr int64_t kCacheBytes = 256 << 10;

// An active (sequence, vocabulary entry) pair of one vocabulary entry.
struct Pair {
  int32_t row;
  float gradient;
};

typedef float Lanes __attribute__((vector_size(32)));
using AddTile = void(
    const Pair* pair, int64_t count, const float* hidden, const float* weight, float* grad_hidden,
    float* grad_weight);

namespace baseline {
#define SK_TARGET
#include "gradients_tile.inc"
#undef SK_TARGET
}  // namespace baseline

#if defined(__x86_64__)
namespace avx2_fma {
#define SK_TARGET __attribute__((target("avx2,fma")))
#include "gradients_tile.inc"
#undef SK_TARGET
}  // namespace avx2_fma
#endif

// Fused multiply-adds round once, so the bits depend on the CPU. AVX-512 has no variant: the loop waits for the cache.
inline AddTile* fastest_add_tile(bool need_hidden, bool need_weight) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return avx2_fma::add_tile_for(need_hidden, need_weight);
  }
#endif
  return baseline::add_tile_for(need_hidden, need_weight);
}

// Vocabulary entries [first, last) and their active pairs: `counts[v - first]` from `(v - first) * batch_size` on, by
// sequence.
struct Lists {
  int64_t batch_size;
  int64_t first;
  int64_t last;
  Pair* pairs;
  int32_t* counts;
};

// Appends one sequence's active pairs of mask word w, all inside the lists' range.
template <class Position>
void list_word(
    Row<Position> argmax, Row<uint32_t> gradient, int64_t vocab_size, int64_t w, Segment segment, const Lists& lists) {
  for_each_bit(nonzero_word<Float32>(gradient, w, vocab_size), w, [&](int64_t v) {
    const int64_t position = argmax[v], at = v - lists.first;
    if (position < 0 || position >= segment.length) return;
    lists.pairs[at * lists.batch_size + lists.counts[at]++] = {
        static_cast<int32_t>(segment.first + position), std::bit_cast<float>(gradient[v])};
  });
}

// A matrix of any strides, in elements.
template <class T>
struct Matrix {
  T* data;
  int64_t row_stride;
  int64_t column_stride;

  T* at(int64_t row, int64_t column) const { return data + row * row_stride + column * column_stride; }
};

// Columns of tile t that exist; the others are computed as zeros and dropped.
inline int64_t width_of(int64_t t, int64_t hidden_size) { return std::min(kTile, hidden_size - t * kTile); }

template <class H>
void pack_tile(Matrix<const H> hidden, int64_t rows, int64_t hidden_size, int64_t t, float* tile) {
  const int64_t width = width_of(t, hidden_size);
  for (int64_t row = 0; row < rows; ++row) {
    const H* from = hidden.at(row, t * kTile);
    for (int64_t i = 0; i < width; ++i) tile[row * kTile + i] = static_cast<float>(from[i * hidden.column_stride]);
    for (int64_t i = width; i < kTile; ++i) tile[row * kTile + i] = 0;
  }
}

// `grad_hidden` has its columns side by side.
template <class H>
void unpack_tile(const float* tile, int64_t rows, int64_t hidden_size, int64_t t, Matrix<H> grad_hidden) {
  const int64_t width = width_of(t, hidden_size);
  for (int64_t row = 0; row < rows; ++row) {
    H* to = grad_hidden.at(row, t * kTile);
    for (int64_t i = 0; i < width; ++i) to[i] = static_cast<H>(tile[row * kTile + i]);
  }
}

// Adds the listed pairs to the tiles [begin, end) of dh (`grad_hidden`) and writes those of dW, whose columns lie
// side by side. `hidden` is null where dW is not needed, `grad_hidden` where dh is not; `weight` is read for dh alone.
template <class W>
void add_lists(
    const Lists& lists, int64_t begin, int64_t end, int64_t rows, int64_t hidden_size, const float* hidden,
    Matrix<const W> weight, float* grad_hidden, Matrix<W> grad_weight, AddTile* add_tile) {
  const int64_t bytes_per_tile = 2 * static_cast<int64_t>(sizeof(float)) * kTile * std::max<int64_t>(1, rows);
  const int64_t at_once = std::max<int64_t>(1, kCacheBytes / bytes_per_tile);
  float row_of_weight[kTile] = {}, row_of_gradient[kTile];
  for (int64_t block = lists.first; block < lists.last; block += kVocabularyBlock) {
    const int64_t block_end = std::min(lists.last, block + kVocabularyBlock);
    for (int64_t some = begin; some < end; some += at_once) {
      for (int64_t v = block; v < block_end; ++v) {
        const int64_t count = lists.counts[v - lists.first];
        if (count == 0 && hidden == nullptr) continue;
        const Pair* pairs = lists.pairs + (v - lists.first) * lists.batch_size;
        for (int64_t t = some; t < std::min(end, some + at_once); ++t) {
          const int64_t width = width_of(t, hidden_size), tile = t * rows * kTile;
          // Whole float32 tiles are read and written where they are, all others by way of a copy.
          const float* from = row_of_weight;
          float* to = row_of_gradient;
          bool copied = true;
          if constexpr (std::is_same_v<W, float>) {
            if (width == kTile) {
              copied = false;
              if (grad_hidden != nullptr && weight.column_stride == 1) from = weight.at(v, t * kTile);
              if (hidden != nullptr) to = grad_weight.at(v, t * kTile);
            }
          }
          if (grad_hidden != nullptr && from == row_of_weight && count > 0) {
            for (int64_t i = 0; i < width; ++i) row_of_weight[i] = static_cast<float>(*weight.at(v, t * kTile + i));
            for (int64_t i = width; i < kTile; ++i) row_of_weight[i] = 0;
          }
          add_tile(
              pairs, count, hidden == nullptr ? nullptr : hidden + tile, from,
              grad_hidden == nullptr ? nullptr : grad_hidden + tile, to);
          if (hidden != nullptr && copied) {
            W* out = grad_weight.at(v, t * kTile);
            for (int64_t i = 0; i < width; ++i) out[i] = static_cast<W>(row_of_gradient[i]);
          }
        }
      }
    }
  }
}

}  // namespace splade_kernels::cpu
