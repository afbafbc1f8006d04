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
  const bool backward = c.kind.backward;
  const int load_rows = c.kind.block_n / kGemmCluster;
  const auto right_view = [&](const void* data, int64_t k, int64_t ld) {
    return backward ? MatrixView{data, k, p.N, ld, kGemmBlockK, 64, p.dtype}
                    : MatrixView{data, p.N, k, ld, load_rows, kGemmBlockK, p.dtype};
  };
  Status status = tensor_map({p.left, p.M, p.K, p.ld_left, kGemmBlockM, kGemmBlockK, p.dtype}, &maps->left);
  if (status == Status::ok) status = tensor_map(right_view(p.right, p.K, p.ld_right), &maps->right);
  if (status == Status::ok) status = tensor_map({p.out, p.M, p.N, p.ld_out, 64, 64, p.dtype}, &maps->out);
  maps->low = maps->thin = maps->down = maps->h = maps->dh = maps->x = maps->left;
  if (status == Status::ok && p.R > 0)
    status = tensor_map({p.low, p.M, p.R, p.ld_low, kGemmBlockM, kGemmBlockK, p.dtype}, &maps->low);
  if (status == Status::ok && p.R > 0) status = tensor_map(right_view(p.thin, p.R, p.ld_thin), &maps->thin);
  if (status == Status::ok && c.kind.rank_tile) {
    const MatrixView down = backward ? MatrixView{p.down, p.K, p.R, p.ld_down, kGemmBlockK, c.kind.rank_tile, p.dtype}
                                     : MatrixView{p.down, p.R, p.K, p.ld_down, c.kind.rank_tile, kGemmBlockK, p.dtype};
    status = tensor_map(down, &maps->down);
  }
  if (status == Status::ok && p.dB)
    status = tensor_map({p.h, p.M, p.R, p.ld_h, kGemmBlockM, c.kind.rank_tile, p.dtype}, &maps->h);
  if (status == Status::ok && p.dA)
    status = tensor_map({p.low, p.M, p.R, p.ld_low, kGemmBlockM, c.kind.rank_tile, p.dtype}, &maps->dh);
  if (status == Status::ok && p.dA) status = tensor_map({p.x, p.M, p.N, p.ld_x, kGemmBlockM, 64, p.dtype}, &maps->x);
  return status;
}

template <class C> Status run(const GemmConfig& c, const GemmParams& p, Target& target) {
  if (!(c.kind == C::kKind)) return Status::bad_shape;
  AllMaps maps;
  const Status status = make_maps(c, p, &maps);
  if (status != Status::ok) return status;
  using T = typename C::T;
  const Args<T> args{static_cast<T*>(p.low),
                     static_cast<const T*>(p.bias),
                     p.dB,
                     p.dA,
                     p.control,
                     p.dropout.seed,
                     p.ld_low,
                     static_cast<int>(p.M),
                     static_cast<int>(p.N),
                     static_cast<int>(p.K),
                     static_cast<int>(p.R),
                     p.dropout.threshold,
                     p.alpha,
                     p.scale,
                     p.dropout.scale()};
  return launch<lora_gemm_kernel<C>>(Grid{c.grid, C::kThreads, C::kKind.smem_bytes(), kGemmCluster}, target, maps.left,
                                     maps.right, maps.low, maps.thin, maps.down, maps.out, maps.h, maps.dh, maps.x,
                                     args);
}

template <class T, int kBlockN, bool kBackward, bool kDropout>
Status choose_rank(const GemmConfig& c, const GemmParams& p, Target& target) {
  switch (c.kind.rank_tile) {
    case 0:
      if constexpr (kBackward || !kDropout) return run<Traits<T, kBlockN, 0, kBackward, kDropout>>(c, p, target);
      break;
    case 16: return run<Traits<T, kBlockN, 16, kBackward, kDropout>>(c, p, target);
    case 32: return run<Traits<T, kBlockN, 32, kBackward, kDropout>>(c, p, target);
    case 64: return run<Traits<T, kBlockN, 64, kBackward, kDropout>>(c, p, target);
  }
  return Status::bad_shape;
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
  }
  return Status::bad_shape;
}

}  // namespace fused_lora::gemm
