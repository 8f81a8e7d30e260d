// The operators on a CPU. Rows are independent of each other: any number of threads gives the same bytes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "bucket.h"
#include "sparsify.h"

namespace splade_kernels::cpu {
namespace {

template <class T>
const T* row_of(const Tensor& tensor, int64_t b) {
  return static_cast<const T*>(tensor.const_data_ptr()) + b * tensor.stride(0);
}

template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor> bucket_by_token(Tensor argmax, Tensor grad, Tensor edges, int64_t rows) {
  check_bucket(argmax, "grad", grad, edges, rows);
  const int64_t n = grad.size(0), vocab_size = grad.size(1);
  Tensor bounds = torch::stable::new_zeros(grad, {rows, 2}, ScalarType::Long);
  Tensor words = torch::stable::new_empty(grad, {n * vocab_size}, ScalarType::Int);
  Tensor values = torch::stable::new_empty(grad, {n * vocab_size}, ScalarType::Float);
  int64_t* p_bounds = data_of<int64_t>(bounds);
  int32_t* p_words = data_of<int32_t>(words);
  uint32_t* p_values = data_of<uint32_t>(values);
  const int64_t argmax_stride = argmax.stride(1), grad_stride = grad.stride(1), edge_stride = edges.stride(0);

  with_integer<int32_t, int64_t>("edges", edges.scalar_type(), [&](auto edge) {
    with_integer<int16_t, int32_t>("argmax", argmax.scalar_type(), [&](auto position) {
      using Position = decltype(position);
      const auto* p_edges = static_cast<const decltype(edge)*>(edges.const_data_ptr());
      torch::stable::parallel_for(0, n, 1, [&](int64_t first, int64_t last) {
        BucketScratch scratch;
        for (int64_t b = first; b < last; ++b) {
          const Segment segment =
              segment_between(p_edges[b * edge_stride], p_edges[(b + 1) * edge_stride], p_edges[0], rows);
          bucket_sequence<Position>(
              {row_of<Position>(argmax, b), argmax_stride}, {row_of<uint32_t>(grad, b), grad_stride}, vocab_size,
              segment, b * vocab_size, p_bounds, p_words, p_values, scratch);
        }
      });
    });
  });
  return {bounds, words, values};
}

std::tuple<Tensor, Tensor, Tensor> sparsify(Tensor embeddings, int64_t count) {
  check_mask(embeddings, count);
  const int64_t rows = embeddings.size(0), vocab_size = embeddings.size(1), stride = embeddings.stride(1);
  Tensor crow = torch::stable::new_zeros(embeddings, {rows + 1}, ScalarType::Long), col, values;
  int64_t* p_crow = data_of<int64_t>(crow);
  with_format(embeddings.scalar_type(), [&](auto format) {
    using F = decltype(format);
    using Bits = typename F::Bits;
    // The entries of a thread's share of the rows, at the index of its first row. They are gathered while the row is in
    // the cache: a second pass, once all counts are known, would cost as much as the first.
    struct Share {
      std::vector<int64_t> columns;
      std::vector<Bits> values;
    };
    std::vector<Share> shares(static_cast<size_t>(rows));
    torch::stable::parallel_for(0, rows, 1, [&](int64_t first, int64_t last) {
      std::vector<uint32_t> mask(static_cast<size_t>(divide_up(vocab_size, kWord)));
      std::vector<Bits> keys;
      Share& share = shares[static_cast<size_t>(first)];
      for (int64_t b = first; b < last; ++b) {
        const Row<Bits> row{row_of<Bits>(embeddings, b), stride};
        const int64_t kept = mask_row<F>(row, vocab_size, count, mask.data(), keys);
        const auto found = static_cast<int64_t>(share.columns.size());
        share.columns.resize(static_cast<size_t>(found + kept));
        share.values.resize(static_cast<size_t>(found + kept));
        gather_row<Bits>(
            row, vocab_size, mask.data(), found, found + kept, share.columns.data(), share.values.data());
        p_crow[b + 1] = kept;
      }
    });
    for (int64_t b = 0; b < rows; ++b) p_crow[b + 1] += p_crow[b];
    col = torch::stable::new_empty(embeddings, {p_crow[rows]}, ScalarType::Long);
    values = torch::stable::new_empty(embeddings, {p_crow[rows]});
    for (int64_t b = 0; b < rows; ++b) {
      const Share& share = shares[static_cast<size_t>(b)];
      std::copy(share.columns.begin(), share.columns.end(), data_of<int64_t>(col) + p_crow[b]);
      std::copy(share.values.begin(), share.values.end(), data_of<Bits>(values) + p_crow[b]);
    }
  });
  return {crow, col, values};
}

std::tuple<Tensor, Tensor> active_mask(Tensor embeddings, int64_t count) {
  check_mask(embeddings, count);
  const int64_t rows = embeddings.size(0), vocab_size = embeddings.size(1), stride = embeddings.stride(1);
  const int64_t words = divide_up(vocab_size, kWord);
  Tensor counts = torch::stable::new_empty(embeddings, {rows}, ScalarType::Long);
  Tensor mask = torch::stable::new_empty(embeddings, {rows, words}, ScalarType::Int);
  int64_t* p_counts = data_of<int64_t>(counts);
  uint32_t* p_mask = data_of<uint32_t>(mask);
  with_format(embeddings.scalar_type(), [&](auto format) {
    using F = decltype(format);
    torch::stable::parallel_for(0, rows, 1, [&](int64_t first, int64_t last) {
      std::vector<typename F::Bits> keys;
      for (int64_t b = first; b < last; ++b) {
        p_counts[b] = mask_row<F>(
            {row_of<typename F::Bits>(embeddings, b), stride}, vocab_size, count, p_mask + b * words, keys);
      }
    });
  });
  return {counts, mask};
}

std::tuple<Tensor, Tensor> gather_active(Tensor embeddings, Tensor crow, Tensor mask, int64_t capacity) {
  check_gather(embeddings, crow, mask, capacity);
  const int64_t rows = embeddings.size(0), vocab_size = embeddings.size(1), stride = embeddings.stride(1);
  const int64_t words = mask.size(1);
  Tensor col = torch::stable::new_empty(embeddings, {capacity}, ScalarType::Long);
  Tensor values = torch::stable::new_empty(embeddings, {capacity});
  const auto* p_crow = static_cast<const int64_t*>(crow.const_data_ptr());
  const auto* p_mask = static_cast<const uint32_t*>(mask.const_data_ptr());
  with_format(embeddings.scalar_type(), [&](auto format) {
    using Bits = typename decltype(format)::Bits;
    torch::stable::parallel_for(0, rows, 1, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; ++b) {
        gather_row<Bits>(
            {row_of<Bits>(embeddings, b), stride}, vocab_size, p_mask + b * words, std::max<int64_t>(p_crow[b], 0),
            std::clamp<int64_t>(p_crow[b + 1], 0, capacity), data_of<int64_t>(col), data_of<Bits>(values));
      }
    });
  });
  return {col, values};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(splade_kernels_csrc, CPU, library) {
  library.impl("bucket_by_token", TORCH_BOX(&bucket_by_token));
  library.impl("sparsify", TORCH_BOX(&sparsify));
  library.impl("active_mask", TORCH_BOX(&active_mask));
  library.impl("gather_active", TORCH_BOX(&gather_active));
}

}  // namespace splade_kernels::cpu
