// The gradients of the maximum on a CPU: dh and dW, given the gradient of the maxima and which tokens attain them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <memory>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../checks.h"
#include "gradients.h"

namespace splade_kernels::cpu {
namespace {

// Pairs that are listed at once, 8 bytes each.
constexpr int64_t kPairs = 1 << 20;
// Smaller tensors may lie in memory that the allocator uses again for others.
constexpr int64_t kHugeBytes = 64 << 20;

// Asks for pages of 2 MiB for memory that will be written as a whole. Where the system gives them on request, it then
// takes one page fault instead of 512; the faults of a fresh dW would take longer than its computation.
void advise_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  if (bytes < kHugeBytes) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  // It is advice: a kernel without them refuses, and nothing depends on it.
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Calls f with a value of the C++ type of a floating-point dtype.
template <class Function>
void with_float(const char* name, ScalarType dtype, Function&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(torch::headeronly::BFloat16{});
    case ScalarType::Half: return f(torch::headeronly::Half{});
    default: STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16, got ", dtype);
  }
}

template <class T>
Matrix<const T> matrix_of(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1)};
}

template <class T>
Matrix<T> result_of(const Tensor& tensor) {
  return {static_cast<T*>(tensor.mutable_data_ptr()), tensor.stride(0), tensor.stride(1)};
}

void check_gradients(
    const Tensor& gradient, const Tensor& argmax, const Tensor& edges, const Tensor& hidden, const Tensor& weight) {
  STD_TORCH_CHECK(hidden.dim() == 2, "hidden: expected shape [N, D]");
  check_bucket(argmax, "gradient", gradient, edges, hidden.size(0));
  STD_TORCH_CHECK(hidden.size(0) <= std::numeric_limits<int32_t>::max(), "hidden: expected N < 2^31");
  STD_TORCH_CHECK(
      weight.dim() == 2 && weight.size(0) == gradient.size(1) && weight.size(1) == hidden.size(1),
      "weight: expected shape [V, D]");
  STD_TORCH_CHECK(
      hidden.device() == gradient.device() && weight.device() == gradient.device(),
      "hidden, weight: expected on the device of gradient");
}

// Lists the active pairs of the vocabulary entries [lists.first, lists.last); the first is a multiple of 32.
void list_pairs(
    const Tensor& gradient, const Tensor& argmax, const std::vector<Segment>& segments, const Lists& lists) {
  const int64_t vocab_size = gradient.size(1), words = divide_up(lists.last - lists.first, kWord);
  with_integer<int16_t, int32_t>("argmax", argmax.scalar_type(), [&](auto position) {
    using Position = decltype(position);
    const auto p_argmax = matrix_of<Position>(argmax);
    const auto p_gradient = matrix_of<uint32_t>(gradient);
    torch::stable::parallel_for(0, words, 64, [&](int64_t begin, int64_t end) {
      std::fill(lists.counts + begin * kWord, lists.counts + end * kWord, 0);
      for (int64_t w = begin; w < end; ++w) {
        for (int64_t b = 0; b < lists.batch_size; ++b) {
          list_word<Position>(
              {p_argmax.at(b, 0), p_argmax.column_stride}, {p_gradient.at(b, 0), p_gradient.column_stride}, vocab_size,
              lists.first / kWord + w, segments[static_cast<size_t>(b)], lists);
        }
      }
    });
  });
}

// dh [N, D] and dW [V, D] in the dtypes of hidden and weight; undefined values in one that is not needed. Threads own
// tiles of columns, so there is work for D / 32 of them.
std::tuple<Tensor, Tensor> max_pool_gradients(
    Tensor gradient, Tensor argmax, Tensor edges, Tensor hidden, Tensor weight, bool need_hidden, bool need_weight) {
  check_gradients(gradient, argmax, edges, hidden, weight);
  STD_TORCH_CHECK(need_hidden || need_weight, "need_hidden, need_weight: expected at least one");
  const int64_t n = gradient.size(0), vocab_size = gradient.size(1), rows = hidden.size(0), hidden_size = hidden.size(1);
  Tensor grad_hidden = torch::stable::new_empty(hidden, {need_hidden ? rows : 0, hidden_size});
  Tensor grad_weight = torch::stable::new_empty(weight, {need_weight ? vocab_size : 0, hidden_size});
  advise_huge_pages(
      grad_weight.mutable_data_ptr(), grad_weight.numel() * (weight.scalar_type() == ScalarType::Float ? 4 : 2));

  std::vector<Segment> segments;
  with_integer<int32_t, int64_t>("edges", edges.scalar_type(), [&](auto edge) {
    const auto* p_edges = static_cast<const decltype(edge)*>(edges.const_data_ptr());
    const int64_t stride = edges.stride(0);
    for (int64_t b = 0; b < n; ++b) {
      segments.push_back(segment_between(p_edges[b * stride], p_edges[(b + 1) * stride], p_edges[0], rows));
    }
  });

  const int64_t tiles = divide_up(hidden_size, kTile), size = tiles * rows * kTile;
  std::unique_ptr<float[]> packed;
  if (need_weight) {
    packed = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(size));
    with_float("hidden", hidden.scalar_type(), [&]<class H>(H) {
      torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          pack_tile(matrix_of<H>(hidden), rows, hidden_size, t, packed.get() + t * rows * kTile);
        }
      });
    });
  }
  std::vector<float> sums(static_cast<size_t>(need_hidden ? size : 0));

  const int64_t step = std::max<int64_t>(1, kPairs / std::max<int64_t>(1, n) / kWord) * kWord;
  const int64_t most = std::min(step, divide_up(vocab_size, kWord) * kWord);
  const auto pairs = std::make_unique_for_overwrite<Pair[]>(static_cast<size_t>(most * n));
  std::vector<int32_t> counts(static_cast<size_t>(most));
  AddTile* add_tile = fastest_add_tile(need_hidden, need_weight);
  with_float("weight", weight.scalar_type(), [&]<class W>(W) {
    for (int64_t first = 0; first < vocab_size; first += step) {
      const Lists lists{n, first, std::min(vocab_size, first + step), pairs.get(), counts.data()};
      list_pairs(gradient, argmax, segments, lists);
      torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
        add_lists<W>(
            lists, begin, end, rows, hidden_size, packed.get(), matrix_of<W>(weight),
            need_hidden ? sums.data() : nullptr, result_of<W>(grad_weight), add_tile);
      });
    }
  });

  if (need_hidden) {
    with_float("hidden", hidden.scalar_type(), [&]<class H>(H) {
      torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          unpack_tile(sums.data() + t * rows * kTile, rows, hidden_size, t, result_of<H>(grad_hidden));
        }
      });
    });
  }
  return {grad_hidden, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(splade_kernels_csrc, CPU, library) {
  library.impl("max_pool_gradients", TORCH_BOX(&max_pool_gradients));
}

}  // namespace splade_kernels::cpu
