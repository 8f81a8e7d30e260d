// Exact maxima over tokens by int8 bounds: what the kernels of all instruction sets share. docs/screening.md derives
// the bounds.
//
// An instruction set is a header like avx2.h and a line in the table of instruction_sets.h.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

namespace splade_kernels::cpu {

// Bit patterns of half-precision numbers; both are loaded as float32, which holds them exactly.
struct BFloat16Bits {
  uint16_t bits;
};
struct Float16Bits {
  uint16_t bits;
};

// Rows are padded with zeros to a multiple of this many hidden dimensions.
constexpr int64_t kDepthStep = 8;
// Most hidden dimensions: 255 · 127 · 65536 < 2^31.
constexpr int64_t kMaxHiddenSize = 65536;
// The next four are mirrored from splade_kernels/backends/int8_bound.py; a test compares them.
// Rows whose largest element is outside this range have no bound: products of their norms would leave float32.
constexpr float kTiny = 0x1p-40f, kHuge = 0x1p40f;
// Relative rounding errors of a row of D elements, in units of 2^-23: D + kNormSlack of a computed norm; D + kDotSlack
// of a dot and its bound, relative to the product of the norms.
constexpr int64_t kNormSlack = 64, kDotSlack = 128;

inline int32_t four_bytes(const uint8_t* p) {
  int32_t value;
  std::memcpy(&value, p, sizeof(value));
  return value;
}

// A row quantised to `scale · q`: the distance between the two (`radius`) and the norm of the row, both rounded up. The
// scale of a row that int8 cannot bound is NaN, which makes both bounds of all its dots NaN.
struct Bounds {
  float scale, radius, norm;
};

struct Slacks {
  float norm;
  float dot;
};

inline Slacks slacks(int64_t hidden_size) {
  constexpr float unit = 0x1p-23f;
  return {static_cast<float>(hidden_size + kNormSlack) * unit, static_cast<float>(hidden_size + kDotSlack) * unit};
}

// Quantised words, a block at a time: [depth / group][words][group] int8, where the instruction set determines how many
// hidden dimensions of a word are a group.
struct Words {
  const int8_t* blocks;
  const float* scale;
  const float* radius;
  const float* reach;    // norm + radius
  const int32_t* shift;  // what the offset of the tokens adds to every dot
};

// Consecutive tokens of one sequence.
struct Tokens {
  const float* rows;        // [count, hidden_size]
  const uint8_t* quantised;  // [count, depth], plus the offset of the instruction set
  const Bounds* bounds;
  int64_t count;
  int32_t first;  // position of the first one in its sequence
};

// Tokens handled at a time, at most: their upper bounds for one block stay in the L1 cache.
constexpr int64_t kChunk = 128;

// The largest dot found so far and the position of its token; NaN is the largest, ties go to the lowest position.
struct Best {
  float value;
  int32_t position;

  void see(float x, int32_t at) {
    const bool better = std::isnan(x) ? !std::isnan(value) || at < position
                                      : x > value || (x == value && at < position);
    if (!better) return;
    value = x;
    position = at;
  }
};

// The kernels of one instruction set for weights of type W.
template <class W>
struct Kernels {
  int words;  // of a block
  Bounds (*quantise_token)(const float* row, int64_t hidden_size, int64_t depth, uint8_t* out);
  void (*quantise_block)(
      const W* weight, int64_t stride, int64_t count, int64_t hidden_size, int64_t depth, int8_t* block, float* scale,
      float* radius, float* reach, int32_t* shift);
  int64_t (*maximise_block)(
      const Tokens& tokens, int64_t hidden_size, int64_t depth, const Words& words, const float* threshold,
      const W* weight, int64_t stride, int64_t count, float* values, int32_t* positions);
};

struct InstructionSet {
  const char* name;
  bool (*supported)();  // by this CPU
  Kernels<float> float32;
  Kernels<BFloat16Bits> bfloat16;
  Kernels<Float16Bits> float16;
};

}  // namespace splade_kernels::cpu
