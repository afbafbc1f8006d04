// Which kernel, tile and grid a request gets: pure host functions of sizes, dtypes and the number of SMs.
//
// Compiled in every build, exported by bindings_heuristics.cpp and tested without a GPU. The kernels take their
// constants from here, so a plan and the kernel it names cannot disagree about shared memory or the order of tiles.
#pragma once

#include <algorithm>
#include <cstdint>

#include "lora.h"

namespace fused_lora {

constexpr int64_t kMaxRank = 256;
constexpr int kSmemLimit = 232448;  // dynamic shared memory of one block, compute capability 9.0

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t to) { return ceil_div(a, to) * to; }
// The row length of h, dh and the kernels' B: TMA wants rows of 16 bytes.
constexpr int64_t padded_rank(int64_t R) { return round_up(R, 8); }
constexpr int rank_tile_for(int64_t R) { return R <= 16 ? 16 : R <= 32 ? 32 : 64; }

// ---- lora_gemm: out[M, N] = left[M, K] right + low[M, R] thin
constexpr int kGemmBlockM = 128, kGemmBlockK = 64, kGemmCluster = 2;
constexpr int64_t kInsideRank = 64;  // ranks of low that it can make itself

// An instance of the kernel, and the shared memory that it takes.
struct GemmKind {
  int block_n;    // columns of a tile, 128 or 256; a cluster's two tiles of 128 rows lie above each other
  int rank_tile;  // columns of low that column 0 computes in the same launch: 16, 32 or 64; 0: low is given
  bool backward;  // dx: the right operands lie with their reduction dimension in rows
  bool dropout;   // backward: the low-rank term and x go through the mask; forward: low is that of the masked left
  bool gradients = false;     // a fourth warpgroup makes dA and dB, too: products are of 128 columns at most
  bool low_by_warps = false;  // forward with dropout: the loader's idle warps make low, not a warpgroup of its own

  constexpr bool operator==(const GemmKind&) const = default;
  // Whether it could make gradients. With a mask, 256 columns and more than 16 ranks the accumulators don't fit, and a
  // masked tile keeps its low-rank block until all of its x but the last 64 columns has passed: with 256 columns that
  // takes four stages.
  constexpr bool fits_gradients() const {
    return backward && rank_tile > 0 && (!dropout || block_n == 128 || rank_tile == 16);
  }
  // Whether the loader's warps could make low: 64 ranks are too many for their registers.
  constexpr bool fits_low_by_warps() const { return drops_left() && block_n == 256 && rank_tile <= 32; }
  // Whether low is made of the masked left, beside the warpgroups that multiply.
  constexpr bool drops_left() const { return !backward && dropout; }
  // Whether a tile of the masked left lies in shared memory, for a warpgroup of its own.
  constexpr bool masked_left() const { return drops_left() && !low_by_warps; }
  constexpr int warpgroups() const { return gradients || masked_left() ? 4 : 3; }
  constexpr int stage_bytes() const { return (kGemmBlockM + block_n + rank_tile) * kGemmBlockK * 2; }
  // Two 64 x 64 tiles on their way out, 128 rows of h or dh for the gradients, a masked left tile, the mask bits of a
  // tile, barriers, and the way to the first multiple of 1024.
  constexpr int other_bytes() const {
    return 2 * 64 * 64 * 2 + (gradients ? kGemmBlockM * rank_tile * 2 : 0) +
           (masked_left() ? kGemmBlockM * kGemmBlockK * 2 : 0) + (backward && dropout ? kGemmBlockM * block_n / 8 : 0) +
           1024 + 1024;
  }
  constexpr int stages() const { return (kSmemLimit - other_bytes()) / stage_bytes(); }
  constexpr int smem_bytes() const { return stages() * stage_bytes() + other_bytes(); }
};

struct TileIndex {
  int row, col;  // in tiles of a cluster: 256 rows, block_n columns
};

// Tile number t of a launch. Groups of 8 tile rows share their columns of the right operand in L2. The tiles of the
// first `low_columns` columns, which make low, lead, row by row: the others depend on lower numbers only.
constexpr TileIndex gemm_tile(int t, int row_tiles, int col_tiles, int low_columns) {
  if (t < row_tiles * low_columns) return {t / low_columns, t % low_columns};
  t -= row_tiles * low_columns;
  constexpr int kGroup = 8;
  const int per_group = kGroup * (col_tiles - low_columns), group = t / per_group, first_row = group * kGroup;
  const int rows = std::min(row_tiles - first_row, kGroup), within = t - group * per_group;
  return {first_row + within % rows, within / rows + low_columns};
}

// How a tile walks its k-blocks: from block `first` on, past the last from block 0, and of which steps it makes low.
struct KWalk {
  int first, low_begin, low_end;
};

