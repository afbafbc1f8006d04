// What a tile of lora_gemm's backward asks of its SM: bytes through shared memory and cycles of the tensor cores. A
// model that says where a plan can win before a GPU has timed it; it chooses nothing.
//
// Formula   cycles = max(bytes / 128, products / rate): shared memory moves 128 bytes a cycle for everybody together,
//           the tensor cores do 2048 multiply-adds of 16 bits a cycle by wgmma and are counted at half of that by
//           mma.sync (measured: 0.6)
// Bytes     TMA's writes and reads, wgmma's operands (one of m64 nN k16 reads 64 + N rows of 32 bytes, so a tile of 256
//           columns by two products reads its left rows twice), ldmatrix's, stmatrix's, mask bits
// Left out  latency, bank conflicts, atomics, L2 and HBM: a plan that wins here may lose on a GPU, one that loses here
//           has nothing to win by
// Source    NVIDIA H100 data sheet (989 TFLOP/s, 132 SMs, 1.83 GHz); Luo et al., arXiv 2402.13499 (mma.sync, shared
//           memory)
#pragma once

#include <algorithm>
#include <cstdint>

#include "heuristics.h"

namespace fused_lora {

struct TileLoad {
  int block_n, rank_tile;  // as in GemmKind
  bool dropout;
  GradientsBy gradients;
  int k_steps;    // of 64
  int col_tiles;  // that share the dy of a row block, each with k_steps / col_tiles products of dB
  int low_steps;  // k-steps in which this tile makes dh, too
};

struct Traffic {
  double bytes = 0, tensor_cycles = 0;

  constexpr double shared_cycles() const { return bytes / 128; }
  constexpr double cycles() const { return std::max(shared_cycles(), tensor_cycles); }
  constexpr void add(double times, double more_bytes, double products, double rate) {
    bytes += times * more_bytes;
    tensor_cycles += times * products / rate;
  }
};

constexpr Traffic tile_traffic(const TileLoad& t) {
  constexpr double kWgmma = 2048, kMma = 1024, kRow = kGemmBlockK * 2, kM = kGemmBlockM;
  const bool warps = t.gradients == GradientsBy::warps;
  const int n = t.gradients == GradientsBy::warpgroup ? std::min(t.block_n, 128) : t.block_n;
  const double rows = kM * (t.block_n / n) + 2 * t.block_n;  // that both warpgroups' products of one block read
  const double load = (kM + t.block_n) * kRow, R = t.rank_tile;
  Traffic sum;
  sum.add(t.k_steps, load + rows * kRow, kM * t.block_n * kGemmBlockK, kWgmma);
  sum.add(t.low_steps, R * kRow + (kM + 2 * R) * kRow, kM * R * kGemmBlockK, kWgmma);  // down, and its products
  // The low-rank block; with a mask in products of 64 columns.
  const double low_rows = t.dropout ? (t.block_n / 64) * 2 * (64 + 64) : rows;
  sum.add(t.rank_tile > 0, load + low_rows * R * 2, kM * t.block_n * R, kWgmma);
  sum.add(1, 2 * kM * t.block_n * 2, 0, kWgmma);                 // the tile on its way out
  if (t.dropout) sum.add(1, 2 * kM * t.block_n / 8, 0, kWgmma);  // mask bits, written and read
  if (t.gradients == GradientsBy::none) return sum;
  // A product of 64 columns of dy or x by 128 rows of h or dh, which every warp of the three reads for itself.
  const double side = kM * R * 2, block = kM * kRow, chunks = t.block_n / 64;
  const double steps = 1.0 * t.k_steps / t.col_tiles + chunks;
  sum.add(steps, block + (warps ? 3 : 1) * side, kM * R * 64, warps ? kMma : kWgmma);
  sum.add(1, 2 * side + chunks * block, 0, kWgmma);  // h, dh and x by TMA
  // x through the mask: rewritten for wgmma, in registers for mma.sync.
  if (t.dropout) sum.add(1, kM * t.block_n / 8 + (warps ? 0 : chunks * 2 * block), 0, kWgmma);
  return sum;
}

}  // namespace fused_lora
