// The screening kernels against dots in double, to be built with sanitizers too. Without arguments it tests every
// instruction set that this CPU has, as it is shipped. `screening PRODUCTS` leaves out cases of more int8 products, for
// emulated CPUs; `screening names` only prints which sets this CPU has, fastest first.
//
// Two other builds for x86, compiled for the instructions that they name, test every set of the table:
// -DEMULATED, on any CPU with AVX2, what is beyond AVX2 on emulated intrinsics;
// -DEVEX, on a CPU with AVX-512 VL and VNNI, the kernels of AVX-VNNI with AVX-512's spelling of the same instruction.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

#include "../../csrc/cpu/screening.h"

#if defined(EMULATED) || defined(EVEX)
#include <immintrin.h>
#if defined(EMULATED)
#include "x86_emulation.h"
#else
#define _mm256_dpbusd_avx_epi32 _mm256_dpbusd_epi32
#endif
// Functions are compiled for what the program is compiled for.
#define __attribute__(x)
#include "../../csrc/cpu/instruction_sets.h"
#undef __attribute__
constexpr bool kEverySet = true;
#else
#include "../../csrc/cpu/instruction_sets.h"
constexpr bool kEverySet = false;
#endif

#if defined(__aarch64__) && defined(HWCAP2_I8MM)
static_assert(splade_kernels::cpu::kDotprodBit == HWCAP_ASIMDDP && splade_kernels::cpu::kI8mmBit == HWCAP2_I8MM);
#endif

using namespace splade_kernels::cpu;

namespace {

int passed = 0;

struct Case {
  int64_t tokens, hidden_size, words;
  float bias;
  const char* kind;  // "normal", "extreme": all elements at the last level, "hostile"
};

// Rounded to the nearest, in plain C++: what the kernels load is compared with it.
uint16_t half_bits(float x) {
  const int sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::abs(x);
  if (std::isnan(x)) return static_cast<uint16_t>(sign | 0x7E00);
  if (magnitude >= 65520) return static_cast<uint16_t>(sign | 0x7C00);
  if (magnitude == 0) return static_cast<uint16_t>(sign);
  // Numbers of this size are 2^unit apart; subnormal ones 2^-24.
  const int unit = std::max(std::ilogb(magnitude) - 10, -24);
  const auto count = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -unit)));
  return static_cast<uint16_t>(sign | (((unit + 24) << 10) + count));
}

float from_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float magnitude = std::ldexp(static_cast<float>(fraction), -24);
  if (exponent > 0) magnitude = std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  if (exponent == 31) magnitude = fraction == 0 ? INFINITY : NAN;
  return bits >> 15 == 0 ? magnitude : -magnitude;
}

template <class W>
W narrow(float x) {
  if constexpr (std::is_same_v<W, float>) {
    return x;
  } else if constexpr (std::is_same_v<W, BFloat16Bits>) {
    return {static_cast<uint16_t>(std::bit_cast<uint32_t>(x) >> 16)};
  } else {
    return {half_bits(x)};
  }
}

template <class W>
float widen(W x) {
  if constexpr (std::is_same_v<W, float>) {
    return x;
  } else if constexpr (std::is_same_v<W, BFloat16Bits>) {
    return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
  } else {
    return from_half(x.bits);
  }
}

std::vector<float> draw(const Case& c, int64_t rows, float deviation, std::mt19937& random) {
  std::normal_distribution<float> normal(0, deviation);
  std::vector<float> values(static_cast<size_t>(rows * c.hidden_size));
  for (float& x : values) x = normal(random);
  const std::string kind = c.kind;
  if (kind == "extreme") {
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<int64_t>(i) / c.hidden_size % 3 == 1 ? -1 : 1;
  }
  if (kind == "hostile") {
    constexpr float specials[] = {NAN, INFINITY, -INFINITY, 1e13F, 1e-13F, 1e-44F, 0};
    for (int64_t r = 0; r < rows; ++r) {
      float* row = values.data() + r * c.hidden_size;
      const auto which = static_cast<size_t>(random() % 14);
      if (which < 3) row[random() % static_cast<uint64_t>(c.hidden_size)] = specials[which];
      if (which >= 3 && which < 7) std::for_each(row, row + c.hidden_size, [&](float& x) { x *= specials[which]; });
    }
  }
  return values;
}

void require(bool condition, const char* what, const Case& c, const char* isa, int64_t v) {
  if (condition) return;
  std::printf(
      "FAILED %s, %s: T%ld D%ld V%ld bias %g %s, word %ld\n", isa, what, static_cast<long>(c.tokens),
      static_cast<long>(c.hidden_size), static_cast<long>(c.words), static_cast<double>(c.bias), c.kind,
      static_cast<long>(v));
  std::exit(1);
}

