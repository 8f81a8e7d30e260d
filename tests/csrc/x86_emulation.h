// The intrinsics of csrc/cpu/avx512_vnni.h, and what csrc/cpu/avx_vnni.h has beyond AVX2, in plain loops: their kernels
// run on any CPU with AVX2.
#pragma once

#include <immintrin.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulated {

constexpr int kLanes = 16;

template <class T>
struct Lanes {
  T x[kLanes];
};
using Floats = Lanes<float>;
using Ints = Lanes<int32_t>;

template <class T, class Function>
auto each(Function&& f) {
  Lanes<T> result;
  for (int i = 0; i < kLanes; ++i) result.x[i] = f(i);
  return result;
}

template <class To, class From>
To same_bits(From value) {
  To result;
  static_assert(sizeof(result) == sizeof(value));
  std::memcpy(&result, &value, sizeof(result));
  return result;
}

template <class T>
Lanes<T> load(const void* p) {
  Lanes<T> result;
  std::memcpy(&result, p, sizeof(result));
  return result;
}

inline void halves(__m256i packed, uint16_t (&out)[kLanes]) { std::memcpy(out, &packed, sizeof(out)); }

inline Ints widen(__m256i packed) {
  uint16_t half[kLanes];
  halves(packed, half);
  return each<int32_t>([&](int i) { return static_cast<int32_t>(half[i]); });
}

inline Floats from_half(__m256i packed) {
  uint16_t half[kLanes];
  halves(packed, half);
  return each<float>([&](int i) { return _cvtsh_ss(half[i]); });
}

template <int PREDICATE>
__mmask16 compare(Floats x, Floats y) {
  static_assert(PREDICATE == _CMP_NLE_UQ, "the only one that is used");
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= static_cast<uint32_t>(!(x.x[i] <= y.x[i])) << i;
  return static_cast<__mmask16>(mask);
}

// Four unsigned bytes of x times four signed bytes of y, added without saturation.
inline int32_t dot_of_four(int32_t sum, uint32_t x, uint32_t y) {
  for (int k = 0; k < 32; k += 8) {
    sum += static_cast<uint8_t>(x >> k) * static_cast<int8_t>(static_cast<uint8_t>(y >> k));
  }
  return sum;
}

inline Ints dot_bytes(Ints sums, Ints x, Ints y) {
  const auto a = same_bits<Lanes<uint32_t>>(x), b = same_bits<Lanes<uint32_t>>(y);
  return each<int32_t>([&](int i) { return dot_of_four(sums.x[i], a.x[i], b.x[i]); });
}

inline __m256i dot_bytes(__m256i sums, __m256i x, __m256i y) {
  int32_t lanes[8];
  uint32_t a[8], b[8];
  std::memcpy(lanes, &sums, sizeof(lanes));
  std::memcpy(a, &x, sizeof(a));
  std::memcpy(b, &y, sizeof(b));
  for (int i = 0; i < 8; ++i) lanes[i] = dot_of_four(lanes[i], a[i], b[i]);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes));
}

inline __m128i low_bytes(Ints x) {
  int8_t bytes[kLanes];
  for (int i = 0; i < kLanes; ++i) bytes[i] = static_cast<int8_t>(x.x[i]);
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
}

}  // namespace emulated

#define __m512 emulated::Floats
#define __m512i emulated::Ints
#define _mm512_set1_ps(a) emulated::each<float>([&](int) { return a; })
#define _mm512_set1_epi32(a) emulated::each<int32_t>([&](int) { return a; })
#define _mm512_setzero_si512() emulated::Ints{}
#define _mm512_loadu_ps(p) emulated::load<float>(p)
#define _mm512_loadu_si512(p) emulated::load<int32_t>(p)
#define _mm512_storeu_ps(p, a) std::memcpy(p, &(a), sizeof(a))
#define _mm512_storeu_si512(p, a) std::memcpy(p, &(a), sizeof(a))
#define _mm512_cvtepu16_epi32 emulated::widen
#define _mm512_cvtph_ps emulated::from_half
#define _mm512_slli_epi32(a, n) emulated::each<int32_t>([w = a](int i) { return w.x[i] << n; })
#define _mm512_castsi512_ps emulated::same_bits<emulated::Floats>
#define _mm512_castps_si512 emulated::same_bits<emulated::Ints>
#define _mm512_add_ps(a, b) emulated::each<float>([&](int i) { return a.x[i] + b.x[i]; })
#define _mm512_sub_ps(a, b) emulated::each<float>([&](int i) { return a.x[i] - b.x[i]; })
#define _mm512_mul_ps(a, b) emulated::each<float>([&](int i) { return a.x[i] * b.x[i]; })
#define _mm512_fmadd_ps(a, b, c) emulated::each<float>([&](int i) { return std::fma(a.x[i], b.x[i], c.x[i]); })
#define _mm512_max_ps(a, b) emulated::each<float>([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; })
#define _mm512_cvtepi32_ps(a) emulated::each<float>([&](int i) { return static_cast<float>(a.x[i]); })
#define _mm512_cvtps_epi32(a) emulated::each<int32_t>([&](int i) { return static_cast<int32_t>(std::nearbyint(a.x[i])); })
#define _mm512_sub_epi32(a, b) emulated::each<int32_t>([&](int i) { return a.x[i] - b.x[i]; })
#define _mm512_max_epi32(a, b) \
  emulated::each<int32_t>([w = a, z = b](int i) { return w.x[i] > z.x[i] ? w.x[i] : z.x[i]; })
#define _mm512_and_si512(a, b) emulated::each<int32_t>([w = a, z = b](int i) { return w.x[i] & z.x[i]; })
#define _mm512_cmp_ps_mask(a, b, predicate) emulated::compare<predicate>(a, b)
#define _mm512_dpbusd_epi32 emulated::dot_bytes
#define _mm256_dpbusd_avx_epi32 emulated::dot_bytes
#define _mm512_cvtepi32_epi8 emulated::low_bytes
