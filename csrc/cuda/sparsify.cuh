// Dense → CSR with one block per row: a mask of the entries, then their ids and values.
#pragma once

#include "device.cuh"

namespace splade_kernels::cuda {

template <class T>
struct Matrix {
  const T* data;
  int64_t stride_b, stride_v;
  int64_t size;

  __device__ T operator()(int64_t b, int64_t v) const { return data[b * stride_b + v * stride_v]; }
};

// The entries of a row that are kept: non-zeros with a key above `cut`, and the first `places` of those equal to it.
template <class Bits>
struct Cut {
  Bits cut;
  int32_t places;
  bool all_ties;  // every entry at the cut has a place
};

constexpr int kDigit = 8;
constexpr int kBins = 1 << kDigit;
static_assert(kBins == kThreads, "a thread looks after one bin");

// The key of rank `kept` (1: the largest) among the non-zeros of row b, found 8 bits at a time from the top.
template <class F>
__device__ Cut<typename F::Bits> select_cut(
    const Matrix<typename F::Bits>& in, int64_t b, int32_t kept, int32_t* bins, int32_t* warp_sums, int32_t* found) {
  using Bits = typename F::Bits;
  const int tid = static_cast<int>(threadIdx.x);
  Bits cut = 0, known = 0;  // the digits found so far, and which bits they are
  int32_t ties = 0;
  for (int digit = F::kBits - kDigit; digit >= 0; digit -= kDigit) {
    bins[tid] = 0;
    __syncthreads();
    for (int64_t v = tid; v < in.size; v += kThreads) {
      const Bits bits = in(b, v);
      const Bits key = F::key(bits);
      if (F::nonzero(bits) && ((key ^ cut) & known) == 0) atomicAdd(&bins[(key >> digit) & (kBins - 1)], 1);
    }
    __syncthreads();
    const int bin = kBins - 1 - tid;  // from the largest digit down
    const int32_t count = bins[bin];
    int32_t total;
    const int32_t above = sum_before(count, warp_sums, total);
    if (above < kept && kept <= above + count) {
      found[0] = bin;
      found[1] = above;
      found[2] = count;
    }
    __syncthreads();
    cut = static_cast<Bits>(cut | static_cast<Bits>(static_cast<Bits>(found[0]) << digit));
    known = static_cast<Bits>(known | static_cast<Bits>(static_cast<Bits>(kBins - 1) << digit));
    kept -= found[1];
    ties = found[2];
    __syncthreads();
  }
  return {cut, kept, kept == ties};
}

// counts[b] and mask[b] (a bit for every entry) of the non-zeros among the `count` largest entries of row b.
template <class F>
__global__ void __launch_bounds__(kThreads)
    mask_kernel(Matrix<typename F::Bits> in, int64_t count, int64_t* counts, uint32_t* mask) {
  using Bits = typename F::Bits;
  __shared__ int32_t bins[kBins];
  __shared__ int32_t warp_sums[kWarps];
  __shared__ int32_t found[3];
  const int64_t b = blockIdx.x;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % kWarp, warp = tid / kWarp;
  const int64_t words = divide_up(in.size, kWord);

  Cut<Bits> cut{0, 0, true};  // every non-zero's key is above 0
  if (count < in.size) {
    int32_t nonzeros = 0, positives = 0;
    for (int64_t v = tid; v < in.size; v += kThreads) {
      const Bits bits = in(b, v);
      if (!F::nonzero(bits)) continue;
      ++nonzeros;
      if (F::positive(F::key(bits))) ++positives;
    }
    int32_t all_nonzeros, all_positives;
    sum_before(nonzeros, warp_sums, all_nonzeros);
    sum_before(positives, warp_sums, all_positives);
    const int64_t kept = kept_nonzeros(count, all_positives, all_nonzeros, in.size);
    if (kept == 0) {
      cut = {F::kLargestKey, 0, false};
    } else if (kept < all_nonzeros) {
      cut = select_cut<F>(in, b, static_cast<int32_t>(kept), bins, warp_sums, found);
    }
  }

  int32_t kept = 0, ties_before = 0;
  for (int64_t first = 0; first < words; first += kWarps) {
    const int64_t v = (first + warp) * kWord + lane;
    const Bits bits = v < in.size ? in(b, v) : Bits{0};
    const Bits key = F::key(bits);
    bool keep = F::nonzero(bits) && (key > cut.cut || (key == cut.cut && cut.all_ties));
    if (!cut.all_ties) {
      const bool tied = F::nonzero(bits) && key == cut.cut;
      int32_t total;
      const int32_t rank = ties_before + sum_before(tied ? 1 : 0, warp_sums, total);
      ties_before += total;
      keep = keep || (tied && rank < cut.places);
    }
    const uint32_t word = __ballot_sync(kAllLanes, keep);
    if (lane == 0 && first + warp < words) mask[b * words + first + warp] = word;
    if (keep) ++kept;
  }
  int32_t total;
  sum_before(kept, warp_sums, total);
  if (tid == 0) counts[b] = total;
}

// Writes col and values of the entries in the mask, those of row b from crow[b] on; nothing at or past `capacity`.
template <class Bits>
__global__ void __launch_bounds__(kThreads) gather_kernel(
    Matrix<Bits> in, const int64_t* crow, const uint32_t* mask, int64_t capacity, int64_t* col, Bits* values) {
  __shared__ int32_t warp_sums[kWarps];
  const int64_t b = blockIdx.x;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % kWarp, warp = tid / kWarp;
  const uint32_t lanes_before = (uint32_t{1} << lane) - 1;
  const int64_t words = divide_up(in.size, kWord);
  const int64_t begin = crow[b], end = crow[b + 1] < capacity ? crow[b + 1] : capacity;
  int64_t done = begin;
  for (int64_t first = 0; first < words; first += kThreads) {
    // Each thread counts the bits of one mask word, then the warp writes the entries of its 32 words together.
    const uint32_t own = first + tid < words ? mask[b * words + first + tid] : 0;
    int32_t total;
    const int32_t own_before = sum_before(__popc(own), warp_sums, total);
    for (int i = 0; i < kWarp; ++i) {
      const uint32_t word = __shfl_sync(kAllLanes, own, i);
      const int64_t place = done + __shfl_sync(kAllLanes, own_before, i) + __popc(word & lanes_before);
      const int64_t v = (first + warp * kWarp + i) * kWord + lane;
      if ((word >> lane & 1) != 0 && v < in.size && place >= 0 && place < end) {
        col[place] = v;
        values[place] = in(b, v);
      }
    }
    done += total;
  }
}

}  // namespace splade_kernels::cuda
