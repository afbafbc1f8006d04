// ptx.cuh on the emulated device: the same functions, by the definitions of the PTX ISA manual.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cuda/descriptor.h"
#include "device.h"

#define FUSED_LORA_SM90A 1
#define PTX_FN inline
#define UNSEEN __attribute__((no_sanitize("kernel-address")))  // its stores are not reported to shadow.cpp

inline void __syncthreads() { emulator::meet_block(0, static_cast<int>(emulator::self().block->threads.size())); }
inline void __syncwarp() {
  emulator::Thread& t = emulator::self();
  emulator::meet(t.block->warps[t.index / 32].meet, 32, [&t] {
    for (int lane = 0; lane < 32; ++lane) t.block->threads[static_cast<size_t>(t.index / 32 * 32 + lane)]->spins = 0;
  });
}
inline void __threadfence() {}
template <class T> T min(T a, T b) { return a < b ? a : b; }
inline void touch_memory() {
  if (!emulator::self().may_touch_memory) emulator::fail("memory is touched before wait_for_previous_kernel()");
}
inline int atomicAdd(int* p, int v) {
  touch_memory();
  emulator::yield();
  const int old = *p;
  *p += v;
  return old;
}

namespace fused_lora::ptx {

using emulator::fail;
using emulator::self;

template <class To, class From> To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
template <class T> float to_float(const void* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return bits<float>(static_cast<uint32_t>(bits<uint16_t>(v)) << 16);
  else return static_cast<float>(bits<_Float16>(v));
}
template <class T> uint32_t pack(float lo, float hi) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return bits<uint32_t>(__floats2bfloat162_rn(lo, hi));
  else return bits<uint32_t>(__floats2half2_rn(lo, hi));
}
template <class T> float2 unpack(uint32_t v) {
  const uint16_t lo = static_cast<uint16_t>(v), hi = static_cast<uint16_t>(v >> 16);
  return {to_float<T>(&lo), to_float<T>(&hi)};
}
inline void fma_if(float& d, float a, float b, uint32_t condition) {
  if (condition) d = std::fma(a, b, d);
}
template <class T> constexpr uint32_t kOnes = std::is_same_v<T, __nv_bfloat16> ? 0x3f803f80u : 0x3c003c00u;

// Shared memory starts at address 0 of a block; a pointer outside it is an error.
inline uint32_t shared(const void* p) {
  const ptrdiff_t offset = static_cast<const uint8_t*>(p) - self().block->smem;
  if (offset < 0 || offset >= self().block->smem_bytes)
    fail("address %ld is not in shared memory", static_cast<long>(offset));
  return static_cast<uint32_t>(offset);
}
inline void wait_for_previous_kernel() { self().may_touch_memory = true; }
inline void start_next_kernel() {}
inline uint8_t* dynamic_smem() { return self().block->smem + 1024; }
inline void aligned(uint32_t address, uint32_t to, const char* what) {
  if (address % to) fail("%s at %u is not aligned to %u", what, address, to);
}

inline emulator::Warp& warp() { return self().block->warps[self().index / 32]; }
inline int lane() { return self().index % 32; }
// The last lane of the warp to come does `work`.
template <class Work> void meet_warp(const char* what, const Work& work) {
  emulator::meet(warp().meet, 32, [&] {
    emulator::together(*self().block, self().index / 32, what);
    work();
  });
}
inline uint32_t shuffle(uint32_t value, int from) {
  emulator::Warp& w = warp();
  uint32_t got;
  w.a[lane()][0] = value;
  w.a[lane()][1] = static_cast<uint32_t>(from % 32);
  w.out[lane()] = &got;
  meet_warp("shuffle", [&w] {
    for (int l = 0; l < 32; ++l) *w.out[l] = w.a[w.a[l][1]][0];
  });
  return got;
}

// ---- sm_80
inline void cp_async(void* dst, const void* src, bool valid) {
  touch_memory();
  aligned(shared(dst), 16, "cp.async to");
  aligned(static_cast<uint32_t>(reinterpret_cast<uintptr_t>(src)), 16, "cp.async from");
  self().copies.push_back({dst, src, valid});
}
inline void cp_async_commit() {
  self().copy_groups.push_back(std::move(self().copies));
  self().copies.clear();
}
template <int kPending> void cp_async_wait() {  // copies land as late as they may
  auto& groups = self().copy_groups;
  while (groups.size() > kPending) {
    for (const auto& copy : groups.front())
      copy.valid ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
    groups.erase(groups.begin());
  }
}

