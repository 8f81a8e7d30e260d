// Rules that host and device code share: which entries are non-zero, how they rank, where a sequence lies.
#pragma once

#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define SK_HOST_DEVICE __host__ __device__
#else
#define SK_HOST_DEVICE
#endif

namespace splade_kernels {

// Elements per mask word.
constexpr int kWord = 32;

SK_HOST_DEVICE constexpr int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// A binary floating-point format by its bits; INFINITY_BITS is the pattern of +inf.
template <class B, B INFINITY_BITS>
struct Format {
  using Bits = B;
  static constexpr int kBits = std::numeric_limits<Bits>::digits;
  static constexpr Bits kSign = static_cast<Bits>(Bits{1} << (kBits - 1));
  static constexpr Bits kLargestKey = std::numeric_limits<Bits>::max();

  // Neither 0 nor -0; NaN is not zero, whatever its payload, and no flush-to-zero mode has a say.
  SK_HOST_DEVICE static constexpr bool nonzero(Bits bits) { return static_cast<Bits>(bits << 1) != 0; }

  // Unsigned integers in the order of the values: NaN, of either sign, above +inf. 0 is no entry's key.
  SK_HOST_DEVICE static constexpr Bits key(Bits bits) {
    const Bits magnitude = static_cast<Bits>(bits & static_cast<Bits>(~kSign));
    if (magnitude > INFINITY_BITS) return kLargestKey;
    return static_cast<Bits>((bits & kSign) != 0 ? ~bits : bits | kSign);
  }

  // The key of a positive value or NaN.
  SK_HOST_DEVICE static constexpr bool positive(Bits key) { return key > kSign; }
};

using Float64 = Format<uint64_t, 0x7FF0000000000000>;
using Float32 = Format<uint32_t, 0x7F800000>;
using Float16 = Format<uint16_t, 0x7C00>;
using BFloat16 = Format<uint16_t, 0x7F80>;

// How many of a row's non-zeros are among its `count` largest entries (count <= size). Zeros rank below the positive
// and above the negative entries, so the kept entries are that many largest non-zeros.
SK_HOST_DEVICE constexpr int64_t kept_nonzeros(int64_t count, int64_t positives, int64_t nonzeros, int64_t size) {
  const int64_t zeros = size - nonzeros;
  if (count <= positives) return count;
  return count <= positives + zeros ? positives : count - zeros;
}

// Rows of one sequence, counted from the first row of all.
struct Segment {
  int64_t first;
  int64_t length;
};

// edges[b] and edges[b + 1] of a sequence against edges[0]. Whatever the edges hold, the segment lies in [0, rows).
SK_HOST_DEVICE constexpr Segment segment_between(int64_t begin, int64_t end, int64_t origin, int64_t rows) {
  if (begin < origin || end <= begin) return {0, 0};
  const uint64_t first = static_cast<uint64_t>(begin) - static_cast<uint64_t>(origin);
  if (first >= static_cast<uint64_t>(rows)) return {0, 0};
  const uint64_t length = static_cast<uint64_t>(end) - static_cast<uint64_t>(begin);
  const uint64_t room = static_cast<uint64_t>(rows) - first;
  return {static_cast<int64_t>(first), static_cast<int64_t>(length < room ? length : room)};
}

}  // namespace splade_kernels
