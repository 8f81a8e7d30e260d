// Checks of the arguments, and dispatch over dtypes, for the CPU and the CUDA implementation.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "arithmetic.h"

namespace splade_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// `name` is what the operator calls the gradient.
inline void check_bucket(
    const Tensor& argmax, const char* name, const Tensor& grad, const Tensor& edges, int64_t rows) {
  STD_TORCH_CHECK(argmax.dim() == 2 && grad.dim() == 2, "argmax, ", name, ": expected shape [n, V]");
  STD_TORCH_CHECK(
      argmax.size(0) == grad.size(0) && argmax.size(1) == grad.size(1), "argmax, ", name, ": expected equal shapes");
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float, name, ": expected float32");
  STD_TORCH_CHECK(edges.dim() == 1 && edges.size(0) == grad.size(0) + 1, "edges: expected shape [n + 1]");
  STD_TORCH_CHECK(
      argmax.device() == grad.device() && edges.device() == grad.device(),
      "argmax, edges: expected on the device of ", name);
  STD_TORCH_CHECK(grad.size(1) <= std::numeric_limits<int32_t>::max(), name, ": expected V < 2^31");
  STD_TORCH_CHECK(rows >= 0, "rows: expected at least 0, got ", rows);
}

inline void check_mask(const Tensor& embeddings, int64_t count) {
  STD_TORCH_CHECK(embeddings.dim() == 2, "embeddings: expected shape [B, V]");
  STD_TORCH_CHECK(count >= 1, "count: expected at least 1, got ", count);
}

inline void check_gather(const Tensor& embeddings, const Tensor& crow, const Tensor& mask, int64_t capacity) {
  STD_TORCH_CHECK(embeddings.dim() == 2, "embeddings: expected shape [B, V]");
  STD_TORCH_CHECK(
      crow.scalar_type() == ScalarType::Long && crow.is_contiguous() && crow.dim() == 1 &&
          crow.size(0) == embeddings.size(0) + 1,
      "crow: expected contiguous int64 [B + 1]");
  STD_TORCH_CHECK(
      mask.scalar_type() == ScalarType::Int && mask.is_contiguous() && mask.dim() == 2 &&
          mask.size(0) == embeddings.size(0) && mask.size(1) == divide_up(embeddings.size(1), kWord),
      "mask: expected contiguous int32 [B, ceil(V / 32)]");
  STD_TORCH_CHECK(
      crow.device() == embeddings.device() && mask.device() == embeddings.device(),
      "crow, mask: expected on the device of embeddings");
  STD_TORCH_CHECK(capacity >= 0, "capacity: expected at least 0, got ", capacity);
}

// Calls f with the Format of a floating-point dtype.
template <class Function>
void with_format(ScalarType dtype, Function&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(Float32{});
    case ScalarType::Double: return f(Float64{});
    case ScalarType::Half: return f(Float16{});
    case ScalarType::BFloat16: return f(BFloat16{});
    default: STD_TORCH_CHECK(false, "embeddings: expected float32, float16, bfloat16 or float64");
  }
}

// Calls f with a value of the type that an integer dtype, one of two, stands for.
template <class Narrow, class Wide, class Function>
void with_integer(const char* name, ScalarType dtype, Function&& f) {
  constexpr ScalarType narrow = torch::headeronly::CppTypeToScalarType<Narrow>::value;
  constexpr ScalarType wide = torch::headeronly::CppTypeToScalarType<Wide>::value;
  STD_TORCH_CHECK(dtype == narrow || dtype == wide, name, ": expected ", narrow, " or ", wide, ", got ", dtype);
  return dtype == narrow ? f(Narrow{}) : f(Wide{});
}

}  // namespace splade_kernels