template <bool kTransposed> void ldmatrix(uint32_t (&r)[4], const void* row) {
  aligned(shared(row), 16, "ldmatrix");
  emulator::Warp& w = warp();
  w.address[lane()] = row;
  w.out[lane()] = r;
  meet_warp("ldmatrix", [&w] {
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) {
        uint16_t v[2];
        for (int e = 0; e < 2; ++e) {
          const int across = l / 4, along = l % 4 * 2 + e;
          v[e] = static_cast<const uint16_t*>(
              w.address[i * 8 + (kTransposed ? along : across)])[kTransposed ? across : along];
        }
        w.out[l][i] = v[0] | static_cast<uint32_t>(v[1]) << 16;
      }
  });
}

template <class T> void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::Warp& w = warp();
  const int me = lane();
  w.d[me] = d;
  std::memcpy(w.a[me], a, sizeof a);
  w.b[me][0] = b0;
  w.b[me][1] = b1;
  meet_warp("mma", [&w] {
    float A[16][16], B[16][8];
    for (int l = 0; l < 32; ++l)
      for (int e = 0; e < 2; ++e) {
        const int g = l / 4, q = l % 4 * 2 + e;
        for (int i = 0; i < 4; ++i)
          A[g + i % 2 * 8][q + i / 2 * 8] = e ? unpack<T>(w.a[l][i]).y : unpack<T>(w.a[l][i]).x;
        for (int i = 0; i < 2; ++i) B[q + i * 8][g] = e ? unpack<T>(w.b[l][i]).y : unpack<T>(w.b[l][i]).x;
      }
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i)
        for (int k = 0; k < 16; ++k) w.d[l][i] += A[l / 4 + i / 2 * 8][k] * B[k][l % 4 * 2 + i % 2];
  });
}

// ---- clusters, barriers
inline uint32_t cta_in_cluster() { return static_cast<uint32_t>(self().block->cta); }
inline void cluster_sync() {
  emulator::Cluster& c = *self().block->cluster;
  const size_t threads = c.blocks[0]->threads.size();
  emulator::meet(c.meet, static_cast<int>(c.blocks.size() * threads), [&] {
    for (const emulator::Block* block : c.blocks)
      for (int w = 0; w < static_cast<int>(threads / 32); ++w) emulator::together(*block, w, "barrier.cluster");
  });
}
inline void named_barrier(int id, int threads) {
  if (id < 1 || id > 15) fail("named barrier %d", id);
  emulator::meet_block(id, threads);
}

struct Mbarrier {
  uint64_t phase : 1, count : 11;
  int64_t missing : 12, bytes : 40;
  UNSEEN void change(int arrivals, int64_t more_bytes) {
    bytes = bytes + more_bytes;
    missing = missing - arrivals;
    if (missing < 0) fail("an mbarrier has more arrivals than it counts");
    if (missing || bytes) return;
    phase = phase ^ 1u;
    missing = static_cast<int64_t>(count);
  }
};
static_assert(sizeof(Mbarrier) == 8);
inline Mbarrier& mbarrier(void* p) { return *static_cast<Mbarrier*>(p); }
inline void* in_block(const void* p, uint32_t cta) {
  const auto& blocks = self().block->cluster->blocks;
  if (cta >= blocks.size()) fail("no block %u in the cluster", cta);
  return blocks[cta]->smem + shared(p);
}

UNSEEN inline void barrier_init(uint64_t* bar, int arrivals) {
  Mbarrier fresh{};
  fresh.count = static_cast<uint64_t>(arrivals);
  fresh.missing = arrivals;
  mbarrier(bar) = fresh;
}
inline void barrier_init_fence() {}
inline void arrive_remote(uint64_t* bar, uint32_t cta) { mbarrier(in_block(bar, cta)).change(1, 0); }
inline void arrive(uint64_t* bar) { arrive_remote(bar, cta_in_cluster()); }
inline void arrive_expect(uint64_t* bar, uint32_t bytes) { mbarrier(in_block(bar, cta_in_cluster())).change(1, bytes); }
inline void wait(uint64_t* bar, uint32_t parity) {
  ++self().spins;
  const Mbarrier* b = &mbarrier(in_block(bar, cta_in_cluster()));
  if (b->phase == parity) emulator::wait_until([b, parity] { return b->phase != parity; });
}
inline void wait_cluster(uint64_t* bar, uint32_t parity) { wait(bar, parity); }
inline float4 load_remote(const float4* p, uint32_t cta) {
  aligned(shared(p), 16, "ld.shared::cluster.v4 from");
  float4 v;
  std::memcpy(&v, in_block(p, cta), sizeof v);
  return v;
}
inline void store_remote(int* slot, int value, uint64_t* bar, uint32_t cta) {
  int* const to = static_cast<int*>(in_block(slot, cta));
  void* const there = in_block(bar, cta);
  emulator::later([=] {
    *to = value;
    mbarrier(there).change(0, -4);
  });
}

