// Sixteen lanes of AVX-512, 32 words per block. vpdpbusd adds four products in 32 bits without saturating. Hence 127
// levels, and an offset of 128 that makes tokens unsigned.
#pragma once

#include <immintrin.h>

#include "screening.h"

#define SK_TARGET __attribute__((target("avx512f,avx512vnni,avx2,fma,f16c")))

namespace splade_kernels::cpu::avx512_vnni {

constexpr const char* kName = "avx512_vnni";
inline bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni");
}

constexpr int kLanes = 16;
constexpr int kTokens = 8;
constexpr int kLevels = 127;
constexpr int kOffset = 128;
constexpr int kGroup = 4;

using Float = __m512;
using Int = __m512i;
using Mask = __mmask16;

SK_TARGET inline Float spread(float x) { return _mm512_set1_ps(x); }
SK_TARGET inline Float load(const float* p) { return _mm512_loadu_ps(p); }
SK_TARGET inline Float load(const BFloat16Bits* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
SK_TARGET inline Float load(const Float16Bits* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
SK_TARGET inline void store(float* p, Float x) { _mm512_storeu_ps(p, x); }
SK_TARGET inline Float add(Float x, Float y) { return _mm512_add_ps(x, y); }
SK_TARGET inline Float subtract(Float x, Float y) { return _mm512_sub_ps(x, y); }
SK_TARGET inline Float multiply(Float x, Float y) { return _mm512_mul_ps(x, y); }
SK_TARGET inline Float multiply_add(Float x, Float y, Float z) { return _mm512_fmadd_ps(x, y, z); }
// Returns y where x is NaN.
SK_TARGET inline Float larger(Float x, Float y) { return _mm512_max_ps(x, y); }
SK_TARGET inline Float to_float(Int x) { return _mm512_cvtepi32_ps(x); }
SK_TARGET inline Int load(const int32_t* p) { return _mm512_loadu_si512(p); }
SK_TARGET inline Int subtract(Int x, Int y) { return _mm512_sub_epi32(x, y); }
SK_TARGET inline void store(int32_t* p, Int x) { _mm512_storeu_si512(p, x); }
SK_TARGET inline Int larger_magnitude(Int m, Float x) {
  return _mm512_max_epi32(m, _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7FFFFFFF)));
}
SK_TARGET inline Int nearest(Float x) { return _mm512_cvtps_epi32(x); }
SK_TARGET inline void store_bytes(int8_t* p, Int x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}
SK_TARGET inline Int zero() { return _mm512_setzero_si512(); }
SK_TARGET inline Mask none() { return 0; }
SK_TARGET inline Mask not_at_most(Float x, Float y) { return _mm512_cmp_ps_mask(x, y, _CMP_NLE_UQ); }
SK_TARGET inline Mask either(Mask x, Mask y) { return static_cast<Mask>(x | y); }
SK_TARGET inline uint32_t bits(Mask x) { return x; }

// Four hidden dimensions at a time.
template <size_t... T>
SK_TARGET inline void products(
    std::index_sequence<T...>, const uint8_t* tokens, int64_t depth, const int8_t* block, Int (&sums)[sizeof...(T)][2]) {
  Int low[] = {((void)T, zero())...}, high[] = {((void)T, zero())...};
  for (int64_t k = 0; k < depth; k += 4, block += 128) {
    const Int w0 = _mm512_loadu_si512(block), w1 = _mm512_loadu_si512(block + 64);
    const Int x[] = {_mm512_set1_epi32(four_bytes(tokens + T * depth + k))...};
    ((low[T] = _mm512_dpbusd_epi32(low[T], x[T], w0), high[T] = _mm512_dpbusd_epi32(high[T], x[T], w1)), ...);
  }
  ((sums[T][0] = low[T], sums[T][1] = high[T]), ...);
}

#include "screening_kernels.inc"

}  // namespace splade_kernels::cpu::avx512_vnni

#undef SK_TARGET
