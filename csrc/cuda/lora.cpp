// The CUDA back end's two drivers: the forward and the backward of plain LoRA as a few launches on one stream.
//
//   forward    [prepare]  [shrink: h]   lora_gemm: y (and h), or lora_gemm_small: y and h
//   backward   [prepare]  [shrink: dh]  lora_gemm: dx (and dh, dA, dB)   [wgrad: dA, dB, dbias]
//
// Bracketed launches only where plans.h plans them. What lora_gemm wants zeroed is zeroed in stream order: a
// captured graph replays that too. Each kernel but the first may start while the one before it ends (launch.h).
#include "kernels.h"
#include "launch.h"
#include "plans.h"

namespace fused_lora {
namespace {

template <class T = void> T* at(void* workspace, const Region& region) {
  return region.bytes ? reinterpret_cast<T*>(static_cast<char*>(workspace) + region.offset) : nullptr;
}

bool aligned(std::initializer_list<const void*> pointers, std::initializer_list<int64_t> row_strides) {
  for (const void* p : pointers)
    if (reinterpret_cast<uintptr_t>(p) % 16) return false;
  for (const int64_t stride : row_strides)
    if (stride % 8) return false;
  return true;
}

// low = scale * left down as a GEMM of its own, without dropout: down is its right operand.
Status h_by_gemm(const GemmConfig& config, const ShrinkParams& p, Target& target) {
  const GemmParams gemm{.left = p.left,
                        .right = p.down,
                        .out = p.low,
                        .ld_left = p.ld_left,
                        .ld_right = p.ld_down,
                        .ld_out = padded_rank(p.R),
                        .M = p.M,
                        .N = p.R,
                        .K = p.K,
                        .alpha = p.scale,
                        .dtype = p.dtype};
  return lora_gemm(config, gemm, target);
}

PrepareParams forward_prepare(const CudaForwardParams& p, const ForwardPlan& plan) {
  return {.A = p.A,
          .B = p.B,
          .out_A = at(p.workspace, plan.A),
          .out_B = at(p.workspace, plan.B),
          .control = at<int>(p.workspace, plan.control),
          .control_ints = plan.control.bytes / 4,
          .M = p.M,
          .N = p.N,
          .K = p.K,
          .R = p.R,
          .dtype = p.dtype,
          .adapter_dtype = p.adapter_dtype};
}

SmallParams forward_small(const CudaForwardParams& p, const void* A, const void* B) {
  return {.x = p.x,
          .W = p.W,
          .A = A,
          .B = B,
          .bias = p.bias,
          .h = p.h,
          .y = p.y,
          .M = p.M,
          .N = p.N,
          .K = p.K,
          .R = p.R,
          .ldx = p.ldx,
          .ldw = p.ldw,
          .scale = p.scaling,
          .dtype = p.dtype};
}

ShrinkParams forward_shrink(const CudaForwardParams& p, const void* A, int sms) {
  return {.left = p.x,
          .down = A,
          .low = p.h,
          .M = p.M,
          .K = p.K,
          .R = p.R,
          .ld_left = p.ldx,
          .ld_down = p.K,
          .down_mn = false,
          .scale = p.scaling,
          .dropout = p.dropout,
          .dtype = p.dtype,
          .sms = sms};
}

GemmParams forward_gemm(const CudaForwardParams& p, const ForwardPlan& plan, const void* A, const void* B) {
  const bool masked = plan.gemm.kind.dropout;
  return {.left = p.x,
          .right = p.W,
          .thin = B,
          .down = A,
          .bias = p.bias,
          .low = p.h,
          .out = p.y,
          .control = at<int>(p.workspace, plan.control),
          .low_sums = at<float>(p.workspace, plan.low_sums),
          .ld_left = p.ldx,
          .ld_right = p.ldw,
          .ld_thin = padded_rank(p.R),
          .ld_down = p.K,
          .ld_low = padded_rank(p.R),
          .ld_out = p.N,
          .M = p.M,
          .N = p.N,
          .K = p.K,
          .R = p.R,
          .alpha = 1.0f,
          .scale = masked ? p.scaling * p.dropout.scale() : p.scaling,
          .dropout = masked ? p.dropout : Dropout{},
          .dtype = p.dtype};
}

// The sums that lora_gemm adds dA or dB up in: the output itself if that is fp32.
float* sums_in_gemm(const CudaBackwardParams& p, const BackwardPlan& plan, void* out, const Region& region) {
  if (!plan.gradients_inside() || !out) return nullptr;
  return p.adapter_dtype == Dtype::f32 ? static_cast<float*>(out) : at<float>(p.workspace, region);
}

PrepareParams backward_prepare(const CudaBackwardParams& p, const BackwardPlan& plan) {
  return {.A = p.A,
          .B = p.B,
          .out_A = at(p.workspace, plan.A),
          .out_B = at(p.workspace, plan.B),
          .control = at<int>(p.workspace, plan.control),
          .dA = sums_in_gemm(p, plan, p.dA, plan.dA),
          .dB = sums_in_gemm(p, plan, p.dB, plan.dB),
          .mask = at<uint32_t>(p.workspace, plan.mask),
          .dropout = p.dropout,
          .control_ints = plan.control.bytes / 4,
          .M = p.M,
          .N = p.N,
          .K = p.K,
          .R = p.R,
          .dtype = p.dtype,
          .adapter_dtype = p.adapter_dtype};
}

ShrinkParams backward_shrink(const CudaBackwardParams& p, const void* B, void* dh, int sms) {
  return {.left = p.dy,
          .down = B,
          .low = dh,
          .M = p.M,
          .K = p.N,
          .R = p.R,
          .ld_left = p.lddy,
          .ld_down = padded_rank(p.R),
          .down_mn = true,
          .scale = p.scaling,
          .dtype = p.dtype,
          .sms = sms};
}

GemmParams backward_gemm(const CudaBackwardParams& p, const BackwardPlan& plan, const void* A, const void* B,
                         void* dh) {
  return {.left = p.dy,
          .right = p.W,
          .thin = A,
          .down = B,
          .low = dh,
          .out = p.dx,
          .h = p.h,
          .x = p.x,
          .dB = sums_in_gemm(p, plan, p.dB, plan.dB),
          .dA = sums_in_gemm(p, plan, p.dA, plan.dA),
          .control = at<int>(p.workspace, plan.control),
          .low_sums = at<float>(p.workspace, plan.low_sums),
          .mask = at<uint32_t>(p.workspace, plan.mask),
          .ld_left = p.lddy,
          .ld_right = p.ldw,
          .ld_thin = p.K,
          .ld_down = padded_rank(p.R),
          .ld_low = padded_rank(p.R),
          .ld_out = p.K,
          .ld_h = p.ldh,
          .ld_x = p.ldx,
          .M = p.M,
          .N = p.K,  // of the product: dy [M, N] W [N, K] sums over the layer's N
          .K = p.N,
          .R = p.R,
          .alpha = 1.0f,
          .scale = p.scaling,
          .dropout = p.dropout,
          .dtype = p.dtype};
}

// dA and dB, and dbias with dB unless it comes apart; `dropout`: of dA.
WgradParams adapter_gradients(const CudaBackwardParams& p, const BackwardPlan& plan, void* dh, Dropout dropout) {
  WgradParams w{.M = p.M, .R = p.R, .dtype = p.dtype, .out_dtype = p.adapter_dtype};
  if (p.dB)
    w.jobs[w.count++] = {.left = p.dy,
                         .low = p.h,
                         .slabs = at<float>(p.workspace, plan.dB),
                         .sum_slabs = plan.bias_apart ? nullptr : at<float>(p.workspace, plan.dbias),
                         .out = p.dB,
                         .column_sums = p.dbias,
                         .C = p.N,
                         .ld_left = p.lddy,
                         .ld_low = p.ldh,
                         .scale = 1.0f};
  if (p.dA)
    w.jobs[w.count++] = {.left = p.x,
                         .low = dh,
                         .slabs = at<float>(p.workspace, plan.dA),
                         .out = p.dA,
                         .C = p.K,
                         .ld_left = p.ldx,
                         .ld_low = padded_rank(p.R),
                         .transposed = true,
                         .scale = 1.0f,
                         .dropout = dropout};
  return w;
}

// dbias alone: no ranks.
WgradParams bias_gradient(const CudaBackwardParams& p, const BackwardPlan& plan) {
  WgradParams w{.count = 1, .M = p.M, .R = 0, .dtype = p.dtype, .out_dtype = p.adapter_dtype};
  w.jobs[0] = {.left = p.dy,
               .sum_slabs = at<float>(p.workspace, plan.dbias),
               .column_sums = p.dbias,
               .C = p.N,
               .ld_left = p.lddy,
               .scale = 1.0f};
  return w;
}

// dA and dB after dx, from the sums of its launch or by a launch of their own; dbias with them or apart.
Status weight_gradients(const CudaBackwardParams& p, const BackwardPlan& plan, void* dh, Target& target) {
  Status status = Status::ok;
  if (plan.gradients_inside() && p.adapter_dtype != Dtype::f32)  // the dropout's factor is in the sums
    status = add_slabs(1, adapter_gradients(p, plan, dh, Dropout{}), target);
  else if (plan.plan.wgrad == CudaPlan::Weights::apart)
    status = wgrad(plan.wgrad, adapter_gradients(p, plan, dh, p.dropout), target);
  if (status == Status::ok && plan.bias_apart) status = wgrad(plan.bias_wgrad, bias_gradient(p, plan), target);
  return status;
}

}  // namespace

Status cuda_forward(const CudaForwardParams& p) {
  if (p.M == 0) return Status::ok;
  int sms = 0;
  Status status = use_device(p.device, &sms);
  if (status != Status::ok) return status;
  if (p.N % 8 || p.K % 8 || (p.dropout.threshold && !p.dropout.seed)) return Status::bad_shape;
  const ForwardPlan plan = forward_plan({.M = p.M,
                                         .N = p.N,
                                         .K = p.K,
                                         .R = p.R,
                                         .dtype = p.dtype,
                                         .adapter_dtype = p.adapter_dtype,
                                         .dropout = p.dropout.threshold > 0,
                                         .sms = sms,
                                         .plan = p.plan});
  if (plan.refused || p.workspace_bytes < plan.bytes)
    return fused_dtype(p.dtype) ? Status::bad_plan : Status::bad_dtype;
  if (!aligned({p.x, p.W, p.A, p.B, p.bias, p.h, p.y, p.workspace}, {p.ldx, p.ldw})) return Status::bad_alignment;
  Target target{p.device, p.stream, plan.plan.launches == CudaPlan::Launches::overlap};

  const PrepareParams prep = forward_prepare(p, plan);
  status = prepare(prep, target);
  const void* const A = prep.out_A ? prep.out_A : p.A;
  const void* const B = prep.out_B ? prep.out_B : p.B;
  if (status != Status::ok) return status;
  if (plan.plan.y == CudaPlan::Product::small) return lora_gemm_small(plan.small, forward_small(p, A, B), target);
  if (plan.plan.h == CudaPlan::Low::shrink) status = shrink(forward_shrink(p, A, sms), target);
  if (plan.plan.h == CudaPlan::Low::gemm) status = h_by_gemm(plan.h_gemm, forward_shrink(p, A, sms), target);
  return status == Status::ok ? lora_gemm(plan.gemm, forward_gemm(p, plan, A, B), target) : status;
}

Status cuda_backward(const CudaBackwardParams& p) {
  if (p.M == 0 || !(p.dx || p.dA || p.dB || p.dbias)) return Status::ok;
  int sms = 0;
  Status status = use_device(p.device, &sms);
  if (status != Status::ok) return status;
  if (p.N % 8 || p.K % 8 || (p.dropout.threshold && !p.dropout.seed)) return Status::bad_shape;
  const BackwardPlan plan = backward_plan({.M = p.M,
                                           .N = p.N,
                                           .K = p.K,
                                           .R = p.R,
                                           .dtype = p.dtype,
                                           .adapter_dtype = p.adapter_dtype,
                                           .dropout = p.dropout.threshold > 0,
                                           .need_x = p.dx != nullptr,
                                           .need_A = p.dA != nullptr,
                                           .need_B = p.dB != nullptr,
                                           .need_bias = p.dbias != nullptr,
                                           .deterministic = p.deterministic,
                                           .sms = sms,
                                           .plan = p.plan});
  if (plan.refused || p.workspace_bytes < plan.bytes)
    return fused_dtype(p.dtype) ? Status::bad_plan : Status::bad_dtype;
  if (!aligned({p.dy, p.x, p.W, p.A, p.B, p.h, p.dx, p.dA, p.dB, p.dbias, p.workspace}, {p.lddy, p.ldx, p.ldw, p.ldh}))
    return Status::bad_alignment;
  Target target{p.device, p.stream, plan.plan.launches == CudaPlan::Launches::overlap};

  const PrepareParams prep = backward_prepare(p, plan);
  status = prepare(prep, target);
  const void* const A = prep.out_A ? prep.out_A : p.A;
  const void* const B = prep.out_B ? prep.out_B : p.B;
  void* const dh = at(p.workspace, plan.dh);
  if (status != Status::ok) return status;
  if (plan.plan.dh == CudaPlan::Low::shrink) status = shrink(backward_shrink(p, B, dh, sms), target);
  if (plan.plan.dh == CudaPlan::Low::gemm) status = h_by_gemm(plan.h_gemm, backward_shrink(p, B, dh, sms), target);
  if (status == Status::ok && p.dx) status = lora_gemm(plan.gemm, backward_gemm(p, plan, A, B, dh), target);
  return status == Status::ok ? weight_gradients(p, plan, dh, target) : status;
}

}  // namespace fused_lora
