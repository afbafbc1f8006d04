// The emulated GPU's scheduler and the few functions of the CUDA runtime and driver that the library calls.
#include "device.h"

#include <cuda.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

uint3 threadIdx, blockIdx;  // of the running thread
dim3 gridDim;

namespace emulator {
namespace {

constexpr size_t kStackBytes = 64 * 1024, kSmemBytes = 256 * 1024;

struct Settings {
  int sms = 8, resident_blocks = 8, delay = 4, freeze = 0;
  uint64_t seed = 1;
  bool late = false;
} settings;

Thread* current = nullptr;
void* scheduler_stack = nullptr;
const std::function<void()>* running_kernel = nullptr;
bool overlaps = false;  // the running kernel, with the one before it
std::vector<std::function<void()>> pending;
std::string failure;

struct Failed {};

uint32_t random_number() {
  settings.seed = settings.seed * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(settings.seed >> 33);
}

extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
emulator_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

void to_scheduler() { emulator_switch(&current->stack_pointer, scheduler_stack); }

void thread_main() {
  (*running_kernel)();
  current->done = true;
  to_scheduler();
}

// Memory that is used again: one stack for each thread, one shared memory for each block.
uint8_t* take(std::vector<uint8_t*>& free, size_t bytes) {
  if (free.empty())
    return static_cast<uint8_t*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  uint8_t* memory = free.back();
  free.pop_back();
  return memory;
}
std::vector<uint8_t*> free_stacks, free_smem;

Thread* new_thread(Block* block, int index) {
  auto* t = new Thread;
  t->block = block;
  t->index = index;
  t->may_touch_memory = !overlaps;
  t->stack = take(free_stacks, kStackBytes);
  void** top = reinterpret_cast<void**>(t->stack + kStackBytes - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(thread_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  t->stack_pointer = top;
  return t;
}

Cluster* new_cluster(int first_block, int blocks, int threads, int smem_bytes) {
  auto* cluster = new Cluster;
  for (int cta = 0; cta < blocks; ++cta) {
    auto* b = new Block{};
    b->cluster = cluster;
    b->cta = cta;
    b->index = first_block + cta;
    b->smem_bytes = smem_bytes;
    b->smem = take(free_smem, kSmemBytes);
    std::memset(b->smem, 0xff, kSmemBytes);  // NaN
    b->writers.assign(static_cast<size_t>(smem_bytes) / 4 + 1, 0);
    b->running = threads;
    for (int i = 0; i < threads; ++i) b->threads.push_back(new_thread(b, i));
    cluster->blocks.push_back(b);
  }
  return cluster;
}

void delete_cluster(Cluster* cluster) {
  for (Block* b : cluster->blocks) {
    for (Thread* t : b->threads) {
      free_stacks.push_back(t->stack);
      delete t;
    }
    free_smem.push_back(b->smem);
    delete b;
  }
  delete cluster;
}

void run_one_pending() {
  const size_t i = random_number() % pending.size();
  auto operation = std::move(pending[i]);
  pending[i] = std::move(pending.back());
  pending.pop_back();
  operation();
}

bool finished(const Cluster& cluster) {
  for (const Block* b : cluster.blocks)
    if (b->running) return false;
  return true;
}

void check_end(const Cluster& cluster) {
  for (const Block* b : cluster.blocks)
    for (const Thread* t : b->threads)
      if (t->stores || !t->products.empty())
        fail("block %d thread %d ends with an open store or product", b->index, t->index);
}

// One pass over the threads that are resident, from a random one on; whether any of them ran, and whether any was held
// back.
struct Pass {
  bool ran = false, held = false;
};
Pass run_threads(const std::vector<Cluster*>& resident) {
  static std::vector<Thread*> threads;
  threads.clear();
  Pass pass;
  for (const Cluster* c : resident)
    for (Block* b : c->blocks) {
      for (int& frozen : b->frozen) {
        if (frozen) --frozen;
        else if (settings.freeze && random_number() % 64 == 0) frozen = random_number() % settings.freeze;
        pass.held |= frozen > 0;
      }
      threads.insert(threads.end(), b->threads.begin(), b->threads.end());
    }
  for (size_t i = 0, first = random_number() % threads.size(); i < threads.size(); ++i) {
    Thread* t = threads[(first + i) % threads.size()];
    if (t->done || t->block->frozen[t->index / 128] || (t->ready && !t->ready())) continue;
    t->ready = nullptr;
    current = t;
    threadIdx = uint3{static_cast<unsigned>(t->index), 0, 0};
    blockIdx = uint3{static_cast<unsigned>(t->block->index), 0, 0};
    emulator_switch(&scheduler_stack, t->stack_pointer);
    current = nullptr;
    if (!failure.empty()) throw Failed{};
    if (t->done) --t->block->running;
    pass.ran = true;
    while (!pending.empty() && random_number() % settings.delay == 0) run_one_pending();
  }
  return pass;
}

void thaw(const std::vector<Cluster*>& resident) {
  for (const Cluster* c : resident)
    for (Block* b : c->blocks) std::fill(std::begin(b->frozen), std::end(b->frozen), 0);
}

void run_grid(int blocks, int threads, int smem_bytes, int cluster_blocks, std::vector<Cluster*>& resident) {
  int next = 0;
  int64_t passes = 0;
  const auto fits = [&] {
    return next < blocks &&
           (resident.empty() || static_cast<int>(resident.size() + 1) * cluster_blocks <= settings.resident_blocks);
  };
  const auto admit = [&] {
    resident.push_back(new_cluster(next, cluster_blocks, threads, smem_bytes));
    next += cluster_blocks;
  };
  while (next < blocks || !resident.empty()) {
    while (fits() && (resident.empty() || !settings.late)) admit();
    const Pass pass = run_threads(resident);
    if (!pass.ran) {
      if (!pending.empty()) run_one_pending();
      else if (pass.held) thaw(resident);
      else if (fits()) admit();
      else fail("deadlock: every thread waits");
    }
    if (++passes > 20'000'000) fail("no end in sight");
    for (size_t i = 0; i < resident.size();) {
      if (!finished(*resident[i])) {
        ++i;
        continue;
      }
      while (!pending.empty()) run_one_pending();  // TMA stores on their way out of this shared memory
      check_end(*resident[i]);
      delete_cluster(resident[i]);
      resident.erase(resident.begin() + static_cast<long>(i));
    }
  }
}

}  // namespace

Thread& self() { return *current; }
bool running() { return current; }
void yield() { to_scheduler(); }
void wait_until(std::function<bool()> ready) {
  current->ready = std::move(ready);
  to_scheduler();
}
void later(std::function<void()> operation) { pending.push_back(std::move(operation)); }
void meet(Rendezvous& at, int threads) {
  meet(at, threads, [] {});
}

void meet_block(int id, int threads) {
  Block& block = *current->block;
  Barrier& at = block.barriers[id];
  if (threads % 32 || threads < 32 || threads > static_cast<int>(block.threads.size()))
    fail("barrier %d is for %d threads of %zu", id, threads, block.threads.size());
  if (at.arrived == 0) at.threads = threads;
  if (at.threads != threads) fail("barrier %d is for %d threads and for %d", id, at.threads, threads);
  at.lanes[current->index / 32] |= 1u << current->index % 32;
  meet(at, threads, [&] {
    uint32_t met = 0;
    for (int warp = 0; warp < 32; ++warp) {
      const uint32_t lanes = std::exchange(at.lanes[warp], 0);
      if (lanes == 0) continue;
      if (lanes != ~0u) fail("barrier %d is met by a part of warp %d", id, warp);
      together(block, warp, "a barrier");
      met |= 1u << warp;
    }
    if (at.warps && at.warps != met) fail("barrier %d is met by warps %x, the last time by %x", id, met, at.warps);
    at.warps = met;
  });
}

void together(const Block& block, int warp, const char* what) {
  const Thread* const* lanes = &block.threads[static_cast<size_t>(warp) * 32];
  for (int lane = 1; lane < 32; ++lane)
    if (lanes[lane]->spins != lanes[0]->spins) fail("warp %d comes apart to %s: __syncwarp is missing", warp, what);
}

void fail(const char* format, ...) {
  char text[300];
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof text, format, values);
  va_end(values);
  failure = text;
  if (current)
    failure += " (block " + std::to_string(current->block->index) + ", thread " + std::to_string(current->index) + ")";
  while (current) to_scheduler();  // and never back
  throw Failed{};
}

cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  int cluster = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension)
      cluster = static_cast<int>(config.attrs[i].val.clusterDim.x);
  const int blocks = static_cast<int>(config.gridDim.x), threads = static_cast<int>(config.blockDim.x),
            smem = static_cast<int>(config.dynamicSmemBytes);
  failure.clear();
  overlaps = false;
  for (unsigned i = 0; i < config.numAttrs; ++i)
    overlaps |= config.attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization;
  if (blocks < 1 || blocks % cluster || threads % 32 || threads > 1024 || smem > 232448)
    return cudaErrorInvalidConfiguration;
  running_kernel = &kernel;
  gridDim = config.gridDim;
  std::vector<Cluster*> resident;
  try {
    run_grid(blocks, threads, smem, cluster, resident);
    return cudaSuccess;
  } catch (const Failed&) {
    pending.clear();
    current = nullptr;
    return cudaErrorLaunchFailure;
  }
}

}  // namespace emulator