// Two columns that make low halve K. Column 0 leaves its half's sums when it is through with that half, and column 1
// adds its own. Column 1 starts some blocks ahead, so that low is out before the tiles end: that much time to hand it
// on. Half of K ahead would be simpler, and read left from DRAM twice where a wave's rows of it don't fit L2.
constexpr int kMaxLowColumns = 2, kLowLead = 8;
constexpr KWalk k_walk(int col, int low_columns, int k_blocks) {
  if (col >= low_columns) return {0, k_blocks, k_blocks};
  if (low_columns == 1) return {0, 0, k_blocks};
  const int half = (k_blocks + 1) / 2, lead = std::min(half, kLowLead);
  return col == 0 ? KWalk{0, 0, half} : KWalk{lead, half - lead, k_blocks - lead};
}

struct GemmConfig {
  GemmKind kind;
  int row_tiles, col_tiles, grid;  // grid in blocks, a multiple of the cluster
  int low_blocks;                  // k-blocks of the low-rank update
  int low_columns;                 // columns of tiles that make low, an equal part of K each: 1 or 2; 0: low is given
  bool valid;                      // false: too many tiles for 32-bit numbers, or too few SMs
};

// K does not enter: both tile widths walk the whole of it.
struct GemmRequest {
  int64_t M, N, R;
  int sms;
  bool makes_low;  // in the same launch, where it can
  bool dropout, backward;
  bool gradients = false;     // where they fit
  int block_n = 0;            // 0: the width that is expected to be faster
  bool low_by_warps = false;  // where low is made of the masked left
  bool halves = false;        // low by two columns, where there are two, and two clusters
};

inline GemmConfig gemm_config(const GemmRequest& request) {
  const auto [M, N, R, sms, makes_low, dropout, backward, gradients, block_n, low_by_warps, halves] = request;
  GemmConfig c{};
  const int64_t rows = ceil_div(M, kGemmBlockM * kGemmCluster), clusters = sms / kGemmCluster;
  if (M < 1 || N < 1 || R < 0 || R > kMaxRank || clusters < 1) return c;
  const auto cost = [rows, clusters, columns = N](int64_t width, int64_t percent) {
    return ceil_div(rows * ceil_div(columns, width), clusters) * percent;
  };
  // A 128-wide tile takes 59 % of a 256-wide one: Triton, 8192 x 4096 x 4096, 415-420 us against 352-360, H100,
  // 2026-11-23.
  c.kind.block_n = block_n ? block_n : cost(128, 59) < cost(256, 100) ? 128 : 256;
  // One launch costs 3-5 % of the GEMM, a pass over x of its own 13 % (same shape, R = 16, H100, 2026-11-23). Above 64
  // ranks the accumulators don't fit.
  c.kind.rank_tile = makes_low && R >= 1 && R <= kInsideRank ? rank_tile_for(R) : 0;
  c.kind.backward = backward;
  c.kind.dropout = dropout && (backward || c.kind.rank_tile);  // the forward's mask matters to h alone
  c.kind.gradients = gradients && c.kind.fits_gradients();
  c.kind.low_by_warps = low_by_warps && c.kind.fits_low_by_warps();
  const int64_t cols = ceil_div(N, c.kind.block_n);
  c.low_blocks = static_cast<int>(ceil_div(R, kGemmBlockK));
  if (M > INT32_MAX - 512 || N > INT32_MAX - 512 || rows * cols > INT32_MAX - 2 * clusters) return c;
  c.row_tiles = static_cast<int>(rows);
  c.col_tiles = static_cast<int>(cols);
  c.grid = static_cast<int>(std::min(rows * cols, clusters)) * kGemmCluster;
  c.low_columns = c.kind.rank_tile == 0 ? 0 : halves && cols > 1 && clusters > 1 ? 2 : 1;
  c.valid = true;
  return c;
}

// What one launch needs zeroed: the tile counter, then (from 32 ints on) one flag for every 64 rows, which counts the
// columns that are through with their part of low.
constexpr int kControlFlags = 32;
inline int64_t control_bytes(const GemmConfig& c) {
  return c.kind.rank_tile ? 4 * (kControlFlags + int64_t{4} * c.row_tiles) : 0;
}
// Words of a row of dropout's mask, which dx's launch reads: a bit for each of its columns.
constexpr int64_t mask_words(int64_t N) { return ceil_div(N, 32); }
inline int64_t mask_bytes(const GemmConfig& c, int64_t M, int64_t N) {
  return c.kind.backward && c.kind.dropout ? M * mask_words(N) * 4 : 0;
}
// Column 0's sums of low in fp32, where column 1 adds the rest: of every 16 rows as their warp holds them.
inline int64_t low_sums_bytes(const GemmConfig& c) {
  return c.low_columns > 1 ? int64_t{c.row_tiles} * kGemmCluster * kGemmBlockM * c.kind.rank_tile * 4 : 0;
}

// ---- lora_gemm_small: y[M, N] and h for M <= 128, R <= 64
constexpr int kSmallRows = 128, kSmallCols = 128, kSmallRank = 64,
              kSmallSplits = 8;         // 8: the largest cluster that every device takes
constexpr int kSmemPerSm = 228 * 1024;  // of which every block takes 1 KiB for the system

