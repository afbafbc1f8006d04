// What a forward or a backward launches, and where its parts lie in the workspace: pure host functions, as in
// heuristics.h. Sizes of regions are bytes.
#pragma once

#include <array>
#include <string>

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

// ---- The words of a CudaPlan: a caller joins some of them with plus signs, and the heuristics choose the rest.
struct PlanWord {
  const char* word;
  int field, value;  // of CudaPlan, in its order
};
using PlanValues = std::array<int, 8>;

inline PlanValues values_of(const CudaPlan& p) {
  return {static_cast<int>(p.y),       static_cast<int>(p.h),       static_cast<int>(p.dx),
          static_cast<int>(p.dh),      static_cast<int>(p.wgrad),   static_cast<int>(p.launches),
          static_cast<int>(p.h_share), static_cast<int>(p.dh_share)};
}

constexpr PlanWord kPlanWords[] = {
    {"small", 0, static_cast<int>(CudaPlan::Product::small)},
    {"y128", 0, static_cast<int>(CudaPlan::Product::n128)},
    {"y256", 0, static_cast<int>(CudaPlan::Product::n256)},
    {"h_inside", 1, static_cast<int>(CudaPlan::Low::inside)},
    {"h_shrink", 1, static_cast<int>(CudaPlan::Low::shrink)},
    {"h_gemm", 1, static_cast<int>(CudaPlan::Low::gemm)},
    {"h_warps", 1, static_cast<int>(CudaPlan::Low::warps)},
    {"h_single", 6, static_cast<int>(CudaPlan::Share::single)},
    {"h_halves", 6, static_cast<int>(CudaPlan::Share::halves)},
    {"dx128", 2, static_cast<int>(CudaPlan::Product::n128)},
    {"dx256", 2, static_cast<int>(CudaPlan::Product::n256)},
    {"dh_inside", 3, static_cast<int>(CudaPlan::Low::inside)},
    {"dh_shrink", 3, static_cast<int>(CudaPlan::Low::shrink)},
    {"dh_gemm", 3, static_cast<int>(CudaPlan::Low::gemm)},
    {"dh_single", 7, static_cast<int>(CudaPlan::Share::single)},
    {"dh_halves", 7, static_cast<int>(CudaPlan::Share::halves)},
    {"wgrad_apart", 4, static_cast<int>(CudaPlan::Weights::apart)},
    {"wgrad_warpgroup", 4, static_cast<int>(CudaPlan::Weights::warpgroup)},
    {"overlap", 5, static_cast<int>(CudaPlan::Launches::overlap)},
    {"serial", 5, static_cast<int>(CudaPlan::Launches::serial)},
};

inline std::string words_of(const CudaPlan& plan) {
  std::string words;
  for (const auto& [word, field, value] : kPlanWords)
    if (values_of(plan)[field] == value) words += (words.empty() ? "" : "+") + std::string(word);
  return words;
}

constexpr bool in_halves(CudaPlan::Share share) { return share == CudaPlan::Share::halves; }
// Two columns where there are two, unless the caller says otherwise: one takes 17 % longer, and all others wait for it.
// 8192 x 4096 x 4096, R = 16: y 429 us instead of 442, dx with dA and dB 422 instead of 430; M = 2048: 109 instead of
// 115, 111 instead of 117 (H100, 2026-11-26).
constexpr bool may_be_halves(CudaPlan::Share share, int64_t deep) {
  return share != CudaPlan::Share::single && deep > kGemmBlockK;
}
constexpr CudaPlan::Share share_of(const GemmConfig& c) {
  return c.low_columns == 2   ? CudaPlan::Share::halves
         : c.low_columns == 1 ? CudaPlan::Share::single
                              : CudaPlan::Share::any;
}
constexpr bool may_be_inside(CudaPlan::Low low) { return low != CudaPlan::Low::shrink && low != CudaPlan::Low::gemm; }

// What a plan must not say of the columns that make h or dh, or null.
constexpr const char* share_conflict(const CudaPlan& plan, int64_t R) {
  if (plan.h_share != CudaPlan::Share::any) {
    if (R > kInsideRank) return "plan must not say h_single or h_halves beyond 64 ranks";
    if (plan.y == CudaPlan::Product::small)
      return "plan must not say both small, which has no tiles, and h_single or h_halves";
    if (!may_be_inside(plan.h))
      return "plan must not say both h_shrink or h_gemm and h_single or h_halves, which make h in y's launch";
  }
  if (plan.dh_share != CudaPlan::Share::any) {
    if (R > kInsideRank) return "plan must not say dh_single or dh_halves beyond 64 ranks";
    if (!may_be_inside(plan.dh))
      return "plan must not say both dh_shrink or dh_gemm and dh_single or dh_halves, which make dh in dx's launch";
  }
  return nullptr;
}
constexpr char kNoHalvesOfH[] = "plan must not say h_halves with one column of tiles, K up to 64 or fewer than 4 SMs",
               kNoHalvesOfDh[] = "plan must not say dh_halves with one column of tiles, N up to 64 or fewer than 4 SMs";

