// The CUDA back end's two drivers: the forward and the backward of plain LoRA as a few launches on one stream.
//
//   forward    [prepare]  [shrink: h]   lora_gemm: y (and h), or lora_gemm_small: y and h
//   backward   [prepare]  [shrink: dh]  lora_gemm: dx (and dh, dA, dB)   [wgrad: dA, dB, dbias]
//
// Bracketed launches only where heuristics.h plans them. What lora_gemm wants zeroed is zeroed in stream order: a
// captured graph replays that too. Each kernel but the first may start while the one before it ends (launch.h).
#include "heuristics.h"
#include "kernels.h"
#include "launch.h"

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

// This thread's device and its number of SMs; only compute capability 9.0 has the instructions of lora_gemm.
Status use_device(int device, int* sms) {
  struct Known {
    std::atomic<int> sms{0};
  };
  static Known known[64];
  if (device < 0 || device >= 64) return Status::unsupported_device;
  Status status = from_cuda(cudaSetDevice(device), "cudaSetDevice");
  if (status != Status::ok) return status;
  *sms = known[device].sms.load(std::memory_order_relaxed);
  if (*sms) return Status::ok;
  int major = 0, minor = 0;
  status =
      from_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  if (status == Status::ok)
    status =
        from_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  if (status == Status::ok)
    status = from_cuda(cudaDeviceGetAttribute(sms, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  if (status != Status::ok) return status;
  if (major != 9 || minor != 0) return Status::unsupported_device;
  known[device].sms.store(*sms, std::memory_order_relaxed);
  return Status::ok;
}

// h = scale * left right^T (in the backward: scale * left right) as a GEMM of its own, for ranks above 64 without
// dropout.
Status h_by_gemm(const GemmConfig& config, const void* left, int64_t ld_left, const void* right, int64_t ld_right,
                 void* h, int64_t M, int64_t K, int64_t R, float scale, Dtype dtype, Target& target) {
  GemmParams g{};
  g.left = left;
  g.right = right;
  g.out = h;
  g.ld_left = ld_left;
  g.ld_right = ld_right;
  g.ld_out = padded_rank(R);
  g.M = M;
  g.N = R;
  g.K = K;
  g.alpha = scale;
  g.dtype = dtype;
  return lora_gemm(config, g, target);
}

GemmParams forward_gemm(const CudaForwardParams& p, const ForwardPlan& plan, const void* A, const void* B) {
  GemmParams g{};
  g.left = p.x;
  g.right = p.W;
  g.thin = B;
  g.down = A;
  g.bias = p.bias;
  g.low = p.h;
  g.out = p.y;
  g.control = at<int>(p.workspace, plan.control);
  g.ld_left = p.ldx;
  g.ld_right = p.ldw;
  g.ld_thin = g.ld_low = padded_rank(p.R);
  g.ld_down = p.K;
  g.ld_out = p.N;
  g.M = p.M;
  g.N = p.N;
  g.K = p.K;
  g.R = p.R;
  g.alpha = 1.0f;
  g.scale = p.scaling;
  if (plan.gemm.kind.dropout) {
    g.scale *= p.dropout.scale();
    g.dropout = p.dropout;
  }
  g.dtype = p.dtype;
  return g;
}

// The sums that lora_gemm adds dA or dB up in: the output itself if that is fp32.
float* sums_in_gemm(const CudaBackwardParams& p, const BackwardPlan& plan, void* out, const Region& region) {
  if (!plan.gradients || !out) return nullptr;
  return p.adapter_dtype == Dtype::f32 ? static_cast<float*>(out) : at<float>(p.workspace, region);
}

GemmParams backward_gemm(const CudaBackwardParams& p, const BackwardPlan& plan, const void* A, const void* B,
                         void* dh) {
  GemmParams g{};
  g.left = p.dy;
  g.right = p.W;
  g.thin = A;
  g.down = B;
  g.low = dh;
  g.out = p.dx;
  g.h = p.h;
  g.x = p.x;
  g.dB = sums_in_gemm(p, plan, p.dB, plan.dB);
  g.dA = sums_in_gemm(p, plan, p.dA, plan.dA);
  g.ld_h = p.ldh;
  g.ld_x = p.ldx;
  g.control = at<int>(p.workspace, plan.control);
  g.ld_left = p.lddy;
  g.ld_right = p.ldw;
  g.ld_thin = g.ld_out = p.K;
  g.ld_down = g.ld_low = padded_rank(p.R);
  g.M = p.M;
  g.N = p.K;  // of the product: dy [M, N] W [N, K] sums over the layer's N
  g.K = p.N;
  g.R = p.R;
  g.alpha = 1.0f;
  g.scale = p.scaling;
  g.dropout = p.dropout;
  g.dtype = p.dtype;
  return g;
}

// wgrad's jobs: dA, dB and, unless it comes apart, dbias; `bias_alone`: dbias.
WgradParams wgrad_jobs(const CudaBackwardParams& p, const BackwardPlan& plan, void* dh, bool bias_alone) {
  WgradParams w{};
  w.M = p.M;
  w.R = bias_alone ? 0 : p.R;
  w.dtype = p.dtype;
  w.out_dtype = p.adapter_dtype;
  float* const bias_slabs = bias_alone == plan.bias_apart ? at<float>(p.workspace, plan.dbias) : nullptr;
  if (bias_alone || p.dB) {
    WgradJob& job = w.jobs[w.count++];
    job.left = p.dy;
    job.low = bias_alone ? nullptr : p.h;
    job.slabs = bias_alone ? nullptr : at<float>(p.workspace, plan.dB);
    job.out = bias_alone ? nullptr : p.dB;
    job.sum_slabs = bias_slabs;
    job.column_sums = p.dbias;
    job.C = p.N;
    job.ld_left = p.lddy;
    job.ld_low = p.ldh;
    job.scale = 1.0f;
  }
  if (!bias_alone && p.dA) {
    WgradJob& job = w.jobs[w.count++];
    job.left = p.x;
    job.low = dh;
    job.slabs = at<float>(p.workspace, plan.dA);
    job.out = p.dA;
    job.C = p.K;
    job.ld_left = p.ldx;
    job.ld_low = padded_rank(p.R);
    job.transposed = true;
    job.scale = 1.0f;
    job.dropout = p.dropout;
  }
  return w;
}

// dA and dB after dx, from the sums of its launch or by a launch of their own; dbias with them or apart.
Status weight_gradients(const CudaBackwardParams& p, const BackwardPlan& plan, void* dh, Target& target) {
  Status status = Status::ok;
  if (plan.gradients && p.adapter_dtype != Dtype::f32) {
    WgradParams rounding = wgrad_jobs(p, plan, dh, false);
    for (WgradJob& job : rounding.jobs) job.dropout = {};  // its factor is in the sums
    status = add_slabs(1, rounding, target);
  } else if (!plan.gradients && (p.dA || p.dB)) {
    status = wgrad(plan.wgrad, wgrad_jobs(p, plan, dh, false), target);
  }
  if (status == Status::ok && plan.bias_apart) status = wgrad(plan.bias_wgrad, wgrad_jobs(p, plan, dh, true), target);
  return status;
}

}  // namespace

Status cuda_forward(const CudaForwardParams& p) {
  if (p.M == 0) return Status::ok;
  int sms = 0;
  Status status = use_device(p.device, &sms);
  if (status != Status::ok) return status;
  if (p.N % 8 || p.K % 8 || (p.dropout.threshold && !p.dropout.seed)) return Status::bad_shape;
  const ForwardPlan plan = forward_plan(p.M, p.N, p.K, p.R, p.dtype, p.adapter_dtype, p.dropout.threshold > 0, sms);
  if (!plan.valid || p.workspace_bytes < plan.bytes)
    return fused_dtype(p.dtype) ? Status::bad_shape : Status::bad_dtype;
  if (!aligned({p.x, p.W, p.A, p.B, p.bias, p.h, p.y, p.workspace}, {p.ldx, p.ldw})) return Status::bad_alignment;
  Target target{p.device, p.stream};

  const PrepareParams prep{p.A,
                           p.B,
                           at(p.workspace, plan.A),
                           at(p.workspace, plan.B),
                           at<int>(p.workspace, plan.control),
                           nullptr,
                           nullptr,
                           plan.control.bytes / 4,
                           p.N,
                           p.K,
                           p.R,
                           p.dtype,
                           p.adapter_dtype};
  status = prepare(prep, target);
  const void* const A = prep.out_A ? prep.out_A : p.A;
  const void* const B = prep.out_B ? prep.out_B : p.B;
  if (plan.h_by == ForwardPlan::in_small)
    return status == Status::ok
               ? lora_gemm_small(
                     plan.small,
                     {p.x, p.W, A, B, p.bias, p.h, p.y, p.M, p.N, p.K, p.R, p.ldx, p.ldw, p.scaling, p.dtype}, target)
               : status;
  if (status == Status::ok && plan.h_by == ForwardPlan::shrink)
    status = shrink({p.x, A, p.h, p.M, p.K, p.R, p.ldx, p.K, false, p.scaling, p.dropout, p.dtype}, target);
  if (status == Status::ok && plan.h_by == ForwardPlan::by_gemm)
    status = h_by_gemm(plan.h_gemm, p.x, p.ldx, A, p.K, p.h, p.M, p.K, p.R, p.scaling, p.dtype, target);
  if (status == Status::ok) status = lora_gemm(plan.gemm, forward_gemm(p, plan, A, B), target);
  return status;
}

Status cuda_backward(const CudaBackwardParams& p) {
  if (p.M == 0 || !(p.dx || p.dA || p.dB || p.dbias)) return Status::ok;
  int sms = 0;
  Status status = use_device(p.device, &sms);
  if (status != Status::ok) return status;
  if (p.N % 8 || p.K % 8 || (p.dropout.threshold && !p.dropout.seed)) return Status::bad_shape;
  const BackwardPlan plan = backward_plan(p.M, p.N, p.K, p.R, p.dtype, p.adapter_dtype, p.dropout.threshold > 0, p.dx,
                                          p.dA, p.dB, p.dbias, p.deterministic, sms);
  if (!plan.valid || p.workspace_bytes < plan.bytes)
    return fused_dtype(p.dtype) ? Status::bad_shape : Status::bad_dtype;
  if (!aligned({p.dy, p.x, p.W, p.A, p.B, p.h, p.dx, p.dA, p.dB, p.dbias, p.workspace}, {p.lddy, p.ldx, p.ldw, p.ldh}))
    return Status::bad_alignment;
  Target target{p.device, p.stream};

  const PrepareParams prep{p.A,
                           p.B,
                           at(p.workspace, plan.A),
                           at(p.workspace, plan.B),
                           at<int>(p.workspace, plan.control),
                           sums_in_gemm(p, plan, p.dA, plan.dA),
                           sums_in_gemm(p, plan, p.dB, plan.dB),
                           plan.control.bytes / 4,
                           p.N,
                           p.K,
                           p.R,
                           p.dtype,
                           p.adapter_dtype};
  status = prepare(prep, target);
  const void* const A = prep.out_A ? prep.out_A : p.A;
  const void* const B = prep.out_B ? prep.out_B : p.B;
  void* const dh = at(p.workspace, plan.dh);
  const int64_t ldb = padded_rank(p.R);
  if (status == Status::ok && plan.h_by == BackwardPlan::shrink)
    status = shrink({p.dy, B, dh, p.M, p.N, p.R, p.lddy, ldb, true, p.scaling, {}, p.dtype}, target);
  if (status == Status::ok && plan.h_by == BackwardPlan::by_gemm)
    status = h_by_gemm(plan.h_gemm, p.dy, p.lddy, B, ldb, dh, p.M, p.N, p.R, p.scaling, p.dtype, target);
  if (status == Status::ok && p.dx) status = lora_gemm(plan.gemm, backward_gemm(p, plan, A, B, dh), target);
  return status == Status::ok ? weight_gradients(p, plan, dh, target) : status;
}

}  // namespace fused_lora
