// The operators on CUDA: every launch on PyTorch's current stream, under a device guard, without a host sync.
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "bucket.cuh"
#include "sparsify.cuh"

namespace splade_kernels::cuda {
namespace {

void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error)); }

// The one function of the stable ABI that is in libtorch_cuda. It is looked up in the library that PyTorch has loaded,
// not linked to, so that this file also builds beside a CPU-only PyTorch.
cudaStream_t current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return library == nullptr ? nullptr
                              : reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(function != nullptr, "libtorch_cuda with aoti_torch_get_current_cuda_stream is not loaded");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
Matrix<T> matrix_of(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.size(1)};
}

uint32_t grid_of(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "expected fewer than 2^31 blocks, got ", blocks);
  return static_cast<uint32_t>(blocks);
}

std::tuple<Tensor, Tensor, Tensor> bucket_by_token(Tensor argmax, Tensor grad, Tensor edges, int64_t rows) {
  check_bucket(argmax, "grad", grad, edges, rows);
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  const int64_t n = grad.size(0), vocab_size = grad.size(1);
  Tensor bounds = torch::stable::new_empty(grad, {rows, 2}, ScalarType::Long);
  Tensor words = torch::stable::new_empty(grad, {n * vocab_size}, ScalarType::Int);
  Tensor values = torch::stable::new_empty(grad, {n * vocab_size}, ScalarType::Float);
  if (rows == 0) return {bounds, words, values};
  const cudaStream_t stream = current_stream(grad.get_device_index());
  check(cudaMemsetAsync(bounds.mutable_data_ptr(), 0, static_cast<size_t>(rows) * 2 * sizeof(int64_t), stream));
  if (n * vocab_size == 0) return {bounds, words, values};

  const Tensor contiguous_edges = torch::stable::contiguous(edges);
  const int32_t wanted = slices_for(n, vocab_size, rows);
  const int64_t slice = divide_up(divide_up(vocab_size, wanted), kTile) * kTile;
  const auto slices = static_cast<int32_t>(divide_up(vocab_size, slice));
  const Tensor counts = torch::stable::new_empty(grad, {slices * rows}, ScalarType::Int);
  with_integer<int32_t, int64_t>("edges", edges.scalar_type(), [&](auto edge) {
    with_integer<int16_t, int32_t>("argmax", argmax.scalar_type(), [&](auto position) {
      using Position = decltype(position);
      using Edge = decltype(edge);
      const BucketInput<Position, Edge> in{
          static_cast<const Position*>(argmax.const_data_ptr()),
          static_cast<const uint32_t*>(grad.const_data_ptr()),
          static_cast<const Edge*>(contiguous_edges.const_data_ptr()),
          argmax.stride(0),
          argmax.stride(1),
          grad.stride(0),
          grad.stride(1),
          rows,
          vocab_size,
          slice,
          slices};
      auto* p_counts = data_of<int32_t>(counts);
      count_kernel<<<grid_of(n * slices), kThreads, 0, stream>>>(in, p_counts);
      check(cudaGetLastError());
      scan_kernel<<<grid_of(n), kThreads, 0, stream>>>(in, p_counts, data_of<int64_t>(bounds));
      check(cudaGetLastError());
      place_kernel<<<grid_of(n * slices), kThreads, 0, stream>>>(
          in, p_counts, data_of<int32_t>(words), data_of<uint32_t>(values));
      check(cudaGetLastError());
    });
  });
  return {bounds, words, values};
}

std::tuple<Tensor, Tensor> active_mask(Tensor embeddings, int64_t count) {
  check_mask(embeddings, count);
  const torch::stable::accelerator::DeviceGuard guard(embeddings.get_device_index());
  const int64_t rows = embeddings.size(0);
  STD_TORCH_CHECK(embeddings.size(1) <= std::numeric_limits<int32_t>::max(), "embeddings: expected V < 2^31");
  Tensor counts = torch::stable::new_empty(embeddings, {rows}, ScalarType::Long);
  Tensor mask = torch::stable::new_empty(embeddings, {rows, divide_up(embeddings.size(1), kWord)}, ScalarType::Int);
  if (rows == 0) return {counts, mask};
  const cudaStream_t stream = current_stream(embeddings.get_device_index());
  with_format(embeddings.scalar_type(), [&](auto format) {
    using F = decltype(format);
    mask_kernel<F><<<grid_of(rows), kThreads, 0, stream>>>(
        matrix_of<typename F::Bits>(embeddings), count, data_of<int64_t>(counts), data_of<uint32_t>(mask));
    check(cudaGetLastError());
  });
  return {counts, mask};
}

std::tuple<Tensor, Tensor> gather_active(Tensor embeddings, Tensor crow, Tensor mask, int64_t capacity) {
  check_gather(embeddings, crow, mask, capacity);
  const torch::stable::accelerator::DeviceGuard guard(embeddings.get_device_index());
  Tensor col = torch::stable::new_empty(embeddings, {capacity}, ScalarType::Long);
  Tensor values = torch::stable::new_empty(embeddings, {capacity});
  if (embeddings.size(0) == 0 || capacity == 0) return {col, values};
  const cudaStream_t stream = current_stream(embeddings.get_device_index());
  with_format(embeddings.scalar_type(), [&](auto format) {
    using Bits = typename decltype(format)::Bits;
    gather_kernel<Bits><<<grid_of(embeddings.size(0)), kThreads, 0, stream>>>(
        matrix_of<Bits>(embeddings), static_cast<const int64_t*>(crow.const_data_ptr()),
        static_cast<const uint32_t*>(mask.const_data_ptr()), capacity, data_of<int64_t>(col), data_of<Bits>(values));
    check(cudaGetLastError());
  });
  return {col, values};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(splade_kernels_csrc, CUDA, library) {
  library.impl("bucket_by_token", TORCH_BOX(&bucket_by_token));
  library.impl("active_mask", TORCH_BOX(&active_mask));
  library.impl("gather_active", TORCH_BOX(&gather_active));
}

}  // namespace splade_kernels::cuda
