// The PTX that the kernels use, one function an instruction, under the headings of the PTX ISA manual's instruction
// set (version 9.0).
//
// Shared-memory addresses are generic pointers here and 32-bit in PTX. Functions from sm_90 on are for kernel bodies
// under FUSED_LORA_SM90A.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstdio>
#include <type_traits>

#include "descriptor.h"

// A kernel body that needs Hopper's own instructions is empty without it, and the host refuses the device.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FUSED_LORA_SM90A 1
#endif

namespace fused_lora::ptx {

#define PTX_FN __device__ __forceinline__

PTX_FN uint32_t shared(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// The block's dynamic shared memory from its first multiple of 1024 on: the same offset in every block of a cluster.
PTX_FN uint8_t* dynamic_smem() {
  extern __shared__ __align__(1024) uint8_t fused_lora_smem[];
  return fused_lora_smem + (1024 - (shared(fused_lora_smem) & 1023)) % 1024;
}

template <class T> PTX_FN uint32_t pack(float lo, float hi) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
    return *reinterpret_cast<const uint32_t*>(&v);
  } else {
    const __half2 v = __floats2half2_rn(lo, hi);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
}
template <class T> PTX_FN float2 unpack(uint32_t v) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&v));
  else return __half22float2(*reinterpret_cast<const __half2*>(&v));
}
// d += a * b if `condition` is not 0, in d's own register: as a C++ select it costs a register for each d, and the
// kernel that uses it spills.
PTX_FN void fma_if(float& d, float a, float b, uint32_t condition) {
  asm("{\n.reg .pred p;\nsetp.ne.u32 p, %3, 0;\n@p fma.rn.f32 %0, %1, %2, %0;\n}"
      : "+f"(d)
      : "f"(a), "f"(b), "r"(condition));
}
template <class T> constexpr uint32_t kOnes = std::is_same_v<T, __nv_bfloat16> ? 0x3f803f80u : 0x3c003c00u;  // two ones

// What lane `from` of the warp has.
PTX_FN uint32_t shuffle(uint32_t value, int from) { return __shfl_sync(~0u, value, from); }

// ---- sm_80: Data Movement, cp.async; Warp-level Matrix Instructions, ldmatrix and mma
// 16 bytes from global to shared memory, zeros if not valid (src must be a legal address all the same).
PTX_FN void cp_async(void* dst, const void* src, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared(dst)), "l"(src),
               "r"(valid ? 16 : 0)
               : "memory");
}
PTX_FN void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending> PTX_FN void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices; lane 8 i + j gives the address of row j of matrix i.
template <bool kTransposed> PTX_FN void ldmatrix(uint32_t (&r)[4], const void* row) {
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared(row))
                 : "memory");
}

// d[16, 8] += a[16, 16] b[16, 8]
template <class T> PTX_FN void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define PTX_MMA(type)                                                                 \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, __nv_bfloat16>) PTX_MMA("bf16");
  else PTX_MMA("f16");
#undef PTX_MMA
}

