// What a forward or a backward launches, and where its parts lie in the workspace: pure host functions, as in
// heuristics.h. Sizes of regions are bytes.
#pragma once

#include "heuristics.h"

namespace fused_lora {

struct Region {
  int64_t offset, bytes;  // bytes 0: not used
};

class Layout {
 public:
  Region take(int64_t bytes) {
    const Region r{end_, bytes};
    end_ += round_up(bytes, 256);
    return r;
  }
  int64_t bytes() const { return end_; }

 private:
  int64_t end_ = 0;
};

struct ForwardPlan {
  SmallConfig small;  // y and h, where `h_by` is in_small
  GemmConfig gemm;    // y otherwise
  GemmConfig h_gemm;  // h, where `h_by` is by_gemm
  enum { in_small, in_gemm, shrink, by_gemm } h_by;
  Region control, A, B;  // A and B in x's dtype with padded rows, where the caller's don't serve
  int64_t bytes;
  bool valid;
};

inline bool needs_copy_A(Dtype dtype, Dtype adapter_dtype) { return dtype != adapter_dtype; }
inline bool needs_copy_B(int64_t R, Dtype dtype, Dtype adapter_dtype) { return dtype != adapter_dtype || R % 8 != 0; }
inline bool fused_dtype(Dtype dtype) { return dtype == Dtype::f16 || dtype == Dtype::bf16; }

struct ForwardRequest {
  int64_t M, N, K, R;
  Dtype dtype, adapter_dtype;
  bool dropout;
  int sms;
};

inline ForwardPlan forward_plan(const ForwardRequest& request) {
  const auto [M, N, K, R, dtype, adapter_dtype, dropout, sms] = request;
  ForwardPlan p{};
  if (!fused_dtype(dtype) || R < 1 || K < 1 || K > INT32_MAX - 512) return p;
  if (!dropout) p.small = small_config(M, N, K, R, sms);
  if (!p.small.valid)
    p.gemm =
        gemm_config({.M = M, .N = N, .R = R, .sms = sms, .makes_low = true, .dropout = dropout, .backward = false});
  p.h_by = p.small.valid           ? ForwardPlan::in_small
           : p.gemm.kind.rank_tile ? ForwardPlan::in_gemm
           : dropout               ? ForwardPlan::shrink
                                   : ForwardPlan::by_gemm;
  if (p.h_by == ForwardPlan::by_gemm)
    p.h_gemm =
        gemm_config({.M = M, .N = R, .R = 0, .sms = sms, .makes_low = false, .dropout = false, .backward = false});
  Layout layout;
  p.control = layout.take(control_bytes(p.gemm));
  p.A = layout.take(needs_copy_A(dtype, adapter_dtype) ? R * K * 2 : 0);
  p.B = layout.take(needs_copy_B(R, dtype, adapter_dtype) ? N * padded_rank(R) * 2 : 0);
  p.bytes = layout.bytes();
  p.valid = p.small.valid || (p.gemm.valid && (p.h_by != ForwardPlan::by_gemm || p.h_gemm.valid));
  return p;
}

struct BackwardPlan {
  GemmConfig gemm;    // dx
  GemmConfig h_gemm;  // dh, where `h_by` is by_gemm
  enum { nobody, in_gemm, shrink, by_gemm } h_by;
  bool bias_apart;         // dbias has a launch of its own
  bool gradients;          // dA and dB come out of dx's launch, added up by atomics
  WgradConfig wgrad;       // else both in one launch of their own, in a fixed order
  WgradConfig bias_wgrad;  // dbias where wgrad does not have it
  Region control, A, B, dh, dA, dB,
      dbias;  // dA and dB: fp32 sums, one slab for every split of wgrad; dbias: one for every split
  int64_t bytes;
  bool valid;
};

struct BackwardRequest {
  int64_t M, N, K, R;
  Dtype dtype, adapter_dtype;
  bool dropout, need_x, need_A, need_B, need_bias, deterministic;
  int sms;
};

inline BackwardPlan backward_plan(const BackwardRequest& request) {
  const auto [M, N, K, R, dtype, adapter_dtype, dropout, need_x, need_A, need_B, need_bias, deterministic, sms] =
      request;
  BackwardPlan p{};
  if (!fused_dtype(dtype) || M < 1 || N < 1 || K < 1 || R < 1 || R > kMaxRank || sms < kGemmCluster) return p;
  p.valid = M <= INT32_MAX - 512 && N <= INT32_MAX - 512 && K <= INT32_MAX - 512;
  p.h_by = BackwardPlan::nobody;
  if (need_x) {
    p.gemm = gemm_config({.M = M, .N = K, .R = R, .sms = sms, .makes_low = true, .dropout = dropout, .backward = true});
    p.valid = p.valid && p.gemm.valid;
  }
  if (need_x || need_A)
    p.h_by = p.gemm.kind.rank_tile ? BackwardPlan::in_gemm : R > 64 ? BackwardPlan::by_gemm : BackwardPlan::shrink;
  if (p.h_by == BackwardPlan::by_gemm) {
    p.h_gemm =
        gemm_config({.M = M, .N = R, .R = 0, .sms = sms, .makes_low = false, .dropout = false, .backward = true});
    p.valid = p.valid && p.h_gemm.valid;
  }
  p.gradients = p.gemm.kind.gradients() && !deterministic && (need_A || need_B);
  p.bias_apart = need_bias && (p.gradients || !need_B);
  const int64_t tiles = (need_A ? ceil_div(K, kWgradCols) : 0) + (need_B ? ceil_div(N, kWgradCols) : 0);
  p.wgrad = wgrad_config(M, tiles, R, sms);
  p.bias_wgrad = wgrad_config(M, ceil_div(N, kWgradCols), 0, sms);
  Layout layout;
  const bool dh = p.h_by != BackwardPlan::nobody;
  p.control = layout.take(control_bytes(p.gemm));
  p.A = layout.take(need_x && needs_copy_A(dtype, adapter_dtype) ? R * K * 2 : 0);
  p.B = layout.take(dh && needs_copy_B(R, dtype, adapter_dtype) ? N * padded_rank(R) * 2 : 0);
  p.dh = layout.take(dh ? M * padded_rank(R) * 2 : 0);
  // What dx's launch adds up in fp32 goes straight to fp32 outputs.
  const int64_t slabs = !p.gradients ? p.wgrad.splits : adapter_dtype == Dtype::f32 ? 0 : 1;
  p.dA = layout.take(need_A ? slabs * R * K * 4 : 0);
  p.dB = layout.take(need_B ? slabs * N * R * 4 : 0);
  p.dbias = layout.take(need_bias ? (p.bias_apart ? p.bias_wgrad : p.wgrad).splits * N * 4 : 0);
  p.bytes = layout.bytes();
  return p;
}

}  // namespace fused_lora
