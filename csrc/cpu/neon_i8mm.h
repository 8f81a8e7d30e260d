// Four lanes of NEON, eight words per block, and smmla: a [2, 8] tile of tokens times an [8, 2] tile of words, signed
// bytes, added in 32 bits. The operand holds two words with eight hidden dimensions each.
#pragma once

#include "neon.h"
#include "screening.h"

#define SK_TARGET __attribute__((target("arch=armv8.2-a+i8mm")))

namespace splade_kernels::cpu::neon_i8mm {

constexpr const char* kName = "neon_i8mm";
inline bool supported() { return has_i8mm(); }

constexpr int kTokens = 8;
constexpr int kGroup = 8;

#include "neon_lanes.inc"

// Two tokens' dots with eight words: tile i holds {x · w[2i], x · w[2i + 1], y · w[2i], y · w[2i + 1]}.
struct Tiles {
  Int tile[4];
};

// Adds the products of eight hidden dimensions.
SK_TARGET inline void eight(
    const uint8_t* x, const uint8_t* y, int8x16_t w0, int8x16_t w1, int8x16_t w2, int8x16_t w3, Tiles& sums) {
  const int8x16_t pair = vreinterpretq_s8_u8(vcombine_u8(vld1_u8(x), vld1_u8(y)));
  sums.tile[0] = vmmlaq_s32(sums.tile[0], pair, w0);
  sums.tile[1] = vmmlaq_s32(sums.tile[1], pair, w1);
  sums.tile[2] = vmmlaq_s32(sums.tile[2], pair, w2);
  sums.tile[3] = vmmlaq_s32(sums.tile[3], pair, w3);
}

// The dots of token 0 or 1 of a pair with words 0-3 (j = 0) or 4-7 (j = 1).
template <size_t TOKEN>
SK_TARGET inline Int row(const Tiles& sums, int j) {
  const int64x2_t a = vreinterpretq_s64_s32(sums.tile[2 * j]), b = vreinterpretq_s64_s32(sums.tile[2 * j + 1]);
  return vreinterpretq_s32_s64(TOKEN == 0 ? vzip1q_s64(a, b) : vzip2q_s64(a, b));
}

template <size_t... P, size_t... T>
SK_TARGET inline void products_of_pairs(
    std::index_sequence<P...>, std::index_sequence<T...>, const uint8_t* tokens, int64_t depth, const int8_t* block,
    Int (&sums)[sizeof...(T)][2]) {
  constexpr size_t last = sizeof...(T) - 1;
  Tiles pairs[] = {((void)P, Tiles{{zero(), zero(), zero(), zero()}})...};
  for (int64_t k = 0; k < depth; k += 8, block += 64) {
    const int8x16_t w0 = vld1q_s8(block), w1 = vld1q_s8(block + 16);
    const int8x16_t w2 = vld1q_s8(block + 32), w3 = vld1q_s8(block + 48);
    // A token without a second one makes a pair with itself.
    (eight(
         tokens + 2 * P * depth + k, tokens + (2 * P < last ? 2 * P + 1 : last) * depth + k, w0, w1, w2, w3, pairs[P]),
     ...);
  }
  ((sums[T][0] = row<T % 2>(pairs[T / 2], 0), sums[T][1] = row<T % 2>(pairs[T / 2], 1)), ...);
}

// Eight hidden dimensions at a time.
template <size_t... T>
SK_TARGET inline void products(
    std::index_sequence<T...> all, const uint8_t* tokens, int64_t depth, const int8_t* block,
    Int (&sums)[sizeof...(T)][2]) {
  products_of_pairs(std::make_index_sequence<(sizeof...(T) + 1) / 2>{}, all, tokens, depth, block, sums);
}

#include "screening_kernels.inc"

}  // namespace splade_kernels::cpu::neon_i8mm

#undef SK_TARGET
