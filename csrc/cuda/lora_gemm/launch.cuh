// How lora_gemm is launched: tensor maps and the choice of an instance of kernel.cuh. One dtype a translation
// unit: each takes half a minute to compile.
#pragma once

#include "kernel.cuh"

#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace fused_lora::gemm {

// The maps of a launch; a map that the instance does not read is a copy of the left one.
struct AllMaps {
  CUtensorMap left, right, low, thin, down, out, h, dh, x;
};

inline Status make_maps(const GemmConfig& c, const GemmParams& p, AllMaps* maps) {
  Status status = Status::ok;
  const auto make = [&](CUtensorMap* map, const MatrixView& view) {
    if (status == Status::ok) status = tensor_map(view, map);
  };
  // [M, cols], read or written in boxes of so many rows and columns.
  const auto rows = [&](const void* data, int64_t cols, int64_t ld, int box_rows, int box_cols) {
    return MatrixView{.data = data,
                      .rows = p.M,
                      .cols = cols,
                      .ld = ld,
                      .box_rows = box_rows,
                      .box_cols = box_cols,
                      .dtype = p.dtype};
  };
  // A right operand of `cols` columns that is `deep` along the reduction: stored [cols, deep], in the backward
  // [deep, cols].
  const auto right = [&](const void* data, int64_t cols, int64_t deep, int64_t ld, int box_cols) {
    if (c.kind.backward)
      return MatrixView{.data = data,
                        .rows = deep,
                        .cols = cols,
                        .ld = ld,
                        .box_rows = kGemmBlockK,
                        .box_cols = std::min(box_cols, 64),
                        .dtype = p.dtype};
    return MatrixView{.data = data,
                      .rows = cols,
                      .cols = deep,
                      .ld = ld,
                      .box_rows = box_cols,
                      .box_cols = kGemmBlockK,
                      .dtype = p.dtype};
  };
  const int load_rows = c.kind.block_n / kGemmCluster, rank_tile = c.kind.rank_tile;
  make(&maps->left, rows(p.left, p.K, p.ld_left, kGemmBlockM, kGemmBlockK));
  make(&maps->right, right(p.right, p.N, p.K, p.ld_right, load_rows));
  make(&maps->out, rows(p.out, p.N, p.ld_out, 64, 64));
  maps->low = maps->thin = maps->down = maps->h = maps->dh = maps->x = maps->left;
  if (p.R > 0) {
    make(&maps->low, rows(p.low, p.R, p.ld_low, kGemmBlockM, kGemmBlockK));
    make(&maps->thin, right(p.thin, p.N, p.R, p.ld_thin, load_rows));
  }
  if (rank_tile) make(&maps->down, right(p.down, p.R, p.K, p.ld_down, rank_tile));
  if (p.dB) make(&maps->h, rows(p.h, p.R, p.ld_h, kGemmBlockM, rank_tile));
  if (p.dA) {
    make(&maps->dh, rows(p.low, p.R, p.ld_low, kGemmBlockM, rank_tile));
    make(&maps->x, rows(p.x, p.N, p.ld_x, kGemmBlockM, 64));
  }
  return status;
}

template <class C> Status run(const GemmConfig& c, const GemmParams& p, Target& target) {
  if (!(c.kind == C::kKind)) return Status::bad_shape;
  AllMaps maps;
  const Status status = make_maps(c, p, &maps);
  if (status != Status::ok) return status;
  using T = typename C::T;
  const auto walk = [&](int col) { return k_walk(col, c.low_columns, static_cast<int>(ceil_div(p.K, kBlockK))); };
  const Args<T> args{.low = static_cast<T*>(p.low),
                     .bias = static_cast<const T*>(p.bias),
                     .dB = p.dB,
                     .dA = p.dA,
                     .control = p.control,
                     .low_sums = reinterpret_cast<float4*>(p.low_sums),
                     .mask = p.mask,
                     .seed = p.dropout.seed,
                     .ld_low = p.ld_low,
                     .M = static_cast<int>(p.M),
                     .N = static_cast<int>(p.N),
                     .K = static_cast<int>(p.K),
                     .R = static_cast<int>(p.R),
                     .low_columns = c.low_columns,
                     .threshold = p.dropout.threshold,
                     .alpha = p.alpha,
                     .scale = p.scale,
                     .drop_scale = p.dropout.scale(),
                     .walks = {walk(0), walk(1), walk(2)}};
  const Grid grid{.blocks = c.grid, .threads = C::kThreads, .smem = C::kKind.smem_bytes(), .cluster = kGemmCluster};
  return launch<lora_gemm_kernel<C>>(grid, target, maps.left, maps.right, maps.low, maps.thin, maps.down, maps.out,
                                     maps.h, maps.dh, maps.x, args);
}

template <class T, int kBlockN, int kRank, bool kBackward, bool kDropout>
Status choose_gradients(const GemmConfig& c, const GemmParams& p, Target& target) {
  using Without = Traits<T, kBlockN, kRank, kBackward, kDropout>;
  if constexpr (Without::kKind.fits_gradients())
    if (c.kind.gradients) return run<Traits<T, kBlockN, kRank, kBackward, kDropout, true>>(c, p, target);
  if constexpr (Without::kKind.fits_low_by_warps())
    if (c.kind.low_by_warps) return run<Traits<T, kBlockN, kRank, kBackward, kDropout, false, true>>(c, p, target);
  return run<Without>(c, p, target);
}

template <class T, int kBlockN, bool kBackward, bool kDropout>
Status choose_rank(const GemmConfig& c, const GemmParams& p, Target& target) {
  switch (c.kind.rank_tile) {
    case 0:
      if constexpr (kBackward || !kDropout) return choose_gradients<T, kBlockN, 0, kBackward, kDropout>(c, p, target);
      else return Status::bad_shape;  // the forward's mask matters to low alone
    case 16: return choose_gradients<T, kBlockN, 16, kBackward, kDropout>(c, p, target);
    case 32: return choose_gradients<T, kBlockN, 32, kBackward, kDropout>(c, p, target);
    case 64: return choose_gradients<T, kBlockN, 64, kBackward, kDropout>(c, p, target);
    default: return Status::bad_shape;
  }
}

template <class T, int kBlockN> Status choose_layout(const GemmConfig& c, const GemmParams& p, Target& target) {
  if (c.kind.dropout)
    return c.kind.backward ? choose_rank<T, kBlockN, true, true>(c, p, target)
                           : choose_rank<T, kBlockN, false, true>(c, p, target);
  return c.kind.backward ? choose_rank<T, kBlockN, true, false>(c, p, target)
                         : choose_rank<T, kBlockN, false, false>(c, p, target);
}

template <class T> Status choose_width(const GemmConfig& c, const GemmParams& p, Target& target) {
  switch (c.kind.block_n) {
    case 128: return choose_layout<T, 128>(c, p, target);
    case 256: return choose_layout<T, 256>(c, p, target);
    default: return Status::bad_shape;
  }
}

}  // namespace fused_lora::gemm
