// Eight lanes, 16 words per block, as on AVX2, and vpdpbusd on them: AVX-VNNI is what Intel's client CPUs, which have no
// AVX-512, have of VNNI. Four products are added in 32 bits without saturating. Hence 127 levels, and an offset of 128
// that makes tokens unsigned.
#pragma once

#include <immintrin.h>

#include "screening.h"

#define SK_TARGET __attribute__((target("avxvnni,avx2,fma,f16c")))

namespace splade_kernels::cpu::avx_vnni {

constexpr const char* kName = "avx_vnni";
inline bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("avxvnni");
}

constexpr int kTokens = 4;
constexpr int kLevels = 127;
constexpr int kOffset = 128;
constexpr int kGroup = 4;

#include "avx_lanes.inc"

// Adds the products of four hidden dimensions of one token with both vectors of words. `_avx` is the VEX encoding;
// without it the intrinsic needs AVX-512.
SK_TARGET inline void four(const uint8_t* token, Int w0, Int w1, Int& low, Int& high) {
  const Int x = _mm256_set1_epi32(four_bytes(token));
  low = _mm256_dpbusd_avx_epi32(low, x, w0);
  high = _mm256_dpbusd_avx_epi32(high, x, w1);
}

// Four hidden dimensions at a time.
template <size_t... T>
SK_TARGET inline void products(
    std::index_sequence<T...>, const uint8_t* tokens, int64_t depth, const int8_t* block, Int (&sums)[sizeof...(T)][2]) {
  const auto* words = reinterpret_cast<const Int*>(block);
  Int low[] = {((void)T, zero())...}, high[] = {((void)T, zero())...};
  for (int64_t k = 0; k < depth; k += 4, words += 2) {
    Int w0 = _mm256_loadu_si256(words), w1 = _mm256_loadu_si256(words + 1);
    // Forces the operands into registers; GCC would load them from memory again for every token.
    asm("" : "+x"(w0), "+x"(w1));
    (four(tokens + T * depth + k, w0, w1, low[T], high[T]), ...);
  }
  ((sums[T][0] = low[T], sums[T][1] = high[T]), ...);
}

#include "screening_kernels.inc"

}  // namespace splade_kernels::cpu::avx_vnni

#undef SK_TARGET