using emulator::settings;

// For the tests, through ctypes: SMs of the device, blocks that are resident at once, one in how many chances an
// asynchronous copy lands, passes for which a warpgroup may be held back, the seed of the schedule, and whether a
// cluster comes only when all that are there wait.
extern "C" __attribute__((visibility("default"))) void emulator_configure(int sms, int resident_blocks, int delay,
                                                                          int freeze, int seed, int late) {
  settings = {sms, resident_blocks, delay, freeze, static_cast<uint64_t>(seed), late != 0};
}

extern "C" __attribute__((visibility("default"))) int emulator_last_launch_overlapped() { return emulator::overlaps; }

extern "C" {
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }  // a launch returns when it is through
cudaError_t cudaMalloc(void** data, size_t bytes) {
  *data = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return *data ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void* data) { return std::free(data), cudaSuccess; }
cudaError_t cudaMemset(void* data, int value, size_t bytes) { return std::memset(data, value, bytes), cudaSuccess; }
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "cudaErrorLaunchFailure" : "CUDA error";
}
const char* cudaGetErrorString(cudaError_t) { return emulator::failure.c_str(); }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? 9
           : attribute == cudaDevAttrComputeCapabilityMinor ? 0
                                                            : settings.sms;
  return cudaSuccess;
}
}

// A tensor map of the emulated device: what ptx.cuh reads, in the first bytes of a CUtensorMap. The checks are
// cuTensorMapEncodeTiled's.
static CUresult encode(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data, const cuuint64_t* dims,
                       const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t*, CUtensorMapInterleave,
                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const unsigned span = swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 128 : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64 : 32;
  const bool aligned =
      reinterpret_cast<uintptr_t>(map) % 64 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides[0] % 16 == 0;
  if (rank != 2 || !aligned || !dims[0] || !dims[1] || box[0] * 2 != span || box[1] > 256)
    return CUDA_ERROR_INVALID_VALUE;
  const int64_t fields[6] = {reinterpret_cast<int64_t>(data),
                             static_cast<int64_t>(dims[1]),
                             static_cast<int64_t>(dims[0]),
                             static_cast<int64_t>(strides[0] / 2),
                             box[1],
                             box[0]};
  std::memcpy(map, fields, sizeof fields);
  return CUDA_SUCCESS;
}

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                                        cudaDriverEntryPointQueryResult* result) {
  *function = reinterpret_cast<void*>(encode);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