// ---- sm_90: Parallel Synchronization, griddepcontrol
// Until the kernel before this one is complete and what it wrote is seen, if this one was launched to overlap with it;
// else nothing.
PTX_FN void wait_for_previous_kernel() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel may start once every block has come here or ended.
PTX_FN void start_next_kernel() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- sm_90: Parallel Synchronization, barrier.cluster and bar
PTX_FN uint32_t cta_in_cluster() {
  uint32_t cta;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(cta));
  return cta;
}
PTX_FN void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
PTX_FN void named_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// ---- sm_90: Parallel Synchronization, mbarrier; Data Movement, mapa, ld and st.async
PTX_FN void barrier_init(uint64_t* bar, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared(bar)), "r"(arrivals) : "memory");
}
PTX_FN void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
PTX_FN void arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared(bar)) : "memory");
}
PTX_FN void arrive_expect(uint64_t* bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared(bar)), "r"(bytes) : "memory");
}
// On the same barrier of block `cta` of the cluster. Spelled .release.cluster it compiles to a GPU-wide MEMBAR.
PTX_FN void arrive_remote(uint64_t* bar, uint32_t cta) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, "
      "[remote];\n}" ::"r"(shared(bar)),
      "r"(cta)
      : "memory");
}
// Until the phase of this parity is complete; a fresh barrier's phase 1 counts as complete.
#ifndef FUSED_LORA_SPIN_LIMIT
PTX_FN void wait(uint64_t* bar, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN_%=:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra "
      "DONE_%=;\nbra AGAIN_%=;\nDONE_%=:\n}" ::"r"(shared(bar)),
      "r"(parity)
      : "memory");
}
// The same where another block of the cluster wrote what the barrier guards (store_remote).
PTX_FN void wait_cluster(uint64_t* bar, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN_%=:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n@done "
      "bra DONE_%=;\nbra AGAIN_%=;\nDONE_%=:\n}" ::"r"(shared(bar)),
      "r"(parity)
      : "memory");
}
#else
// A build to look for hangs: a wait of more turns than the limit says where it stands and for what, and ends the
// kernel. The line tells role and barrier, the address the slot.
PTX_FN void stuck(const char* file, int line, const void* at, uint32_t parity) {
  printf("stuck at %s:%d: block %d, thread %d, parity %u of the barrier at byte %d of shared memory (a flag: global)\n",
         file, line, static_cast<int>(blockIdx.x), static_cast<int>(threadIdx.x), parity,
         __isShared(at) ? static_cast<int>(static_cast<const uint8_t*>(at) - dynamic_smem()) : -1);
  __trap();
}
PTX_FN void wait_cluster(uint64_t* bar, uint32_t parity, const char* file = __builtin_FILE(),
                         int line = __builtin_LINE()) {
  for (int turn = 0;; ++turn) {
    uint32_t done;
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared(bar)), "r"(parity)
        : "memory");
    if (done) return;
    if (turn > FUSED_LORA_SPIN_LIMIT) stuck(file, line, bar, parity);
  }
}
PTX_FN void wait(uint64_t* bar, uint32_t parity, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  wait_cluster(bar, parity, file, line);
}
#endif
// *p in block `cta` of the cluster.
PTX_FN float4 load_remote(const float4* p, uint32_t cta) {
  float4 v;
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %4, %5;\nld.shared::cluster.v4.f32 {%0, %1, %2, %3}, "
      "[remote];\n}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(shared(p)), "r"(cta)
      : "memory");
  return v;
}
// *slot = value in block `cta` of the cluster, and 4 bytes to the barrier there.
PTX_FN void store_remote(int* slot, int value, uint64_t* bar, uint32_t cta) {
  asm volatile(
      "{\n.reg .b32 a, b;\nmapa.shared::cluster.u32 a, %0, %3;\nmapa.shared::cluster.u32 b, %2, %3;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.s32 [a], %1, [b];\n}" ::"r"(shared(slot)),
      "r"(value), "r"(shared(bar)), "r"(cta)
      : "memory");
}

// ---- sm_90: Data Movement, cp.async.bulk.tensor (TMA); Parallel Synchronization, fence.proxy
PTX_FN void prefetch(const CUtensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
// The box at (row, col) of a [rows, cols] matrix, to this block.
PTX_FN void tma_load(void* dst, const CUtensorMap* map, uint64_t* bar, int row, int col) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(shared(dst)),
      "l"(map), "r"(shared(bar)), "r"(col), "r"(row)
      : "memory");
}
// The same to the same offset of every block in `blocks`, each counting the bytes on its own barrier.
PTX_FN void tma_load_multicast(void* dst, const CUtensorMap* map, uint64_t* bar, int row, int col, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
      "{%3, %4}], [%2], %5;" ::"r"(shared(dst)),
      "l"(map), "r"(shared(bar)), "r"(col), "r"(row), "h"(blocks)
      : "memory");
}
PTX_FN void tma_store(const CUtensorMap* map, const void* src, int row, int col) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(shared(src)), "r"(col), "r"(row)
               : "memory");
}
PTX_FN void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until shared memory may be written again.
PTX_FN void tma_store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
PTX_FN void tma_store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
PTX_FN void fence_proxy() { asm volatile("fence.proxy.async;" ::: "memory"); }
PTX_FN void fence_proxy_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- sm_90: Data Movement, ld.acquire, st.release and red; Warp-level Matrix Instructions, stmatrix
PTX_FN int load_acquire(const int* p) {
  int v;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
// Returns when *p has come to `least`.
#ifndef FUSED_LORA_SPIN_LIMIT
PTX_FN void wait_flag(const int* p, int least) {
  while (load_acquire(p) < least) {}
}
#else
PTX_FN void wait_flag(const int* p, int least, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  for (int turn = 0; load_acquire(p) < least; ++turn)
    if (turn > FUSED_LORA_SPIN_LIMIT) stuck(file, line, p, 0);
}
#endif
PTX_FN void store_release(int* p, int v) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
// *p += v, in no order with others. atomicAdd() compiles to the instruction that also returns the old value.
PTX_FN void add(float* p, float v) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(p), "f"(v) : "memory");
}

