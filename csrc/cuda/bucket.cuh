// Stable counting sort of each sequence's active entries by token, in three kernels.
//
// A sequence's vocabulary is cut into slices, one block each, so that few sequences fill a GPU:
//   count   counts the active entries of each token in each slice                counts[slice][row]
//   scan    one block per sequence: bounds of every row; counts become the place of each (row, slice)'s first entry
//   place   one block per slice processes it in tiles, sorts each tile by token in shared memory, and writes it out
//
// Tiles are sorted before they are written because neighbours in memory come from different warps at different times:
// with more sequences in flight than the L2 cache holds, every 4-byte store would cost a 32-byte sector. From the
// sorted tile consecutive threads write consecutive places of the same row.
//
// Order: entries of a row ascend by slice (scan), tile (the block processes tiles in order and advances the row's
// place), warp (a warp owns consecutive entries; prefix sums over warps), and within a warp by step and lane. No order
// depends on an atomic; those in count add integers.
#pragma once

#include "device.cuh"

namespace splade_kernels::cuda {

// Entries per tile: each thread holds kItems of them in registers.
constexpr int kItems = 16;
constexpr int kTile = kThreads * kItems;
// Tokens whose counters fit in shared memory in `place`; longer sequences take several passes over the same registers.
constexpr int kPassTokens = 2048;
// The same in `count`; longer sequences count in global memory.
constexpr int kCountTokens = 8192;

static_assert(kTile <= 1 << 16 && kPassTokens <= 1 << 16, "an entry's place in its tile and its token share 32 bits");

template <class Position, class Edge>
struct BucketInput {
  const Position* argmax;
  const uint32_t* grad;  // float32, by its bits
  const Edge* edges;
  int64_t argmax_stride_b, argmax_stride_v, grad_stride_b, grad_stride_v;
  int64_t rows;
  int64_t vocab_size;
  int64_t slice;   // entries of a slice: a multiple of kTile
  int32_t slices;  // slices of a sequence
};

// The number of slices: enough blocks to fill a GPU several times over, but at most an eighth as many (row, slice)
// counters as entries, since a counter is read and written as often as an entry.
inline int32_t slices_for(int64_t sequences, int64_t vocab_size, int64_t rows) {
  const int64_t tiles = divide_up(vocab_size, kTile);
  const int64_t filling = divide_up(4096, sequences);
  const int64_t affordable = sequences * vocab_size / (8 * (rows > 0 ? rows : 1));
  const int64_t wanted = filling < affordable ? filling : affordable;
  return static_cast<int32_t>(wanted < 1 ? 1 : wanted < tiles ? wanted : tiles);
}

// The slice that a block handles, and its sequence.
template <class Position, class Edge>
struct Slice {
  int64_t b;
  int64_t begin, end;
  Segment segment;
  const Position* argmax;
  const uint32_t* grad;

  __device__ explicit Slice(const BucketInput<Position, Edge>& in) {
    b = blockIdx.x / static_cast<uint32_t>(in.slices);
    const int64_t first = static_cast<int64_t>(blockIdx.x % static_cast<uint32_t>(in.slices)) * in.slice;
    begin = first < in.vocab_size ? first : in.vocab_size;
    end = first + in.slice < in.vocab_size ? first + in.slice : in.vocab_size;
    segment = segment_between(in.edges[b], in.edges[b + 1], in.edges[0], in.rows);
    argmax = in.argmax + b * in.argmax_stride_b;
    grad = in.grad + b * in.grad_stride_b;
  }

