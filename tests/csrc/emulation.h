// Enough of CUDA to run a kernel on a CPU: a thread of the operating system for each thread of a block, real barriers,
// one block at a time. Slow, and honest about order: nothing is in step that the kernel does not put in step.
#pragma once

#include <atomic>
#include <barrier>
#include <bit>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct Index {
  uint32_t x;
};
inline thread_local Index threadIdx, blockIdx;

namespace emulation {

struct Warp {
  std::barrier<> barrier{32};
  int64_t exchanged[32];
};

inline std::vector<std::unique_ptr<Warp>> warps;
inline std::unique_ptr<std::barrier<>> block;

inline Warp& warp() { return *warps[threadIdx.x / 32]; }

// f(what the 32 lanes gave), in every lane.
template <class T, class Function>
auto exchange(T value, Function&& f) {
  Warp& mine = warp();
  mine.exchanged[threadIdx.x % 32] = static_cast<int64_t>(value);
  mine.barrier.arrive_and_wait();
  auto result = f(mine.exchanged);
  mine.barrier.arrive_and_wait();
  return result;
}

// Last block first: no block may build on another one.
template <class Kernel, class... Arguments>
void launch(uint32_t blocks, uint32_t threads, Kernel kernel, Arguments... arguments) {
  warps.clear();
  for (uint32_t w = 0; w < threads / 32; ++w) warps.push_back(std::make_unique<Warp>());
  block = std::make_unique<std::barrier<>>(threads);
  std::vector<std::thread> team;
  std::barrier<> next(threads);
  for (uint32_t t = 0; t < threads; ++t) {
    team.emplace_back([&, t] {
      threadIdx.x = t;
      for (uint32_t b = blocks; b-- > 0;) {
        blockIdx.x = b;
        kernel(arguments...);
        next.arrive_and_wait();
      }
    });
  }
  for (std::thread& thread : team) thread.join();
}

}  // namespace emulation

inline void __syncthreads() { emulation::block->arrive_and_wait(); }
inline void __syncwarp() { emulation::warp().barrier.arrive_and_wait(); }
inline int __popc(uint32_t value) { return std::popcount(value); }

inline int32_t atomicAdd(int32_t* address, int32_t value) {
  return std::atomic_ref<int32_t>(*address).fetch_add(value, std::memory_order_relaxed);
}

inline uint32_t __ballot_sync(uint32_t, bool predicate) {
  return emulation::exchange(predicate, [](const int64_t* lanes) {
    uint32_t word = 0;
    for (int i = 0; i < 32; ++i) word |= static_cast<uint32_t>(lanes[i]) << i;
    return word;
  });
}

inline uint32_t __match_any_sync(uint32_t, int32_t value) {
  return emulation::exchange(value, [value](const int64_t* lanes) {
    uint32_t word = 0;
    for (int i = 0; i < 32; ++i) word |= static_cast<uint32_t>(lanes[i] == value) << i;
    return word;
  });
}

template <class T>
T __shfl_sync(uint32_t, T value, int lane) {
  return emulation::exchange(value, [lane](const int64_t* lanes) { return static_cast<T>(lanes[lane]); });
}

template <class T>
T __shfl_up_sync(uint32_t, T value, unsigned distance) {
  const unsigned lane = threadIdx.x % 32;
  return emulation::exchange(value, [=](const int64_t* lanes) {
    return static_cast<T>(lanes[lane >= distance ? lane - distance : lane]);
  });
}