// What a plan must not say at these sizes, or null. The rest is right for every call: what a call does not need, or
// what deterministic mode forbids, is left out of it.
constexpr const char* plan_conflict(const CudaPlan& plan, int64_t M, int64_t R, bool dropout) {
  using Product = CudaPlan::Product;
  using Low = CudaPlan::Low;
  const bool warpgroup = plan.wgrad == CudaPlan::Weights::warpgroup;
  if (plan.dx == Product::small) return "plan must not say small of dx, which has no such kernel";
  if (plan.y == Product::small) {
    if (M > kSmallRows || R > kSmallRank) return "plan must not say small beyond 128 rows or 64 ranks";
    if (dropout) return "plan must not say small with dropout, which that kernel has not";
    if (plan.h == Low::shrink || plan.h == Low::gemm)
      return "plan must not say both small, which makes h itself, and h_shrink or h_gemm";
  }
  if (R > kInsideRank) {
    if (plan.h == Low::inside) return "plan must not say h_inside beyond 64 ranks";
    if (plan.dh == Low::inside) return "plan must not say dh_inside beyond 64 ranks";
    if (warpgroup) return "plan must not say wgrad_warpgroup beyond 64 ranks";
  }
  if (dropout && plan.h == Low::gemm) return "plan must not say h_gemm with dropout, which is shrink's";
  if (warpgroup && (plan.dh == Low::shrink || plan.dh == Low::gemm))
    return "plan must not say both wgrad_warpgroup, which needs dh_inside, and dh_shrink or dh_gemm";
  if (plan.h == Low::warps && R > 32) return "plan must not say h_warps beyond 32 ranks: the registers are too few";
  if (plan.h == Low::warps && plan.y == Product::n128)
    return "plan must not say both h_warps, which needs y256, and y128";
  if (warpgroup && plan.dx == Product::n256 && dropout && R > 16)
    return "plan must not say both wgrad_warpgroup and dx256 with dropout beyond 16 ranks: the registers are too few";
  return share_conflict(plan, R);
}

// Columns of a tile, 0: the heuristics' choice.
constexpr int width_of(CudaPlan::Product p) {
  return p == CudaPlan::Product::n128 ? 128 : p == CudaPlan::Product::n256 ? 256 : 0;
}
constexpr CudaPlan::Product product_of(const GemmConfig& c) {
  return c.kind.block_n == 128 ? CudaPlan::Product::n128 : CudaPlan::Product::n256;
}
// One launch after another as soon as possible, unless the caller says otherwise.
constexpr CudaPlan::Launches launches_of(const CudaPlan& plan) {
  return plan.launches == CudaPlan::Launches::serial ? CudaPlan::Launches::serial : CudaPlan::Launches::overlap;
}

// Whether h of the masked x is made by shrink: where the two columns that would make it in y's launch are less than
// half of a wave of tiles, the others wait for them longer than a pass over x takes. 4096 x 4096, R = 16, p = 0.1, M =
// 2048: y and h 131 us instead of 145; M = 8192: 482 instead of 478 (H100, 2026-11-26).
constexpr bool masked_h_by_shrink(int64_t M, int sms) {
  return 4 * ceil_div(M, kGemmBlockM * kGemmCluster) <= sms / kGemmCluster;
}

// Whether the kernel for few rows is faster than tiles. 4096 x 4096, R = 16: 23 us instead of 29 at M = 16, 34 instead
// of 36 at 64, but 41 at 128, where tiles take 32 for twice as many rows; 4096 -> 1024: 20 at 128, tiles 30 (H100,
// 2026-11-26, with twice the splits of today, which are faster: bench/NOTES.md).
constexpr bool small_pays(int64_t M, int64_t N) { return M <= 64 || N <= 2048; }

struct ForwardPlan {
  CudaPlan plan;                   // of the forward's fields: what is done
  SmallConfig small;               // y and h, where plan.y is small
  GemmConfig gemm;                 // y otherwise
  GemmConfig h_gemm;               // h, where plan.h is gemm
  Region control, low_sums, A, B;  // A and B in x's dtype with padded rows, where the caller's don't serve
  int64_t bytes;
  const char* refused;  // why there is none, or null
};

