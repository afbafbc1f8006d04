// What the roles of lora_gemm share: an instance's traits, its arguments and shared memory, and the order in which a
// cluster takes tiles. schedule.cuh has the order of a tile's blocks, kernel.cuh tells the rest.
#pragma once

#include "cuda/heuristics.h"
#include "cuda/ptx.cuh"

namespace fused_lora::gemm {

constexpr int kMaskThreads = 96, kBlockM = kGemmBlockM, kBlockK = kGemmBlockK, kCluster = kGemmCluster;
constexpr int kFourth = 2;  // the fourth warpgroup's number among those that read staged tiles; 0 and 1 multiply

template <class T_, int kBlockN_, int kRank_, bool kBackward, bool kDropout, bool kGradients_ = false,
          bool kLowByWarps_ = false>
struct Traits {
  using T = T_;
  static constexpr GemmKind kKind{.block_n = kBlockN_,
                                  .rank_tile = kRank_,
                                  .backward = kBackward,
                                  .dropout = kDropout,
                                  .gradients = kGradients_,
                                  .low_by_warps = kLowByWarps_};
  static constexpr int kBlockN = kBlockN_, kRank = kRank_, kStages = kKind.stages();
  static constexpr int kChunks = kBlockN / 64;     // of 64 columns, in which a tile is stored and x comes
  static constexpr int kMaskWords = kBlockN / 32;  // of one row
  static constexpr bool kRightMN = kBackward, kMasked = kBackward && kDropout, kOneLaunch = kRank > 0;
  static constexpr bool kGradients = kGradients_, kDropsLeft = kKind.drops_left();
  static constexpr bool kMakesLow = kOneLaunch && !kDropsLeft;  // in the warpgroups that multiply
  static constexpr bool kLowByWarps = kLowByWarps_;             // the loader's idle warps read staged tiles, too
  static constexpr int kThreads = 128 * kKind.warpgroups();
  static constexpr int kConsumers = kKind.warpgroups() - 1;  // warpgroups that read a staged tile
  // Registers of a thread in each role: an SM has 512 for four of them.
  static constexpr int kLoaderRegisters = kLowByWarps ? (kRank == 16 ? 120 : 136) : kMasked ? 56 : 40;
  static constexpr int kFourthRegisters = kConsumers < 3   ? 0
                                          : kDropsLeft     ? 104
                                          : !kMasked       ? 88
                                          : kBlockN == 128 ? 104
                                                           : 56;
  static constexpr int kConsumerRegisters = (512 - kLoaderRegisters - kFourthRegisters) / 16 * 8;
  static constexpr int kLoadRows = kBlockN / kCluster;  // of the right operand, rows or columns that each block loads
  static_assert(kBlockN == 128 || kBlockN == 256);
  static_assert(kRank == 0 || kRank == 16 || kRank == 32 || kRank == 64);
  static_assert(!kDropsLeft || kOneLaunch);
  static_assert((!kGradients || kKind.fits_gradients()) && (!kLowByWarps || kKind.fits_low_by_warps()));
  static_assert(!kMasked || !kGradients || kStages >= kChunks, "x passes while the low-rank block stays in the ring");
  static_assert(kStages >= 3 && (!kMasked || kRank || kStages >= kMaxRank / kBlockK),
                "all low-rank blocks of a masked tile must fit into the ring");
};

// Every tile starts on 1024 bytes, where the swizzle's pattern starts.
template <class C> struct __align__(1024) Smem {
  typename C::T left[C::kStages][kBlockM * kBlockK];
  typename C::T right[C::kStages][C::kBlockN * kBlockK];
  typename C::T out[2][64 * 64];  // one for each warpgroup
  typename C::T down[C::kOneLaunch ? C::kStages : 1][C::kOneLaunch ? C::kRank * kBlockK : 8];
  // The masked left tile; or 128 rows of h, then of dh.
  typename C::T side[C::kKind.masked_left() ? kBlockM * kBlockK : C::kGradients ? kBlockM * C::kRank : 8];
  uint32_t mask[C::kMasked ? kBlockM * C::kMaskWords : 1];
  uint64_t full[C::kStages], empty[C::kStages];
  uint64_t tile_full[2], tile_empty[2], mask_full, mask_empty, side_full, side_empty;
  int tile[2];
};

template <class T> struct Args {
  T* low;                // [M, R], row stride ld_low
  const T* bias;         // [N], or null
  float* dB;             // [K, R], or null
  float* dA;             // [R, N], or null
  int* control;          // tile counter, then flags
  float4* low_sums;      // [M rounded up / 16, kRank / 8, 32], of the first of two columns that make low
  const uint32_t* mask;  // [M, mask_words(N)], of the backward
  const int64_t* seed;   // [1], of the forward's mask
  int64_t ld_low;
  int M, N, K, R, low_columns;
  uint32_t threshold;
  float alpha, scale, drop_scale;
  // Of a tile in column 0, 1 and any other. Worked out by the host: where the kernel does it, ptxas finds the
  // accumulators of 256 columns and more than 16 ranks too many, and serialises every wgmma (its note C7512).
  KWalk walks[kMaxLowColumns + 1];
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

// This block's part of a tile: 128 rows and kBlockN columns of out.
struct Place {
  int row, col;  // the first of each
  int col_tile;  // the tile's column among tiles
};

// The tiles of this cluster, one object in each role. Without flags to wait for every cluster takes each n-th tile;
// with them the first block's loader draws numbers from the counter and hands them to both blocks.
template <class C> struct Tiles {
  Smem<C>& s;
  const int row_tiles, col_tiles, low_columns;
  const uint32_t cta;
  Ring<2> ring;
  int number;

  PTX_FN Tiles(Smem<C>& smem, const Args<typename C::T>& args, uint32_t cta)
      : s(smem),
        row_tiles((args.M + kBlockM * kCluster - 1) / (kBlockM * kCluster)),
        col_tiles((args.N + C::kBlockN - 1) / C::kBlockN),
        low_columns(C::kOneLaunch ? args.low_columns : 0),
        cta(cta),
        number(blockIdx.x / kCluster) {
    if constexpr (C::kOneLaunch) number = 0;
  }
  PTX_FN bool more() const { return number < row_tiles * col_tiles; }
  PTX_FN Place place() const {
    const TileIndex tile = gemm_tile(number, row_tiles, col_tiles, low_columns);
    return {.row = static_cast<int>((tile.row * kCluster + cta) * kBlockM),
            .col = tile.col * C::kBlockN,
            .col_tile = tile.col};
  }

  // For all roles but the loader. All threads of a role call both; the one that `speaks` says when they are through.
  PTX_FN void first() {
    if constexpr (C::kOneLaunch) read();
  }
  PTX_FN void next(bool speaks) {
    if constexpr (C::kOneLaunch) {
      release(speaks);
      read();
    } else {
      step();
    }
  }
  // The loader's turn: block 0 hands out `drawn`, and each block expects it.
  PTX_FN void hand_out(int drawn) {
    if (cta == 0) {
      ptx::wait(&s.tile_empty[ring.slot], ring.phase ^ 1);
      for (int block = 0; block < kCluster; ++block)
        ptx::store_remote(&s.tile[ring.slot], drawn, &s.tile_full[ring.slot], block);
    }
    ptx::arrive_expect(&s.tile_full[ring.slot], 4);
    read();
    release(true);
  }
  PTX_FN void step() { number += gridDim.x / kCluster; }
  // Readers of a number in the cluster: the loaders, the warpgroups, and the three other warps where they work.
  static constexpr int kReaders = kCluster * (1 + C::kConsumers + (C::kMasked || C::kLowByWarps ? 3 : 0));

 private:
  PTX_FN void read() {
    ptx::wait_cluster(&s.tile_full[ring.slot], ring.phase);
    number = *const_cast<volatile int*>(&s.tile[ring.slot]);
  }
  PTX_FN void release(bool speaks) {
    if (speaks) ptx::arrive_remote(&s.tile_empty[ring.slot], 0);
    ring.next();
  }
};

// The named barrier of a warpgroup that reads staged tiles: number `group` among these.
PTX_FN void sync_group(int group) { ptx::named_barrier(1 + group, 128); }

// low = scale * low_acc in dtype for a warp's 16 rows, of which this lane has r0 and r0 + 8.
template <class C, int kLow>
PTX_FN void store_low(const float (&low_acc)[kLow], const Args<typename C::T>& args, int r0) {
  const int c0 = threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < C::kRank / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = r0 + 8 * i, c = c0 + 8 * j;
      if (r < args.M && c < args.ld_low)
        *reinterpret_cast<uint32_t*>(args.low + r * args.ld_low + c) =
            ptx::pack<typename C::T>(low_acc[4 * j + 2 * i] * args.scale, low_acc[4 * j + 2 * i + 1] * args.scale);
    }
  }
}

