// lora_gemm's shared memory, its ring of barriers, and the order in which a cluster takes tiles; lora_gemm_sm90.cuh tells the rest.
#pragma once

#include "heuristics.h"
#include "ptx.cuh"

namespace fused_lora::gemm {

constexpr int kMaskThreads = 96, kBlockM = kGemmBlockM, kBlockK = kGemmBlockK, kCluster = kGemmCluster;

template <class T_, int kBlockN_, int kRank_, bool kRightMN_, bool kMasked_> struct Traits {
  using T = T_;
  static constexpr int kBlockN = kBlockN_, kRank = kRank_, kMaskWords = kBlockN / 32;  // of one row
  static constexpr bool kRightMN = kRightMN_, kMasked = kMasked_, kOneLaunch = kRank > 0, kGradients = kRightMN && gemm_gradients(kBlockN, kRank, kMasked);
  static constexpr int kStages = gemm_stages(kBlockN, kRank, kMasked, kGradients);
  static constexpr int kConsumers = kGradients ? 3 : 2, kThreads = 128 * (1 + kConsumers);  // warpgroups that read a staged tile
  // Registers of a thread in each role: an SM has 512 for four of them.
  static constexpr int kLoaderRegisters = kMasked ? 56 : 40, kGradientRegisters = !kGradients ? 0 : !kMasked ? 88 : kBlockN == 128 ? 104 : 56;
  static constexpr int kConsumerRegisters = (512 - kLoaderRegisters - kGradientRegisters) / 16 * 8;
  static constexpr int kLoadRows = kBlockN / kCluster;  // rows or columns of the right operand that each block loads for both
  static_assert(kBlockN == 128 || kBlockN == 256);
  static_assert(kRank == 0 || kRank == 16 || kRank == 32 || kRank == 64);
  static_assert(kStages >= 3 && (!kMasked || kRank || kStages >= kMaxRank / kBlockK), "all low-rank blocks of a masked tile must fit into the ring");
};

// Every tile starts on 1024 bytes, where the swizzle's pattern starts.
template <class C> struct __align__(1024) Smem {
  typename C::T left[C::kStages][kBlockM * kBlockK];
  typename C::T right[C::kStages][C::kBlockN * kBlockK];
  typename C::T out[2][64 * 64];  // one for each warpgroup
  typename C::T rank[C::kOneLaunch ? C::kStages : 1][C::kOneLaunch ? C::kRank * kBlockK : 8];
  typename C::T thin[C::kGradients ? kBlockM * C::kRank : 8];  // of h, then of dh
  uint32_t mask[C::kMasked ? kBlockM * C::kMaskWords : 1];
  uint64_t full[C::kStages], empty[C::kStages];
  uint64_t tile_full[2], tile_empty[2], mask_full, mask_empty, thin_full, thin_empty;
  int tile[2];
};

template <class T> struct Args {
  T* low;               // [M, R], row stride ld_low
  const T* bias;        // [N], or null
  float* dB;            // [K, R], or null
  float* dA;            // [R, N], or null
  int* control;         // tile counter, then flags
  const int64_t* seed;  // [1]
  int64_t ld_low;
  int M, N, K, R;
  uint32_t threshold;
  float alpha, scale, drop_scale;
};

// A position in a ring of barriers, and the parity of its current phase.
template <int kSlots> struct Ring {
  int slot = 0;
  uint32_t phase = 0;
  PTX_FN void next() {
    if (++slot == kSlots) {
      slot = 0;
      phase ^= 1;
    }
  }
};

// The tiles of this cluster, one object in each role (loader, mask, consumers). Without flags to wait for every cluster takes each n-th
// tile; with them the first block's loader draws numbers from the counter and hands them to both blocks.
template <class C> struct Tiles {
  Smem<C>& s;
  const int row_tiles, col_tiles;
  Ring<2> ring;
  int number;

  PTX_FN Tiles(Smem<C>& smem, int M, int N)
      : s(smem), row_tiles((M + kBlockM * kCluster - 1) / (kBlockM * kCluster)), col_tiles((N + C::kBlockN - 1) / C::kBlockN), number(blockIdx.x / kCluster) {
    if constexpr (C::kOneLaunch) number = 0;
  }
  PTX_FN int count() const { return row_tiles * col_tiles; }
  PTX_FN TileIndex index() const { return gemm_tile(number, row_tiles, col_tiles, C::kOneLaunch); }
  PTX_FN void step() { number += gridDim.x / kCluster; }

  // Readers: read() the number of the next tile; release() when the role is through with it, in all its threads, one of which speaks.
  PTX_FN void read() {
    ptx::wait(&s.tile_full[ring.slot], ring.phase);
    number = *const_cast<volatile int*>(&s.tile[ring.slot]);
  }
  PTX_FN void release(bool speaks) {
    if (speaks) ptx::arrive_remote(&s.tile_empty[ring.slot], 0);
    ring.next();
  }
  // The loader's turn: block 0 hands out `drawn`, and each block expects it.
  PTX_FN void hand_out(uint32_t rank, int drawn) {
    if (rank == 0) {
      ptx::wait(&s.tile_empty[ring.slot], ring.phase ^ 1);
      for (int block = 0; block < kCluster; ++block) ptx::store_remote(&s.tile[ring.slot], drawn, &s.tile_full[ring.slot], block);
    }
    ptx::arrive_expect(&s.tile_full[ring.slot], 4);
    read();
    release(true);
  }
  // Consumers of the number in a block: the loader, the warpgroups, three mask warps.
  static constexpr int kReaders = kCluster * (1 + C::kConsumers + (C::kMasked ? 3 : 0));
};

// A consumer warpgroup is through with a slot: both blocks' loaders write to it. All its warps must have seen the slot full, by a product or a
// barrier: one that looks when the slot is full again sees the other parity, and waits for ever.
template <class C> PTX_FN void free_slot(Smem<C>& s, int slot, int thread) {
  if (thread < kCluster) ptx::arrive_remote(&s.empty[slot], thread);
}

}  // namespace fused_lora::gemm