// ---- TMA
struct Map {
  uint16_t* data;
  int64_t rows, cols, ld, box_rows, box_cols;
  int64_t bytes() const { return box_rows * box_cols * 2; }
  uint16_t* at(int64_t row, int64_t col) const {
    return row >= 0 && row < rows && col >= 0 && col < cols ? data + row * ld + col : nullptr;
  }
};
inline Map map_of(const CUtensorMap* map) {
  Map m;
  std::memcpy(&m, map, sizeof m);
  return m;
}
// An address within a pattern of `span` bytes a row: bits 4-6 (4-5, 4) are exchanged with bits 7-9 (7-8, 7).
inline uint32_t swizzled(uint32_t address, uint32_t span) { return address ^ ((address >> 7 & (span / 16 - 1)) << 4); }

UNSEEN inline void load_box(uint8_t* smem, uint32_t to, const Map& m, int row, int col) {
  for (int64_t r = 0; r < m.box_rows; ++r)
    for (int64_t c = 0; c < m.box_cols; ++c) {
      const uint16_t* from = m.at(row + r, col + c);
      *reinterpret_cast<uint16_t*>(smem + swizzled(to + static_cast<uint32_t>((r * m.box_cols + c) * 2),
                                                   static_cast<uint32_t>(m.box_cols * 2))) = from ? *from : 0;
    }
}
inline void prefetch(const CUtensorMap*) {}
inline void tma_load_multicast(void* dst, const CUtensorMap* map, uint64_t* bar, int row, int col, uint16_t blocks) {
  touch_memory();
  const Map m = map_of(map);
  const uint32_t to = shared(dst);
  aligned(to, static_cast<uint32_t>(m.box_cols * 2 * 8), "TMA load to");
  shared(static_cast<uint8_t*>(dst) + m.bytes() - 1);
  if (self().saw_flag) fail("a TMA load comes after a flag without fence.proxy.async");
  const int64_t inside = std::min(m.box_cols, m.cols - col);
  for (int64_t r = row; r < std::min(row + m.box_rows, m.rows); ++r)
    emulator::asynchronous_global(m.data + r * m.ld + col, inside * 2, "a TMA load");
  for (uint32_t cta = 0; cta < self().block->cluster->blocks.size(); ++cta)
    if (blocks >> cta & 1) {
      emulator::asynchronous_shared(*self().block->cluster->blocks[cta], to, m.bytes(), "a TMA load");
      uint8_t* const smem = self().block->cluster->blocks[cta]->smem;
      void* const there = in_block(bar, cta);
      emulator::later([=] {
        load_box(smem, to, m, row, col);
        mbarrier(there).change(0, -m.bytes());
      });
    }
}
inline void tma_load(void* dst, const CUtensorMap* map, uint64_t* bar, int row, int col) {
  tma_load_multicast(dst, map, bar, row, col, static_cast<uint16_t>(1u << cta_in_cluster()));
}
inline void tma_store(const CUtensorMap* map, const void* src, int row, int col) {
  touch_memory();
  const Map m = map_of(map);
  const uint32_t from = shared(src);
  emulator::asynchronous_shared(*self().block, from, m.bytes(), "a TMA store");
  emulator::Thread* const t = &self();
  const size_t group = t->store_groups.size();
  ++t->stores;
  emulator::later([=] {
    for (int64_t r = 0; r < m.box_rows; ++r)
      for (int64_t c = 0; c < m.box_cols; ++c)
        if (uint16_t* to = m.at(row + r, col + c))
          *to = *reinterpret_cast<const uint16_t*>(
              t->block->smem +
              swizzled(from + static_cast<uint32_t>((r * m.box_cols + c) * 2), static_cast<uint32_t>(m.box_cols * 2)));
    --(group < t->store_groups.size() ? t->store_groups[group] : t->stores);
  });
}
inline void tma_store_commit() {
  self().store_groups.push_back(self().stores);
  self().stores = 0;
}
inline void tma_store_wait_read() {
  emulator::wait_until([t = &self()] {
    for (const int open : t->store_groups)
      if (open) return false;
    return true;
  });
}
inline void tma_store_wait() { tma_store_wait_read(); }
inline void fence_proxy_shared() { emulator::fence_shared(self()); }
inline void fence_proxy() {
  fence_proxy_shared();
  emulator::fence_global(self());
}

inline void wait_flag(const int* p, int least) {
  touch_memory();
  ++self().spins;
  self().saw_flag = true;
  emulator::wait_until([p, least] { return *p >= least; });
}
inline void add(float* p, float v) {
  touch_memory();
  *p += v;
}
inline void store_release(int* p, int v) { *p = v; }