inline bool needs_copy_A(Dtype dtype, Dtype adapter_dtype) { return dtype != adapter_dtype; }
inline bool needs_copy_B(int64_t R, Dtype dtype, Dtype adapter_dtype) { return dtype != adapter_dtype || R % 8 != 0; }
inline bool fused_dtype(Dtype dtype) { return dtype == Dtype::f16 || dtype == Dtype::bf16; }
constexpr char kNoPlan[] = "no plan for these sizes";

struct ForwardRequest {
  int64_t M, N, K, R;
  Dtype dtype, adapter_dtype;
  bool dropout;
  int sms;
  CudaPlan plan = {};  // what the caller wants
};

inline ForwardPlan forward_plan(const ForwardRequest& request) {
  using Low = CudaPlan::Low;
  const auto& [M, N, K, R, dtype, adapter_dtype, dropout, sms, want] = request;
  ForwardPlan p{};
  p.refused = kNoPlan;
  if (!fused_dtype(dtype) || R < 1 || R > kMaxRank || K < 1 || K > INT32_MAX - 512) return p;
  p.refused = plan_conflict(want, M, R, dropout);
  if (p.refused) return p;
  const bool halves = in_halves(want.h_share);
  const bool any = want.y == CudaPlan::Product::any && want.h_share == CudaPlan::Share::any && !dropout;
  const bool may_be_small = want.y == CudaPlan::Product::small || (any && small_pays(M, N));
  if (may_be_small && may_be_inside(want.h)) p.small = small_config(M, N, K, R, sms);
  const bool by_shrink =
      want.h == Low::any && want.h_share == CudaPlan::Share::any && dropout && masked_h_by_shrink(M, sms);
  if (!p.small.valid)
    p.gemm = gemm_config({.M = M,
                          .N = N,
                          .R = R,
                          .sms = sms,
                          .makes_low = may_be_inside(want.h) && !by_shrink,
                          .dropout = dropout,
                          .backward = false,
                          .block_n = want.h == Low::warps && dropout ? 256 : width_of(want.y),
                          .low_by_warps = want.h == Low::warps,
                          .halves = may_be_halves(want.h_share, K)});
  p.plan.h_share = share_of(p.gemm);
  p.plan.launches = launches_of(want);
  p.plan.y = p.small.valid ? CudaPlan::Product::small : product_of(p.gemm);
  p.plan.h = p.gemm.kind.low_by_warps                 ? Low::warps
             : p.small.valid || p.gemm.kind.rank_tile ? Low::inside
             : want.h != Low::any                     ? want.h
             : dropout                                ? Low::shrink
                                                      : Low::gemm;
  if (p.plan.h == Low::gemm)
    p.h_gemm =
        gemm_config({.M = M, .N = R, .R = 0, .sms = sms, .makes_low = false, .dropout = false, .backward = false});
  Layout layout;
  p.control = layout.take(control_bytes(p.gemm));
  p.low_sums = layout.take(low_sums_bytes(p.gemm));
  p.A = layout.take(needs_copy_A(dtype, adapter_dtype) ? R * K * 2 : 0);
  p.B = layout.take(needs_copy_B(R, dtype, adapter_dtype) ? N * padded_rank(R) * 2 : 0);
  p.bytes = layout.bytes();
  const bool valid = p.small.valid || (p.gemm.valid && (p.plan.h != Low::gemm || p.h_gemm.valid));
  p.refused = !valid ? kNoPlan : halves && p.gemm.low_columns < 2 ? kNoHalvesOfH : nullptr;
  return p;
}

struct BackwardPlan {
  CudaPlan plan;      // of the backward's fields: what is done; any: nothing
  GemmConfig gemm;    // dx
  GemmConfig h_gemm;  // dh, where plan.dh is gemm
  bool bias_apart;    // dbias has a launch of its own
  WgradConfig wgrad;  // dA and dB where plan.wgrad is apart: both in one launch of their own, in a fixed order; else
                      // they come out of dx's launch, added up by atomics
  WgradConfig bias_wgrad;  // dbias where wgrad does not have it
  Region control, low_sums, mask, A, B, dh, dA, dB,
      dbias;  // dA and dB: fp32 sums, one slab for every split of wgrad; dbias: one for every split
  int64_t bytes;
  const char* refused;  // why there is none, or null

  bool gradients_inside() const { return gemm.kind.gradients; }
};

struct BackwardRequest {
  int64_t M, N, K, R;
  Dtype dtype, adapter_dtype;
  bool dropout, need_x, need_A, need_B, need_bias, deterministic;
  int sms;
  CudaPlan plan = {};  // what the caller wants
};