// Four 8 x 8 matrices; lane 8 i + j gives the address of row j of matrix i.
PTX_FN void stmatrix(void* row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared(row)), "r"(r0), "r"(r1),
               "r"(r2), "r"(r3)
               : "memory");
}

// ---- sm_90a: Miscellaneous, setmaxnreg; Asynchronous Warpgroup Level Matrix Instructions, wgmma
template <int kRegisters> PTX_FN void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters> PTX_FN void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

PTX_FN void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
PTX_FN void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
PTX_FN void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

PTX_FN uint64_t descriptor(const void* p, uint32_t leading_bytes, uint32_t stride_bytes, int swizzle_bytes) {
  return matrix_descriptor(shared(p), leading_bytes, stride_bytes, swizzle_bytes);
}

// Lists of "%i" and of the accumulators, by tens and eights.
#define PTX_6(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5"
#define PTX_8(t) PTX_6(t) ",%" #t "6,%" #t "7"
#define PTX_10(t) PTX_8(t) ",%" #t "8,%" #t "9,"
#define PTX_D8(i)                                                                                             \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define PTX_D32(i) PTX_D8(i), PTX_D8(i + 8), PTX_D8(i + 16), PTX_D8(i + 24)
#define PTX_L8 PTX_8()
#define PTX_L16 PTX_10() PTX_6(1)
#define PTX_L32 PTX_10() PTX_10(1) PTX_10(2) "%30,%31"
#define PTX_L64 PTX_10() PTX_10(1) PTX_10(2) PTX_10(3) PTX_10(4) PTX_10(5) "%60,%61,%62,%63"
#define PTX_L128 \
  PTX_10()       \
  PTX_10(1)      \
  PTX_10(2) PTX_10(3) PTX_10(4) PTX_10(5) PTX_10(6) PTX_10(7) PTX_10(8) PTX_10(9) PTX_10(10) PTX_10(11) PTX_8(12)
// a, b, c, e, f: the numbers of the five operands that follow the accumulators.
#define PTX_WGMMA(shape, type, list, a, b, c, e, f, ...)                                                           \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #c ", 0;\nwgmma.mma_async.sync.aligned." shape "k16.f32." type \
               "." type " {" list "}, %" #a ", %" #b ", p, 1, 1, %" #e ", %" #f ";\n}"                             \
               : __VA_ARGS__                                                                                       \
               : "l"(left), "l"(right), "r"(accumulate), "n"(kLeftMN ? 1 : 0), "n"(kRightMN ? 1 : 0)               \
               : "memory")

// d[64, kN] (+)= left[64, 16] right[16, kN], both in shared memory, each K-major or MN-major.
template <class T, int kN, bool kRightMN, bool kLeftMN = false>
PTX_FN void wgmma(float (&d)[kN / 2], uint64_t left, uint64_t right, int accumulate) {
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
#define PTX_WGMMA_T(shape, ...)                               \
  if constexpr (kBf16) PTX_WGMMA(shape, "bf16", __VA_ARGS__); \
  else PTX_WGMMA(shape, "f16", __VA_ARGS__)
  if constexpr (kN == 16) {
    PTX_WGMMA_T("m64n16", PTX_L8, 8, 9, 10, 11, 12, PTX_D8(0));
  } else if constexpr (kN == 32) {
    PTX_WGMMA_T("m64n32", PTX_L16, 16, 17, 18, 19, 20, PTX_D8(0), PTX_D8(8));
  } else if constexpr (kN == 64) {
    PTX_WGMMA_T("m64n64", PTX_L32, 32, 33, 34, 35, 36, PTX_D32(0));
  } else if constexpr (kN == 128) {
    PTX_WGMMA_T("m64n128", PTX_L64, 64, 65, 66, 67, 68, PTX_D32(0), PTX_D32(32));
  } else {
    static_assert(kN == 256, "no such wgmma here");
    PTX_WGMMA_T("m64n256", PTX_L128, 128, 129, 130, 131, 132, PTX_D32(0), PTX_D32(32), PTX_D32(64), PTX_D32(96));
  }
}

}  // namespace fused_lora::ptx