inline void stmatrix(void* row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  aligned(shared(row), 16, "stmatrix");
  emulator::Warp& w = warp();
  const uint32_t r[4] = {r0, r1, r2, r3};
  w.address[lane()] = row;
  std::memcpy(w.a[lane()], r, sizeof r);
  meet_warp("stmatrix", [&w, lanes = &self().block->threads[static_cast<size_t>(self().index / 32 * 32)]] {
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) {
        uint16_t* const to = static_cast<uint16_t*>(const_cast<void*>(w.address[i * 8 + l / 4])) + l % 4 * 2;
        std::memcpy(to, &w.a[l][i], 4);
        emulator::stored(*lanes[l], to, 4);
      }
  });
}

// ---- wgmma
template <int> void registers_down() {}
template <int> void registers_up() {}
inline void wgmma_fence() {}
inline void wgmma_commit() {}

inline uint64_t descriptor(const void* p, uint32_t leading_bytes, uint32_t stride_bytes, int swizzle_bytes) {
  return matrix_descriptor(shared(p), leading_bytes, stride_bytes, swizzle_bytes);
}

// Where element (mn, k) of a 16-deep operand lies. K-major: rows of `span` bytes, 8 of them a stride apart from the
// next 8. MN-major: rows of `span` bytes along mn for each k, 8 k's a stride, `span / 2` columns a leading offset
// apart.
inline uint32_t operand(uint64_t d, int mn, int k, bool mn_major) {
  const uint32_t start = static_cast<uint32_t>(d & 0x3fff) << 4, leading = static_cast<uint32_t>(d >> 16 & 0x3fff) << 4,
                 stride = static_cast<uint32_t>(d >> 32 & 0x3fff) << 4;
  const int span = 256 >> (d >> 62);
  const uint32_t offset = mn_major ? mn / (span / 2) * leading + k / 8 * stride + k % 8 * span + mn % (span / 2) * 2
                                   : mn / 8 * stride + mn % 8 * span + k * 2;
  return swizzled(start + offset, static_cast<uint32_t>(span));
}

// rows[k][mn] of an operand. Eight elements along a row of its tile lie together.
template <class T, bool kMN, size_t kColumns>
UNSEEN void read_operand(const emulator::Block& block, uint64_t descriptor, int count, float (&rows)[16][kColumns]) {
  for (int k = 0; k < 16; ++k)
    for (int mn = 0; mn < count; ++mn) {
      const uint32_t at = operand(descriptor, mn, k, kMN);
      if ((kMN ? mn : k) % 8 == 0) emulator::asynchronous_shared(block, at, 16, "a wgmma reads");
      rows[k][mn] = to_float<T>(block.smem + at);
    }
}

template <class T, int kN, bool kRightMN, bool kLeftMN>
UNSEEN void multiply(const emulator::Block& block, uint64_t left, uint64_t right, bool accumulate, float* const* d) {
  static float A[16][64], B[16][256], D[64][256];
  read_operand<T, kLeftMN>(block, left, 64, A);
  read_operand<T, kRightMN>(block, right, kN, B);
  for (int r = 0; r < 64; ++r) {
    for (int n = 0; n < kN; ++n) D[r][n] = 0;
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < kN; ++n) D[r][n] += A[k][r] * B[k][n];
  }
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < kN / 2; ++i) {
      const float product = D[t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8][i / 4 * 8 + t % 4 * 2 + i % 2];
      d[t][i] = accumulate ? d[t][i] + product : product;
    }
}

template <class T, int kN, bool kRightMN, bool kLeftMN = false>
void wgmma(float (&d)[kN / 2], uint64_t left, uint64_t right, int accumulate) {
  emulator::Thread::Product p{nullptr, d, left, right, accumulate * 1024 + kN};
  if (self().index % 128 == 0)
    p.run = [=, block = self().block](float* const* all) {
      multiply<T, kN, kRightMN, kLeftMN>(*block, left, right, accumulate, all);
    };
  self().products.push_back(std::move(p));
}

// The warpgroup's products happen here, as late as they may; all its threads must have asked for the same ones.
inline void wgmma_wait() {
  emulator::Block* const block = self().block;
  const int group = self().index / 128;
  emulator::meet(block->warpgroups[group], 128, [=] {
    emulator::Thread* const* threads = &block->threads[static_cast<size_t>(group) * 128];
    for (size_t i = 0; i < threads[0]->products.size(); ++i) {
      const auto& first = threads[0]->products[i];
      float* d[128];
      for (int t = 0; t < 128; ++t) {
        const auto& all = threads[t]->products;
        if (all.size() != threads[0]->products.size() || all[i].left != first.left || all[i].right != first.right ||
            all[i].shape != first.shape)
          fail("a wgmma differs within its warpgroup");
        d[t] = all[i].d;
      }
      first.run(d);
    }
    for (int t = 0; t < 128; ++t) threads[t]->products.clear();
    for (int w = 0; w < 4; ++w) emulator::together(*block, group * 4 + w, "wgmma");
  });
}

}  // namespace fused_lora::ptx