// dx and what comes out of its launch.
inline GemmConfig dx_config(const BackwardRequest& r) {
  const CudaPlan& want = r.plan;
  // Above 32 ranks the fourth warpgroup takes longer than a pass of its own: 8192 x 4096 x 4096, R = 64, 541 us instead
  // of 433 + 72; at R = 16 461 instead of 433 + 59 (H100, 2026-11-26).
  const bool pays = want.wgrad == CudaPlan::Weights::any ? r.R <= 32 : want.wgrad != CudaPlan::Weights::apart;
  const bool inside = (r.need_A || r.need_B) && !r.deterministic && pays;
  GemmRequest request{.M = r.M,
                      .N = r.K,
                      .R = r.R,
                      .sms = r.sms,
                      .makes_low = may_be_inside(want.dh),
                      .dropout = r.dropout,
                      .backward = true,
                      .gradients = inside,
                      .block_n = width_of(want.dx),
                      .halves = may_be_halves(want.dh_share, r.N)};
  GemmConfig c = gemm_config(request);
  if (inside && !c.kind.gradients && want.wgrad == CudaPlan::Weights::warpgroup) {
    request.block_n = 128;  // where they fit
    c = gemm_config(request);
  }
  return c;
}

inline BackwardPlan backward_plan(const BackwardRequest& request) {
  using Low = CudaPlan::Low;
  using Weights = CudaPlan::Weights;
  const auto& [M, N, K, R, dtype, adapter_dtype, dropout, need_x, need_A, need_B, need_bias, deterministic, sms, want] =
      request;
  BackwardPlan p{};
  p.refused = kNoPlan;
  if (!fused_dtype(dtype) || M < 1 || N < 1 || K < 1 || R < 1 || R > kMaxRank || sms < kGemmCluster) return p;
  p.refused = plan_conflict(want, M, R, dropout);
  if (p.refused) return p;
  bool valid = M <= INT32_MAX - 512 && N <= INT32_MAX - 512 && K <= INT32_MAX - 512;
  p.plan.launches = launches_of(want);
  if (need_x) {
    p.gemm = dx_config(request);
    p.plan.dx = product_of(p.gemm);
    p.plan.dh_share = share_of(p.gemm);
    valid = valid && p.gemm.valid;
  }
  if (need_x || need_A)
    p.plan.dh = p.gemm.kind.rank_tile     ? Low::inside
                : !may_be_inside(want.dh) ? want.dh
                : R > kInsideRank         ? Low::gemm
                                          : Low::shrink;
  if (p.plan.dh == Low::gemm) {
    p.h_gemm =
        gemm_config({.M = M, .N = R, .R = 0, .sms = sms, .makes_low = false, .dropout = false, .backward = true});
    valid = valid && p.h_gemm.valid;
  }
  if (need_A || need_B) p.plan.wgrad = p.gradients_inside() ? Weights::warpgroup : Weights::apart;
  p.bias_apart = need_bias && (p.gradients_inside() || !need_B);
  const int64_t tiles = (need_A ? ceil_div(K, kWgradCols) : 0) + (need_B ? ceil_div(N, kWgradCols) : 0);
  p.wgrad = wgrad_config(M, tiles, R, sms);
  p.bias_wgrad = wgrad_config(M, ceil_div(N, kWgradCols), 0, sms);
  Layout layout;
  const bool dh = p.plan.dh != Low::any;
  p.control = layout.take(control_bytes(p.gemm));
  p.low_sums = layout.take(low_sums_bytes(p.gemm));
  p.mask = layout.take(need_x ? mask_bytes(p.gemm, M, K) : 0);
  p.A = layout.take(need_x && needs_copy_A(dtype, adapter_dtype) ? R * K * 2 : 0);
  p.B = layout.take(dh && needs_copy_B(R, dtype, adapter_dtype) ? N * padded_rank(R) * 2 : 0);
  p.dh = layout.take(dh ? M * padded_rank(R) * 2 : 0);
  // What dx's launch adds up in fp32 goes straight to fp32 outputs.
  const int64_t slabs = !p.gradients_inside() ? p.wgrad.splits : adapter_dtype == Dtype::f32 ? 0 : 1;
  p.dA = layout.take(need_A ? slabs * R * K * 4 : 0);
  p.dB = layout.take(need_B ? slabs * N * R * 4 : 0);
  p.dbias = layout.take(need_bias ? (p.bias_apart ? p.bias_wgrad : p.wgrad).splits * N * 4 : 0);
  p.bytes = layout.bytes();
  const bool no_halves = need_x && in_halves(want.dh_share) && p.gemm.low_columns < 2;
  p.refused = !valid ? kNoPlan : no_halves ? kNoHalvesOfDh : nullptr;
  return p;
}

}  // namespace fused_lora