template <class W>
void check(const Kernels<W>& kernels, const char* isa, const Case& c, std::mt19937& random) {
  const int64_t size = c.hidden_size, depth = (size + kDepthStep - 1) / kDepthStep * kDepthStep;
  const int64_t blocks = (c.words + kernels.words - 1) / kernels.words, lanes = blocks * kernels.words;
  std::vector<float> rows = draw(c, c.tokens, 1, random);
  const std::vector<float> drawn = draw(c, c.words, 1 / std::sqrt(static_cast<float>(size)), random);
  std::vector<W> weight(drawn.size());
  std::transform(drawn.begin(), drawn.end(), weight.begin(), narrow<W>);

  // Exactly as large as the kernels may touch, for the address sanitizer.
  std::vector<int8_t> quantised(static_cast<size_t>(lanes * depth));
  std::vector<float> bounds(static_cast<size_t>(3 * lanes)), threshold(static_cast<size_t>(lanes), -c.bias);
  std::vector<int32_t> shift(static_cast<size_t>(lanes));
  std::vector<uint8_t> tokens(static_cast<size_t>(c.tokens * depth));
  std::vector<Bounds> token_bounds(static_cast<size_t>(c.tokens));
  for (int64_t t = 0; t < c.tokens; ++t) {
    token_bounds[static_cast<size_t>(t)] =
        kernels.quantise_token(rows.data() + t * size, size, depth, tokens.data() + t * depth);
  }
  std::vector<float> values(static_cast<size_t>(c.words), -INFINITY);
  std::vector<int32_t> positions(values.size());
  int64_t evaluated = 0;
  for (int64_t v = 0; v < c.words; v += kernels.words) {
    const int64_t count = std::min<int64_t>(kernels.words, c.words - v);
    float* scale = bounds.data() + v;
    kernels.quantise_block(
        weight.data() + v * size, size, count, size, depth, quantised.data() + v * depth, scale, scale + lanes,
        scale + 2 * lanes, shift.data() + v);
    const Words words{quantised.data() + v * depth, scale, scale + lanes, scale + 2 * lanes, shift.data() + v};
    for (int64_t t = 0; t < c.tokens; t += kChunk) {
      const Tokens chunk{
          rows.data() + t * size, tokens.data() + t * depth, token_bounds.data() + t, std::min(kChunk, c.tokens - t),
          static_cast<int32_t>(t)};
      evaluated += kernels.maximise_block(
          chunk, size, depth, words, threshold.data() + v, weight.data() + v * size, size, count, values.data() + v,
          positions.data() + v);
    }
  }

  for (int64_t v = 0; v < c.words; ++v) {
    double largest = -INFINITY, band = 0;
    int64_t first_nan = -1;
    std::vector<double> dots(static_cast<size_t>(c.tokens)), bands(dots.size());
    for (int64_t t = 0; t < c.tokens; ++t) {
      double dot = 0, h = 0, w = 0;
      for (int64_t k = 0; k < size; ++k) {
        const double x = rows[static_cast<size_t>(t * size + k)], y = widen(weight[static_cast<size_t>(v * size + k)]);
        dot += x * y;
        h += x * x;
        w += y * y;
      }
      if (std::isnan(dot) && first_nan < 0) first_nan = t;
      // Any order of additions.
      bands[static_cast<size_t>(t)] = static_cast<double>(size) * 0x1p-24 * std::sqrt(h * w) + 0x1p-126;
      dots[static_cast<size_t>(t)] = dot;
      if (dot > largest) largest = dot, band = bands[static_cast<size_t>(t)];
    }
    const double value = values[static_cast<size_t>(v)];
    const auto position = static_cast<size_t>(positions[static_cast<size_t>(v)]);
    if (first_nan >= 0) {
      require(std::isnan(value) && static_cast<int64_t>(position) == first_nan, "NaN is the largest", c, isa, v);
    } else if (largest > 1e38) {
      require(value > 1e38, "a dot beyond float32", c, isa, v);
    } else if (largest + static_cast<double>(c.bias) > band) {
      require(std::abs(value - largest) <= 2 * band, "the maximum", c, isa, v);
      require(dots[position] >= largest - band - bands[position], "its position", c, isa, v);
      for (size_t t = 0; t < position && c.kind == std::string("extreme"); ++t) {
        require(dots[t] < dots[position], "the lowest position", c, isa, v);
      }
    } else {
      require(!(value + static_cast<double>(c.bias) > 3 * band), "an inactive word stays inactive", c, isa, v);
    }
  }
  if (std::string(c.kind) == "normal" && c.hidden_size >= 64 && c.tokens >= 100) {
    require(evaluated < c.tokens * c.words / 5, "most dots are ruled out", c, isa, -1);
  }
  ++passed;
}

// All cases up to a number of int8 products.
void check(const InstructionSet& set, int64_t limit) {
  std::mt19937 random(0);
  constexpr int64_t tokens[] = {1, 3, 4, 6, 9, 29, 128, 300};
  constexpr int64_t sizes[] = {1, 7, 8, 17, 64, 100, 771};
  constexpr int64_t words[] = {1, 15, 16, 33, 77};
  for (const int64_t t : tokens) {
    for (const int64_t d : sizes) {
      const int64_t v = words[static_cast<size_t>(t + d) % std::size(words)];
      if (t * d * v > limit) continue;
      for (const char* kind : {"normal", "extreme", "hostile"}) {
        for (const float bias : {0.0F, -2.5F}) {
          const Case c{t, d, v, bias, kind};
          check(set.float32, set.name, c, random);
          check(set.bfloat16, set.name, c, random);
          check(set.float16, set.name, c, random);
        }
      }
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && arguments[1] == std::string("names")) {
    for (const std::string& name : instruction_sets()) std::printf("%s\n", name.c_str());
    return 0;
  }
  const int64_t limit = count > 1 ? std::atoll(arguments[1]) : std::numeric_limits<int64_t>::max();
  for (const auto* set = kInstructionSets; *set != nullptr; ++set) {
    if (!kEverySet && !(*set)->supported()) continue;
    passed = 0;
    check(**set, limit);
    std::printf("%s: %d passed\n", (*set)->name, passed);
  }
}