constexpr int small_stage_bytes(int rows) { return (kSmallCols + kSmallRank + rows) * kGemmBlockK * 2; }
constexpr int small_blocks_per_sm(int rows) { return rows > 64 ? 1 : 2; }
// As many as fit beside barriers and the way to the first multiple of 1024.
constexpr int small_stages(int rows) {
  return ((small_blocks_per_sm(rows) == 1 ? kSmemLimit : kSmemPerSm / 2 - 1024) - 2048) / small_stage_bytes(rows);
}
constexpr int small_smem_bytes(int rows) { return small_stages(rows) * small_stage_bytes(rows) + 2048; }

struct SmallConfig {
  int rows;    // M rounded up to 16, 32, 64 or 128
  int strips;  // of 128 columns of y, one cluster each
  int splits;  // blocks of a cluster, each with one part of K: 1, 2, 4 or 8
  int smem;
  bool valid;
};

// Splits K so far that every SM has a block. Two an SM would fit and are slower: clusters lie within one GPC, whose SMs
// they need not fill, so that the last cluster comes when the others are through (4096 -> 4096 at 16 rows: 8 splits of
// 32 strips 23.8 us, 4 splits 19.5; H100, 2026-11-28). 16 clusters of 8 took two waves on 132 SMs (2048 -> 2048 at 128
// rows: 30.9 us, 4 splits 17.1), 8 one; that 14 take one is assumed.
inline SmallConfig small_config(int64_t M, int64_t N, int64_t K, int64_t R, int sms) {
  SmallConfig c{};
  if (M < 1 || M > kSmallRows || N < 1 || N > INT32_MAX - 512 || K < 1 || K > INT32_MAX - 512 || R < 1 ||
      R > kSmallRank)
    return c;
  c.rows = M <= 16 ? 16 : M <= 32 ? 32 : M <= 64 ? 64 : 128;
  c.strips = static_cast<int>(ceil_div(N, kSmallCols));
  c.splits = 1;
  const int64_t steps = ceil_div(K, kGemmBlockK);
  const auto fits = [&](int splits) {
    return splits * int64_t{c.strips} <= (splits == kSmallSplits ? sms * 6 / 7 : sms) && splits <= steps;
  };
  while (c.splits < kSmallSplits && fits(2 * c.splits)) c.splits *= 2;
  c.smem = small_smem_bytes(c.rows);
  c.valid = true;
  return c;
}

// ---- shrink: low[M, R] = scale * drop(left[M, K]) down
constexpr int kShrinkRows = 32, kShrinkBlockK = 128, kShrinkStages = 4;
constexpr int shrink_smem_bytes(int rank_tile) {
  return kShrinkStages * (kShrinkRows + rank_tile) * kShrinkBlockK * 2 + 1024;
}

constexpr int kShrinkSplits = 8;  // the largest cluster that every device takes
// Blocks that share K, so that more bytes are on their way: as many as are resident at once, two steps each at least.
inline int shrink_splits(int64_t M, int64_t K, int64_t R, int sms) {
  const int tile = rank_tile_for(R);
  const int64_t blocks = ceil_div(M, kShrinkRows) * ceil_div(R, tile), steps = ceil_div(K, kShrinkBlockK),
                resident = int64_t{sms} * std::min(kSmemPerSm / (shrink_smem_bytes(tile) + 1024), 4);
  int splits = 1;
  while (splits < kShrinkSplits && 2 * splits * blocks <= resident && 4 * splits <= steps) splits *= 2;
  return splits;
}

// ---- wgrad: out[C, R] = left[M, C]^T low[M, R]
constexpr int kWgradCols = 128, kWgradRows = 64;
constexpr int wgrad_stages(int rank_tile) { return rank_tile > 64 ? 3 : 4; }  // 3: two blocks fit an SM
constexpr int wgrad_smem_bytes(int rank_tile) {
  return wgrad_stages(rank_tile) * kWgradRows * (kWgradCols + rank_tile) * 2 + 1024;
}

struct WgradConfig {
  int rank_tile, rank_chunks;  // 16, 32, 64 or 128 ranks a block
  int64_t rows_per_split;      // a multiple of kWgradRows
  int splits;
};

// The launch covers `tiles` column tiles of all its products together: as many splits over M as keep every block
// resident at once.
inline WgradConfig wgrad_config(int64_t M, int64_t col_tiles, int64_t R, int sms) {
  WgradConfig c{};
  c.rank_tile = R == 0 ? 0 : R <= 64 ? rank_tile_for(R) : 128;
  c.rank_chunks = R == 0 ? 1 : static_cast<int>(ceil_div(R, c.rank_tile));
  const int64_t resident = sms * std::min<int64_t>(kSmemPerSm / (wgrad_smem_bytes(c.rank_tile) + 1024), 4);
  const int64_t wanted = std::max<int64_t>(1, resident / std::max<int64_t>(1, col_tiles * c.rank_chunks));
  const int64_t steps = std::max<int64_t>(1, ceil_div(M, kWgradRows));
  c.rows_per_split =
      std::max<int64_t>(ceil_div(steps, wanted), std::min<int64_t>(steps, 4)) * kWgradRows;  // at least 4 steps each
  c.splits = static_cast<int>(ceil_div(std::max<int64_t>(1, M), c.rows_per_split));
  return c;
}

}  // namespace fused_lora
