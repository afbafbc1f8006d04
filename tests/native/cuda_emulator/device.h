// A GPU on the CPU, for kernels that reach PTX only through ptx.cuh: a fiber for each thread, a random schedule, late
// asynchronous copies.
//
// It shows wrong indices, layouts, tails and phases, a missing wait, a deadlock, an unaligned or misplaced copy, a
// missing fence.proxy.async (its compiler reports every store, shadow.cpp), a barrier that warps meet in part or with
// differing counts. It does not show other missing fences, bank conflicts, or anything about time. Blocks are resident
// a few at a time, so a launch that needs all of them at once hangs here too.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <vector>

extern uint3 threadIdx, blockIdx;
extern dim3 gridDim;

namespace emulator {

struct Block;

struct Thread {
  void* stack_pointer = nullptr;
  uint8_t* stack = nullptr;
  Block* block = nullptr;
  int index = 0;
  bool done = false;
  bool may_touch_memory = true;  // false until a kernel that may overlap with the one before it has waited for that
  std::function<bool()> ready;   // empty: runnable
  int spins = 0;                 // waits in a loop since its warp last met in __syncwarp
  bool saw_flag = false;         // since its last fence.proxy.async, another block's ordinary stores
  std::vector<uint32_t> stored_shared;   // words of its own ordinary stores since then: offsets
  std::vector<uintptr_t> stored_global;  // and addresses

  struct Copy {
    void* to;
    const void* from;
    bool valid;
  };
  std::vector<Copy> copies;  // cp.async, not committed
  std::vector<std::vector<Copy>> copy_groups;
  int stores = 0;                            // TMA stores, not committed
  std::vector<int> store_groups;             // stores of each group that have not read shared memory yet
  struct Product {                           // wgmma, not waited for
    std::function<void(float* const*)> run;  // of the whole warpgroup; thread 0 of it has one
    float* d;
    uint64_t left, right;
    int shape;
  };
  std::vector<Product> products;
};

struct Rendezvous {
  int arrived = 0;
  uint64_t round = 0;
};

struct Barrier : Rendezvous {  // of the warps of a block
  int threads = 0;             // that it is for, by the first to come
  uint32_t lanes[32] = {};     // that have come, of each warp
  uint32_t warps = 0;          // that met here the last time
};

struct Warp {  // operands of a warp-wide instruction, lane by lane
  Rendezvous meet;
  const void* address[32];
  uint32_t* out[32];
  float* d[32];
  uint32_t a[32][4], b[32][2];
};

struct Cluster;

struct Block {
  Cluster* cluster;
  int cta, index, smem_bytes;  // cta: place in the cluster
  uint8_t* smem;
  std::vector<Thread*> threads;
  int running;
  Barrier barriers[16];
  Rendezvous warpgroups[8];
  Warp warps[32];
  std::vector<uint16_t> writers;  // of each word of shared memory: who stored it last and has not fenced, plus one
  int frozen[8] = {};             // passes for which a warpgroup does not run
};

struct Cluster {
  std::vector<Block*> blocks;
  Rendezvous meet;
};

Thread& self();
bool running();                                   // whether a thread of a kernel is
[[noreturn]] void fail(const char* format, ...);  // ends the launch with an error that says so
void yield();
void wait_until(std::function<bool()> ready);
void later(std::function<void()> operation);  // runs it at some time, in any order with others
void meet(Rendezvous& at, int threads);       // a barrier
// The last of `threads` to come does `work`; all leave after it.
template <class Work> void meet(Rendezvous& at, int threads, const Work& work) {
  const uint64_t round = at.round;
  if (++at.arrived < threads) return wait_until([&at, round] { return at.round != round; });
  at.arrived = 0;
  work();
  ++at.round;
}

// Until `threads` threads of the block, always the same whole warps, have come to its barrier `id`.
void meet_block(int id, int threads);
// An instruction that a warp runs as one: an error if some of its threads have waited apart from the others since.
void together(const Block& block, int warp, const char* what);

// ---- shadow.cpp: ordinary stores that the asynchronous proxy (TMA, wgmma) may not see yet
void stored(Thread& by, const void* at, size_t bytes);
void fence_shared(Thread& by);  // fence.proxy.async: it sees the thread's stores so far
void fence_global(Thread& by);
void asynchronous_shared(const Block& block, uint32_t offset, int64_t bytes, const char* what);
void asynchronous_global(const void* at, int64_t bytes, const char* what);
void forget_global();
template <class T> void watch(const T&) {}  // an argument of a launch: a map's memory is watched for stores
void watch(const CUtensorMap& map);

cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);

}  // namespace emulator

template <class... Params, class... Args>
cudaError_t emulated_launch(const cudaLaunchConfig_t* config, void (*kernel)(Params...), const Args&... args) {
  emulator::forget_global();
  (emulator::watch(args), ...);
  return emulator::launch(*config, [&] { kernel(Params(args)...); });
}
template <class Kernel> cudaError_t emulated_set_attribute(Kernel, cudaFuncAttribute, int bytes) {
  return bytes <= 232448 ? cudaSuccess : cudaErrorInvalidValue;
}