  // Where the counters of this slice's sequence begin.
  __device__ int64_t counters(const BucketInput<Position, Edge>& in) const {
    return static_cast<int64_t>(blockIdx.x % static_cast<uint32_t>(in.slices)) * in.rows + segment.first;
  }
};

// counts[slice][row] of every row of every segment.
template <class Position, class Edge>
__global__ void __launch_bounds__(kThreads) count_kernel(BucketInput<Position, Edge> in, int32_t* counts) {
  __shared__ int32_t tokens[kCountTokens];
  constexpr int kBatch = 8;  // loads in flight
  const Slice<Position, Edge> slice(in);
  const int tid = static_cast<int>(threadIdx.x);
  const int64_t length = slice.segment.length;
  const bool fits = length <= kCountTokens;
  int32_t* rows = counts + slice.counters(in);
  for (int64_t token = tid; token < length; token += kThreads) (fits ? tokens : rows)[token] = 0;
  __syncthreads();
  for (int64_t first = slice.begin + tid; first < slice.end; first += kThreads * kBatch) {
    uint32_t grad[kBatch];
    int64_t position[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t v = first + i * kThreads;
      const bool inside = v < slice.end;
      grad[i] = inside ? slice.grad[v * in.grad_stride_v] : 0;
      position[i] = inside ? static_cast<int64_t>(slice.argmax[v * in.argmax_stride_v]) : -1;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (!Float32::nonzero(grad[i]) || position[i] < 0 || position[i] >= length) continue;
      if (fits) {
        atomicAdd(&tokens[position[i]], 1);
      } else {
        atomicAdd(&rows[position[i]], 1);
      }
    }
  }
  __syncthreads();
  if (!fits) return;
  for (int64_t token = tid; token < length; token += kThreads) rows[token] = tokens[token];
}

// One block per sequence: writes the bounds of its rows (rows without entries stay as they are), and to `counts` the
// place of each (slice, row)'s first entry, relative to the beginning of the sequence's words.
template <class Position, class Edge>
__global__ void __launch_bounds__(kThreads) scan_kernel(BucketInput<Position, Edge> in, int32_t* counts, int64_t* bounds) {
  __shared__ int32_t warp_sums[kWarps];
  const int64_t b = blockIdx.x;
  const Segment segment = segment_between(in.edges[b], in.edges[b + 1], in.edges[0], in.rows);
  const int64_t offset = b * in.vocab_size;
  int32_t done = 0;
  for (int64_t first = 0; first < segment.length; first += kThreads) {
    const int64_t token = first + threadIdx.x;
    const bool inside = token < segment.length;
    int32_t* column = counts + segment.first + token;
    int32_t count = 0;
    if (inside) {
      for (int32_t s = 0; s < in.slices; ++s) count += column[s * in.rows];
    }
    int32_t total;
    int32_t place = done + sum_before(count, warp_sums, total);
    done += total;
    if (!inside || count == 0) continue;
    bounds[2 * (segment.first + token)] = offset + place;
    bounds[2 * (segment.first + token) + 1] = offset + place + count;
    for (int32_t s = 0; s < in.slices; ++s) {
      const int32_t here = column[s * in.rows];
      column[s * in.rows] = place;
      place += here;
    }
  }
}

// Holds the tile's counters and, once every entry's place in the sorted tile is known, the sorted tile.
union PlaceMemory {
  uint16_t counts[kWarps][kPassTokens];
  struct {
    uint32_t entries[kTile];  // token << 16 | place in the tile
    uint32_t values[kTile];
  } sorted;
};

template <class Position, class Edge>
__global__ void __launch_bounds__(kThreads, 2)
    place_kernel(BucketInput<Position, Edge> in, int32_t* places, int32_t* words, uint32_t* values) {
  __shared__ PlaceMemory memory;
  __shared__ int32_t shift[kPassTokens];  // from a place in the sorted tile to one in the sequence's words
  __shared__ int32_t warp_sums[kWarps];
  const Slice<Position, Edge> slice(in);
  const int tid = static_cast<int>(threadIdx.x), lane = tid % kWarp, warp = tid / kWarp;
  const uint32_t lanes_before = (uint32_t{1} << lane) - 1;
  const int64_t offset = slice.b * in.vocab_size;
  int32_t* rows = places + slice.counters(in);
  uint16_t* counts = memory.counts[warp];

  for (int64_t tile = slice.begin; tile < slice.end; tile += kTile) {
    // A warp's entries are consecutive: lane by lane within step i.
    const int within = warp * kItems * kWarp + lane;
    int32_t token_of[kItems];  // -1: not active
    uint32_t grad[kItems];
    uint32_t rank[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int64_t v = tile + within + i * kWarp;
      const bool inside = v < slice.end;
      grad[i] = inside ? slice.grad[v * in.grad_stride_v] : 0;
      const int64_t position = inside ? static_cast<int64_t>(slice.argmax[v * in.argmax_stride_v]) : -1;
      const bool active = Float32::nonzero(grad[i]) && position >= 0 && position < slice.segment.length;
      token_of[i] = active ? static_cast<int32_t>(position) : -1;
    }
    for (int64_t pass = 0; pass < slice.segment.length; pass += kPassTokens) {
      const int64_t left = slice.segment.length - pass;
      const int32_t tokens = static_cast<int32_t>(left < kPassTokens ? left : kPassTokens);
      const int32_t base = static_cast<int32_t>(pass);
      for (int32_t token = lane; token < tokens; token += kWarp) counts[token] = 0;
      __syncwarp();
      // Rank of each entry among the warp's entries of its token.
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int32_t token = token_of[i] - base;
        const bool mine = token_of[i] >= base && token < tokens;
        const uint32_t peers = __match_any_sync(kAllLanes, mine ? token : -1);
        const uint32_t before = static_cast<uint32_t>(__popc(peers & lanes_before));
        const uint32_t seen = mine ? counts[token] : 0;
        __syncwarp();
        if (mine && before == 0) counts[token] = static_cast<uint16_t>(seen + static_cast<uint32_t>(__popc(peers)));
        __syncwarp();
        rank[i] = seen + before;
      }
      __syncthreads();
      // Counts become the place of each (token, warp)'s first entry in the sorted tile.
      int32_t sorted = 0;
      for (int32_t first = 0; first < tokens; first += kThreads) {
        const int32_t token = first + tid;
        int32_t count = 0;
        if (token < tokens) {
          for (int w = 0; w < kWarps; ++w) count += memory.counts[w][token];
        }
        int32_t total;
        int32_t place = sorted + sum_before(count, warp_sums, total);
        sorted += total;
        if (count == 0) continue;
        const int32_t start = rows[pass + token];
        shift[token] = start - place;
        rows[pass + token] = start + count;
        for (int w = 0; w < kWarps; ++w) {
          const int32_t here = memory.counts[w][token];
          memory.counts[w][token] = static_cast<uint16_t>(place);
          place += here;
        }
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int32_t token = token_of[i] - base;
        if (token_of[i] >= base && token < tokens) rank[i] += counts[token];
      }
      __syncthreads();  // from here on the memory holds the sorted tile
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int32_t token = token_of[i] - base;
        if (token_of[i] < base || token >= tokens) continue;
        memory.sorted.entries[rank[i]] = static_cast<uint32_t>(token) << 16 | static_cast<uint32_t>(within + i * kWarp);
        memory.sorted.values[rank[i]] = grad[i];
      }
      __syncthreads();
      for (int32_t i = tid; i < sorted; i += kThreads) {
        const uint32_t entry = memory.sorted.entries[i];
        const int64_t place = offset + shift[entry >> 16] + i;
        words[place] = static_cast<int32_t>(tile + (entry & 0xFFFF));
        values[place] = memory.sorted.values[i];
      }
      __syncthreads();
    }
  }
}

}  // namespace splade_kernels::cuda