// The flag of 64 rows: how many columns' parts of low are in.
template <class T> PTX_FN int* flag_of(const Args<T>& args, int row) { return args.control + kControlFlags + row / 64; }

// A warp by itself waits until `columns` parts of low are in for 64 or 128 rows.
template <class T> PTX_FN void wait_for_parts(const Args<T>& args, int columns, int row, int rows) {
  for (int r = row; r < min(row + rows, args.M); r += 64) ptx::wait_flag(flag_of(args, r), columns);
  __syncwarp();
}

// What a warp does with its sums of 16 rows over the part of K that tiles in `column` take, when the part before it is
// in: the last column adds that and stores low, one before it leaves its own in fp32.
template <class C, int kLow>
PTX_FN void hand_on(float (&low_acc)[kLow], const Args<typename C::T>& args, int column, int row) {
  float4* const sums = args.low_sums + static_cast<int64_t>(row / 16) * (C::kRank / 8 * 32) + threadIdx.x % 32;
  if (column > 0) {
#pragma unroll
    for (int j = 0; j < C::kRank / 8; ++j) {
      const float4 before = sums[j * 32];
      low_acc[4 * j] += before.x;
      low_acc[4 * j + 1] += before.y;
      low_acc[4 * j + 2] += before.z;
      low_acc[4 * j + 3] += before.w;
    }
  }
  if (column == args.low_columns - 1) return store_low<C>(low_acc, args, row + threadIdx.x % 32 / 4);
#pragma unroll
  for (int j = 0; j < C::kRank / 8; ++j)
    sums[j * 32] = float4{low_acc[4 * j], low_acc[4 * j + 1], low_acc[4 * j + 2], low_acc[4 * j + 3]};
}

// The same for a warpgroup's 64 rows, and their flag.
template <class C, int kLow>
PTX_FN void publish(float (&low_acc)[kLow], const Args<typename C::T>& args, int column, int row, int group,
                    int thread) {
  if (column > 0) wait_for_parts(args, column, row, 64);
  hand_on<C>(low_acc, args, column, row + thread / 32 * 16);
  __threadfence();
  ptx::fence_proxy();
  sync_group(group);
  if (thread == 0) ptx::store_release(flag_of(args, row), column + 1);
}

}  // namespace fused_lora::gemm
