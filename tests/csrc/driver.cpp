// The algorithms of csrc/ against plain loops, without PyTorch, to be built with sanitizers. -DKERNELS=0: the CPU code;
// -DKERNELS=1: the CUDA kernels, a thread of the CPU for each of theirs.
#include "emulation.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <random>

#include "../../csrc/cpu/bucket.h"
#include "../../csrc/cpu/gradients.h"
#include "../../csrc/cpu/sparsify.h"
#include "../../csrc/cuda/bucket.cuh"
#include "../../csrc/cuda/sparsify.cuh"

using namespace splade_kernels;

namespace {

constexpr bool kKernels = KERNELS;
constexpr uint32_t kNan = 0x7FC00001, kNegativeZero = 0x80000000;
int passed = 0;

void require(bool condition, const char* what, const char* name) {
  if (!condition) {
    std::printf("FAILED %s: %s\n", name, what);
    std::exit(1);
  }
}

uint32_t bits_of(float value) { return std::bit_cast<uint32_t>(value); }

// ---------------------------------------------------------------- bucket_by_token

struct BucketCase {
  const char* name;
  std::vector<int64_t> edges;
  int64_t rows;
  int64_t vocab_size;
  double active;    // share
  double hot;       // share on token 0
  bool transposed;  // vocabulary outermost in memory
};

struct Buckets {
  std::vector<int64_t> bounds;
  std::vector<int32_t> words;
  std::vector<uint32_t> values;
};

Buckets new_buckets(int64_t n, const BucketCase& c) {
  const auto entries = static_cast<size_t>(n * c.vocab_size);
  return {std::vector<int64_t>(static_cast<size_t>(2 * c.rows)), std::vector<int32_t>(entries, -7),
          std::vector<uint32_t>(entries, kNan)};
}

template <class Position, class Edge>
void check_bucket(const BucketCase& c, std::mt19937& random) {
  const auto n = static_cast<int64_t>(c.edges.size()) - 1;
  const int64_t stride_b = c.transposed ? 1 : c.vocab_size, stride_v = c.transposed ? n : 1;
  std::vector<Position> argmax(static_cast<size_t>(n * c.vocab_size));
  std::vector<uint32_t> grad(argmax.size());
  std::uniform_real_distribution<double> unit(0, 1);
  for (int64_t b = 0; b < n; ++b) {
    const int64_t length = std::max<int64_t>(c.edges[static_cast<size_t>(b) + 1] - c.edges[static_cast<size_t>(b)], 0);
    for (int64_t v = 0; v < c.vocab_size; ++v) {
      const auto at = static_cast<size_t>(b * stride_b + v * stride_v);
      const double draw = unit(random);
      // One before the sequence and two behind it too, as wrong edges bring them.
      argmax[at] = static_cast<Position>(draw < c.hot ? 0 : std::floor(unit(random) * static_cast<double>(length + 3)) - 1);
      grad[at] = unit(random) >= c.active ? (v % 2 == 0 ? 0 : kNegativeZero)
                 : v % 5 == 0             ? kNan
                                          : bits_of(static_cast<float>(unit(random) - 0.5));
    }
  }

  Buckets expected = new_buckets(n, c), ours = new_buckets(n, c);
  for (int64_t b = 0; b < n; ++b) {
    const int64_t begin = c.edges[static_cast<size_t>(b)], end = c.edges[static_cast<size_t>(b) + 1];
    std::vector<std::pair<int64_t, int32_t>> entries;  // row, word
    for (int64_t v = 0; v < c.vocab_size; ++v) {
      const auto at = static_cast<size_t>(b * stride_b + v * stride_v);
      const int64_t row = begin - c.edges[0] + argmax[at];
      if ((grad[at] & 0x7FFFFFFF) != 0 && argmax[at] >= 0 && argmax[at] < end - begin && begin >= c.edges[0] && row < c.rows) {
        entries.emplace_back(row, static_cast<int32_t>(v));
      }
    }
    std::sort(entries.begin(), entries.end());
    for (size_t i = 0; i < entries.size(); ++i) {
      const auto [row, word] = entries[i];
      const size_t slot = static_cast<size_t>(b * c.vocab_size) + i;
      int64_t* bounds = &expected.bounds[static_cast<size_t>(2 * row)];
      if (bounds[1] == 0) bounds[0] = static_cast<int64_t>(slot);
      bounds[1] = static_cast<int64_t>(slot) + 1;
      expected.words[slot] = word;
      expected.values[slot] = grad[static_cast<size_t>(b * stride_b + word * stride_v)];
    }
  }

  std::vector<Edge> edges(c.edges.begin(), c.edges.end());
  if constexpr (kKernels) {
    const int64_t slices = std::min<int64_t>(cuda::slices_for(n, c.vocab_size, c.rows), 3);
    const int64_t slice = divide_up(divide_up(c.vocab_size, slices), cuda::kTile) * cuda::kTile;
    const auto used = static_cast<int32_t>(divide_up(c.vocab_size, slice));
    std::vector<int32_t> counts(static_cast<size_t>(used * c.rows), -7);
    const cuda::BucketInput<Position, Edge> in{
        argmax.data(), grad.data(), edges.data(), stride_b,     stride_v, stride_b,
        stride_v,      c.rows,      c.vocab_size, slice,        used};
    const auto blocks = static_cast<uint32_t>(n * used);
    emulation::launch(blocks, cuda::kThreads, cuda::count_kernel<Position, Edge>, in, counts.data());
    emulation::launch(
        static_cast<uint32_t>(n), cuda::kThreads, cuda::scan_kernel<Position, Edge>, in, counts.data(),
        ours.bounds.data());
    emulation::launch(
        blocks, cuda::kThreads, cuda::place_kernel<Position, Edge>, in, counts.data(), ours.words.data(),
        ours.values.data());
  } else {
    cpu::BucketScratch scratch;
    for (int64_t b = 0; b < n; ++b) {
      const auto at = static_cast<size_t>(b);
      cpu::bucket_sequence<Position>(
          {argmax.data() + b * stride_b, stride_v}, {grad.data() + b * stride_b, stride_v}, c.vocab_size,
          segment_between(edges[at], edges[at + 1], edges[0], c.rows), b * c.vocab_size, ours.bounds.data(),
          ours.words.data(), ours.values.data(), scratch);
    }
  }
  require(ours.bounds == expected.bounds, "bounds", c.name);
  require(ours.words == expected.words, "words", c.name);
  require(ours.values == expected.values, "values", c.name);
  ++passed;
}

void check_buckets() {
  std::mt19937 random(1);
  const std::vector<BucketCase> small = {
      {"one tile", {0, 5, 5, 12}, 12, 700, 0.5, 0, false},
      {"transposed, several tiles and slices", {0, 40, 90}, 90, 13000, 0.9, 0, true},
      {"all active, one hot token", {0, 300}, 300, 9001, 1, 0.5, false},
      {"nothing active", {0, 7, 9}, 9, 100, 0, 0, false},
      {"edges that begin late and end beyond the rows", {10, 14, 30}, 15, 300, 0.8, 0, false},
      {"a decreasing edge", {4, 9, 2, 3}, 9, 200, 0.8, 0, false},
      {"more tokens than a pass", {0, 2500, 4600}, 4600, 5000, 0.9, 0, false},
      {"more tokens than counters in shared memory", {0, 9000}, 9000, 5000, 0.9, 0.1, false},
  };
  for (const BucketCase& c : small) check_bucket<int32_t, int64_t>(c, random);
  check_bucket<int16_t, int32_t>(small[1], random);
  if constexpr (kKernels) return;
  check_bucket<int32_t, int32_t>({"S > 32767", {0, 40000, 90000}, 90000, 30522, 1, 0, false}, random);
  check_bucket<int16_t, int64_t>({"sparse", {0, 100, 150, 400}, 400, 30522, 0.01, 0.3, false}, random);
}

// ---------------------------------------------------------------- max_pool_gradients

// A dtype that has to be converted. The numbers below are small and whole, so that every sum is exact.
struct Narrow {
  int8_t value = 0;
  Narrow() = default;
  explicit Narrow(float x) : value(static_cast<int8_t>(x)) {}
  explicit operator float() const { return value; }
};

struct GradientCase {
  const char* name;
  std::vector<int64_t> edges;
  int64_t vocab_size;
  int64_t hidden_size;
  double active;
  bool transposed;  // every matrix that is read
};

template <class T>
std::vector<T> whole_numbers(int64_t size, double active, std::mt19937& random) {
  std::vector<T> numbers(static_cast<size_t>(size));
  std::uniform_real_distribution<double> unit(0, 1);
  for (T& x : numbers) x = T(unit(random) < active ? static_cast<float>(random() % 3) - 1.0F : 0.0F);
  return numbers;
}

template <class Position, class T>
void check_gradients(const GradientCase& c, std::mt19937& random) {
  const auto n = static_cast<int64_t>(c.edges.size()) - 1;
  const int64_t rows = c.edges.back(), tiles = divide_up(c.hidden_size, cpu::kTile), columns = c.hidden_size;
  const auto matrix = [&]<class U>(std::vector<U>& data, int64_t height, int64_t width) {
    return cpu::Matrix<U>{data.data(), c.transposed ? 1 : width, c.transposed ? height : 1};
  };
  const auto read = []<class U>(cpu::Matrix<U> m) { return cpu::Matrix<const U>{m.data, m.row_stride, m.column_stride}; };
  auto gradient = whole_numbers<float>(n * c.vocab_size, c.active, random);
  auto hidden = whole_numbers<T>(rows * columns, 1, random), weight = whole_numbers<T>(c.vocab_size * columns, 1, random);
  std::vector<Position> argmax(gradient.size());
  std::vector<T> grad_hidden(hidden.size(), T(7)), grad_weight(weight.size(), T(7));
  const auto g = matrix(gradient, n, c.vocab_size);
  const auto a = matrix(argmax, n, c.vocab_size);
  const auto h = matrix(hidden, rows, columns);
  const auto w = matrix(weight, c.vocab_size, columns);
  const cpu::Matrix<T> dh{grad_hidden.data(), columns, 1}, dw{grad_weight.data(), columns, 1};

  std::vector<float> expected_hidden(hidden.size()), expected_weight(weight.size());
  const int64_t step = 2 * kWord;  // several lists
  std::vector<cpu::Pair> pairs(static_cast<size_t>(step * n));
  std::vector<int32_t> counts(static_cast<size_t>(step));
  std::vector<float> packed(static_cast<size_t>(tiles * rows * cpu::kTile)), sums(packed.size());
  for (int64_t t = 0; t < tiles; ++t) cpu::pack_tile(read(h), rows, columns, t, packed.data() + t * rows * cpu::kTile);
  for (cpu::AddTile* add_tile : {cpu::baseline::add_tile_for(true, true), cpu::fastest_add_tile(true, true)}) {
    std::fill(expected_hidden.begin(), expected_hidden.end(), 0.0F);
    std::fill(expected_weight.begin(), expected_weight.end(), 0.0F);
    std::fill(sums.begin(), sums.end(), 0.0F);
    for (int64_t b = 0; b < n; ++b) {
      const int64_t begin = c.edges[static_cast<size_t>(b)], length = c.edges[static_cast<size_t>(b) + 1] - begin;
      for (int64_t v = 0; v < c.vocab_size; ++v) {
        const int64_t position = static_cast<int64_t>(random() % static_cast<uint64_t>(length + 3)) - 1;
        *a.at(b, v) = static_cast<Position>(position);
        if (position < 0 || position >= length) continue;
        for (int64_t d = 0; d < columns; ++d) {
          const int64_t row = begin + position;
          expected_hidden[static_cast<size_t>(row * columns + d)] += *g.at(b, v) * static_cast<float>(*w.at(v, d));
          expected_weight[static_cast<size_t>(v * columns + d)] += *g.at(b, v) * static_cast<float>(*h.at(row, d));
        }
      }
    }
    for (int64_t first = 0; first < c.vocab_size; first += step) {
      const cpu::Lists lists{n, first, std::min(c.vocab_size, first + step), pairs.data(), counts.data()};
      std::fill(counts.begin(), counts.end(), 0);
      for (int64_t word = first / kWord; word < divide_up(lists.last, kWord); ++word) {
        for (int64_t b = 0; b < n; ++b) {
          const auto at = static_cast<size_t>(b);
          cpu::list_word<Position>(
              {a.at(b, 0), a.column_stride}, {reinterpret_cast<const uint32_t*>(g.at(b, 0)), g.column_stride},
              c.vocab_size, word, segment_between(c.edges[at], c.edges[at + 1], 0, rows), lists);
        }
      }
      // Two threads' shares of the tiles.
      cpu::add_lists<T>(lists, 0, tiles / 2, rows, columns, packed.data(), read(w), sums.data(), dw, add_tile);
      cpu::add_lists<T>(lists, tiles / 2, tiles, rows, columns, packed.data(), read(w), sums.data(), dw, add_tile);
    }
    for (int64_t t = 0; t < tiles; ++t) cpu::unpack_tile(sums.data() + t * rows * cpu::kTile, rows, columns, t, dh);
    for (int64_t d = 0; d < columns; ++d) {
      for (int64_t row = 0; row < rows; ++row) {
        const auto at = static_cast<size_t>(row * columns + d);
        require(static_cast<float>(*dh.at(row, d)) == expected_hidden[at], "dh", c.name);
      }
      for (int64_t v = 0; v < c.vocab_size; ++v) {
        const auto at = static_cast<size_t>(v * columns + d);
        require(static_cast<float>(*dw.at(v, d)) == expected_weight[at], "dW", c.name);
      }
    }
  }
  ++passed;
}

void check_gradients() {
  std::mt19937 random(3);
  const std::vector<GradientCase> cases = {
      {"one narrow tile", {0, 4, 9}, 100, 5, 1, false},
      {"whole tiles and a narrow one", {0, 3, 3, 8}, 77, 100, 0.5, false},
      {"transposed", {0, 3, 8}, 200, 70, 0.5, true},
      {"nothing active", {0, 3}, 40, 64, 0, false},
      {"more rows than leave room for two tiles", {0, 900, 1100}, 300, 96, 0.3, false},
      {"more vocabulary entries than a block, sparse", {0, 5}, 3000, 40, 0.05, false},
  };
  for (const GradientCase& c : cases) {
    check_gradients<int16_t, float>(c, random);
    check_gradients<int32_t, Narrow>(c, random);
  }
}

// ---------------------------------------------------------------- sparsify

template <class F>
void check_sparsify(
    const char* name, int64_t rows, int64_t size, double active, double negative, int64_t count, bool transposed,
    std::mt19937& random) {
  using Bits = typename F::Bits;
  const int64_t stride_b = transposed ? 1 : size, stride_v = transposed ? rows : 1;
  std::vector<Bits> dense(static_cast<size_t>(rows * size));
  std::uniform_real_distribution<double> unit(0, 1);
  for (Bits& x : dense) {
    // Few magnitudes, so that there are ties; the upper bits vary, the lower ones too.
    const auto magnitude = static_cast<Bits>(random() % 97 * (F::kSign / 128) + random() % 3);
    x = unit(random) >= active ? static_cast<Bits>(random() % 2 == 0 ? 0 : F::kSign)
                               : static_cast<Bits>(magnitude | (unit(random) < negative ? F::kSign : 0));
    if (unit(random) < active * 0.01) x = static_cast<Bits>(random() % 2 == 0 ? F::kLargestKey : F::kLargestKey >> 1);
  }

  std::vector<int64_t> crow(1), col;
  std::vector<Bits> values;
  for (int64_t b = 0; b < rows; ++b) {
    const auto at = [&](int64_t v) { return dense[static_cast<size_t>(b * stride_b + v * stride_v)]; };
    const auto key = [&](int64_t v) { return F::nonzero(at(v)) ? F::key(at(v)) : F::kSign; };
    std::vector<int64_t> ids(static_cast<size_t>(size));
    std::iota(ids.begin(), ids.end(), 0);
    std::stable_sort(ids.begin(), ids.end(), [&](int64_t a, int64_t z) { return key(a) > key(z); });
    ids.resize(static_cast<size_t>(std::min(count, size)));
    std::sort(ids.begin(), ids.end());
    for (int64_t v : ids) {
      if (!F::nonzero(at(v))) continue;
      col.push_back(v);
      values.push_back(at(v));
    }
    crow.push_back(static_cast<int64_t>(col.size()));
  }

  const int64_t words = divide_up(size, kWord);
  std::vector<uint32_t> mask(static_cast<size_t>(rows * words), 0xABABABAB);
  std::vector<int64_t> counts(static_cast<size_t>(rows), -7), our_crow(1), our_col(col.size(), -7);
  std::vector<Bits> our_values(values.size());
  const auto grid = static_cast<uint32_t>(rows);
  const cuda::Matrix<Bits> matrix{dense.data(), stride_b, stride_v, size};
  if constexpr (kKernels) {
    emulation::launch(grid, cuda::kThreads, cuda::mask_kernel<F>, matrix, count, counts.data(), mask.data());
  } else {
    std::vector<Bits> keys;
    for (int64_t b = 0; b < rows; ++b) {
      counts[static_cast<size_t>(b)] =
          cpu::mask_row<F>({dense.data() + b * stride_b, stride_v}, size, count, mask.data() + b * words, keys);
    }
  }
  for (int64_t kept : counts) our_crow.push_back(our_crow.back() + kept);
  require(our_crow == crow, "crow", name);
  const auto capacity = static_cast<int64_t>(our_col.size());
  if constexpr (kKernels) {
    emulation::launch(
        grid, cuda::kThreads, cuda::gather_kernel<Bits>, matrix, our_crow.data(), mask.data(), capacity, our_col.data(),
        our_values.data());
  } else {
    for (int64_t b = 0; b < rows; ++b) {
      const auto at = static_cast<size_t>(b);
      cpu::gather_row<Bits>(
          {dense.data() + b * stride_b, stride_v}, size, mask.data() + b * words, our_crow[at], our_crow[at + 1],
          our_col.data(), our_values.data());
    }
  }
  require(our_col == col, "col", name);
  require(our_values == values, "values", name);
  ++passed;
}

void check_sparsifies() {
  std::mt19937 random(2);
  const auto all = [&](const char* name, auto... arguments) {
    check_sparsify<Float32>(name, arguments..., random);
    if constexpr (kKernels) return;
    check_sparsify<Float64>(name, arguments..., random);
    check_sparsify<Float16>(name, arguments..., random);
    check_sparsify<BFloat16>(name, arguments..., random);
  };
  all("all non-zeros", 3, 2100, 0.1, 0.0, 2100, false);
  all("all active, transposed", 3, 331, 1.0, 0.2, 331, true);
  all("k among ties", 3, 1500, 0.7, 0.0, 100, false);
  all("k among negative ties", 3, 1500, 0.9, 0.97, 1300, false);
  all("k within the zeros", 3, 700, 0.5, 0.9, 300, false);
  all("k = 1", 2, 64, 0.5, 0.2, 1, false);
  all("an empty row", 2, 40, 0.0, 0.0, 5, false);
  if constexpr (kKernels) {
    check_sparsify<Float64>("float64", 2, 900, 0.7, 0.1, 100, false, random);
    check_sparsify<BFloat16>("bfloat16", 2, 900, 0.7, 0.1, 100, false, random);
    check_sparsify<Float16>("more words than threads", 1, 9000, 0.3, 0.1, 9000, false, random);
  }
}

}  // namespace

int main() {
  check_buckets();
  if constexpr (!kKernels) check_gradients();
  check_sparsifies();
  std::printf("%d passed, 0 failed\n", passed);
}
