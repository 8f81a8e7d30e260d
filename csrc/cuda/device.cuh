// Block size and sums over a block, for all kernels. All threads of the block or warp must reach every collective.
#pragma once

#include "../arithmetic.h"

namespace splade_kernels::cuda {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr uint32_t kAllLanes = 0xFFFFFFFF;

static_assert(kWord == kWarp, "a warp's ballot is one mask word");

// Sum of `value` over the threads before this one; `total` over all. `warp_sums` is shared memory for kWarps values,
// free for reuse on return.
__device__ inline int32_t sum_before(int32_t value, int32_t* warp_sums, int32_t& total) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  int32_t inclusive = value;
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int32_t other = __shfl_up_sync(kAllLanes, inclusive, static_cast<unsigned>(distance));
    if (lane >= distance) inclusive += other;
  }
  if (lane == kWarp - 1) warp_sums[warp] = inclusive;
  __syncthreads();
  int32_t before = inclusive - value;
  total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += warp_sums[w];
    total += warp_sums[w];
  }
  __syncthreads();
  return before;
}

}  // namespace splade_kernels::cuda
