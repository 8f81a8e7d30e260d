// Eight lanes of AVX2, 16 words per block. vpmaddubsw adds two products in 16 bits, and two such sums are added before
// they are widened: 4 · (2 · 63 + 1) · 63 < 2^15. Hence 63 levels, and an offset of 64 that makes tokens unsigned.
#pragma once

#include <immintrin.h>

#include "screening.h"

#define SK_TARGET __attribute__((target("avx2,fma,f16c")))

namespace splade_kernels::cpu::avx2 {

constexpr const char* kName = "avx2";
inline bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

constexpr int kTokens = 4;
constexpr int kLevels = 63;
constexpr int kOffset = 64;
constexpr int kGroup = 4;

#include "avx_lanes.inc"

// Adds the products of eight hidden dimensions of one token with both vectors of words.
SK_TARGET inline void eight(const uint8_t* token, Int w0, Int w1, Int w2, Int w3, Int& low, Int& high) {
  const Int ones = _mm256_set1_epi16(1);
  const Int x0 = _mm256_set1_epi32(four_bytes(token)), x1 = _mm256_set1_epi32(four_bytes(token + 4));
  const Int a = _mm256_add_epi16(_mm256_maddubs_epi16(x0, w0), _mm256_maddubs_epi16(x1, w2));
  const Int b = _mm256_add_epi16(_mm256_maddubs_epi16(x0, w1), _mm256_maddubs_epi16(x1, w3));
  low = _mm256_add_epi32(low, _mm256_madd_epi16(a, ones));
  high = _mm256_add_epi32(high, _mm256_madd_epi16(b, ones));
}

// Eight hidden dimensions at a time.
template <size_t... T>
SK_TARGET inline void products(
    std::index_sequence<T...>, const uint8_t* tokens, int64_t depth, const int8_t* block, Int (&sums)[sizeof...(T)][2]) {
  const auto* words = reinterpret_cast<const Int*>(block);
  Int low[] = {((void)T, zero())...}, high[] = {((void)T, zero())...};
  for (int64_t k = 0; k < depth; k += 8, words += 4) {
    Int w0 = _mm256_loadu_si256(words), w1 = _mm256_loadu_si256(words + 1);
    Int w2 = _mm256_loadu_si256(words + 2), w3 = _mm256_loadu_si256(words + 3);
    // Forces the operands into registers; GCC would load them from memory again for every token.
    asm("" : "+x"(w0), "+x"(w1), "+x"(w2), "+x"(w3));
    (eight(tokens + T * depth + k, w0, w1, w2, w3, low[T], high[T]), ...);
  }
  ((sums[T][0] = low[T], sums[T][1] = high[T]), ...);
}

#include "screening_kernels.inc"

}  // namespace splade_kernels::cpu::avx2

#undef SK_TARGET
