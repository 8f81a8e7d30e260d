// Four lanes of NEON, eight words per block, and sdot on them: four products of signed bytes are added in 32 bits.
#pragma once

#include "neon.h"
#include "screening.h"

#define SK_TARGET __attribute__((target("arch=armv8.2-a+dotprod")))

namespace splade_kernels::cpu::neon_dotprod {

constexpr const char* kName = "neon_dotprod";
inline bool supported() { return has_dotprod(); }

constexpr int kTokens = 8;
constexpr int kGroup = 4;

#include "neon_lanes.inc"

// Adds the products of eight hidden dimensions of one token with both vectors of words.
SK_TARGET inline void eight(
    const uint8_t* token, int8x16_t w0, int8x16_t w1, int8x16_t w2, int8x16_t w3, Int& low, Int& high) {
  const int8x8_t x = vreinterpret_s8_u8(vld1_u8(token));
  low = vdotq_lane_s32(vdotq_lane_s32(low, w0, x, 0), w2, x, 1);
  high = vdotq_lane_s32(vdotq_lane_s32(high, w1, x, 0), w3, x, 1);
}

// Eight hidden dimensions at a time.
template <size_t... T>
SK_TARGET inline void products(
    std::index_sequence<T...>, const uint8_t* tokens, int64_t depth, const int8_t* block, Int (&sums)[sizeof...(T)][2]) {
  Int low[] = {((void)T, zero())...}, high[] = {((void)T, zero())...};
  for (int64_t k = 0; k < depth; k += 8, block += 64) {
    const int8x16_t w0 = vld1q_s8(block), w1 = vld1q_s8(block + 16);
    const int8x16_t w2 = vld1q_s8(block + 32), w3 = vld1q_s8(block + 48);
    (eight(tokens + T * depth + k, w0, w1, w2, w3, low[T], high[T]), ...);
  }
  ((sums[T][0] = low[T], sums[T][1] = high[T]), ...);
}

#include "screening_kernels.inc"

}  // namespace splade_kernels::cpu::neon_dotprod

#undef SK_TARGET
