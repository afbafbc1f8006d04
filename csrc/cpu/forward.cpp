// The CPU forward: h = s * drop(x) A^T, and y += h B^T into the caller's x W^T + bias or, with W, y by lora_gemm. The
// op's optional tensors act on h between the two (between.h), and out_scale on the rows of y, or of W and B where
// lora_gemm packs them.
//
// One walk for all dtypes, but for bf16 on AMX (amx_walk.cpp). Each thread takes a run of rows in blocks of kRows: x is
// read once, in panels of kPanel columns, for h; then the block's rows of y are updated once, while h is in L1. Nothing
// is summed across threads, so results repeat bit for bit whatever their number is.
#include "amx.h"
#include "between.h"
#include "block_bf16.h"
#include "block_fp32.h"
#include "few_rows.h"
#include "walk.h"

namespace fused_lora::cpu {
namespace {

// B^T, what stands right of h.
template <class Block> typename Block::Factor thin_of(const CpuForwardParams& p, Buffers& buffers, bool wanted) {
  const void* B = wanted ? p.B : nullptr;
  return {buffers, B, p.adapter_dtype, p.R, p.N, round_up(p.N, Block::kColumns), true};
}

// h, low [M, Rp] where it is not null and, without W, the update of y by `thin`, which is filled here.
template <class Block>
void low_rank(const CpuForwardParams& p, Buffers& buffers, const typename Block::Factor& thin,
              typename Block::Low* low) {
  const int64_t Rp = round_up(p.R, Block::kRanks);
  const int threads = threads_for(p.M, p.N + p.K, p.R, p.threads);
  const bool dropout = p.dropout.threshold > 0;
  const float factor = Block::kMaskScales ? p.scaling : p.scaling * p.dropout.scale();
  const typename Block::Factor down(buffers, p.A, p.adapter_dtype, p.K, p.R, Rp, true);  // A^T
  fill(threads, down, thin);
  const void* input = p.x_lora ? p.x_lora : p.x;
  const int64_t ld = p.x_lora ? p.ldx_lora : p.ldx;
  const Between between(p, Rp);
  std::vector<Block> blocks;
  for (int t = 0; t < threads; ++t) blocks.emplace_back(buffers, block_rows(p.M, threads), p.dtype, dropout, p.R);

  const auto body = [&](int t, int64_t m, int64_t rows) {
    Block& block = blocks[static_cast<size_t>(t)];
    block.clear_low();
    for (int64_t k = 0; k < p.K; k += kPanel) {
      const int64_t cols = std::min(kPanel, p.K - k);
      if (dropout) block.draw(p.dropout, 0, m, k, rows, cols);
      const auto x = block.panel(at(input, m * ld + k, p.dtype), ld, block.keep(), rows, cols);
      block.shrink(x, down, k, rows, cols);
    }
    block.scale_low(factor, rows);
    block.store_low(at(p.h, m * p.R, p.dtype), rows);
    if (between) {
      between.add_h_in(block.low, m, rows);
      between.times_gate(block.low, m, rows);
      block.scale_low(1.0f, rows);
    }
    if (low) block.copy_low(low + m * Rp, rows);
    for (int64_t n = 0; !p.W && n < p.N; n += kPanel) {
      const int64_t cols = std::min(kPanel, p.N - n);
      char* y = at(p.y, m * p.N + n, p.dtype);
      block.expand(thin, {}, y, p.N, n, rows, cols);
      if (p.out_scale)
        scale_panel(y, p.N, p.dtype, p.out_scale + n, p.bias ? at(p.bias, n, p.dtype) : nullptr, rows, cols);
    }
  };
  for_row_blocks(p.M, threads, [](int) {}, body);
}

// Whether few_rows serves the call.
bool few(const CpuForwardParams& p) {
  const bool plain = !p.W_transposed && !p.h_in && !p.gate && p.dropout.threshold == 0;
  return p.W && plain && p.M <= kFewRows && !(p.dtype == Dtype::bf16 && features.amx);
}

void forward_of_few(const CpuForwardParams& p, Buffers& buffers) {
  const int64_t Rp = round_up(p.R, kLanes);
  const bool in_fp32 = p.adapter_dtype == Dtype::f32 && p.dtype != Dtype::f32;  // x for A, and h before it is rounded
  float *scaling = buffers.take(p.R), *low = buffers.take(p.M * Rp);
  std::fill_n(scaling, p.R, p.scaling);
  const void* input = p.x_lora ? p.x_lora : p.x;
  const int64_t ld = p.x_lora ? p.ldx_lora : p.ldx;
  FewRows h{.left = input,
            .right = p.A,
            .out = p.h,
            .M = p.M,
            .N = p.R,
            .K = p.K,
            .ld_left = ld,
            .ld_right = p.K,
            .dtype = p.adapter_dtype,
            .scale = scaling};
  if (in_fp32) {
    float *x = buffers.take(p.M * p.K), *wide = buffers.take(p.M * p.R);
    for (int64_t m = 0; m < p.M; ++m) load_matrix(at(input, m * ld, p.dtype), p.dtype, x + m * p.K, 1, p.K, p.K);
    h.left = x, h.ld_left = p.K, h.out = wide;
  }
  few_rows(h, buffers, threads_worth(p.M * p.R * p.K, p.threads));
  if (in_fp32) store_row(static_cast<const float*>(h.out), p.h, p.dtype, p.M * p.R);
  load_matrix(p.h, p.dtype, low, p.M, p.R, Rp);
  const FewRows y{.left = p.x,
                  .right = p.W,
                  .out = p.y,
                  .M = p.M,
                  .N = p.N,
                  .K = p.K,
                  .ld_left = p.ldx,
                  .ld_right = p.ldw,
                  .dtype = p.dtype,
                  .bias = p.bias,
                  .scale = p.out_scale,
                  .low = low,
                  .thin = p.B,
                  .R = p.R,
                  .thin_dtype = p.adapter_dtype};
  few_rows(y, buffers, threads_worth(p.M * p.N * p.K, p.threads));
}

#ifdef FUSED_LORA_BF16_DOT
void forward_bf16(const CpuForwardParams& p, Buffers& buffers) {
  const int64_t Rp = round_up(p.R, BlockBf16::kRanks);
  auto* low = p.W ? buffers.take<uint16_t>(p.M * Rp) : nullptr;
  const auto thin = thin_of<BlockBf16>(p, buffers, true);
  low_rank<BlockBf16>(p, buffers, thin, low);
  if (!p.W) return;
  const Bf16Gemm y{.left = static_cast<const uint16_t*>(p.x),
                   .left_scale = nullptr,
                   .right = static_cast<const uint16_t*>(p.W),
                   .low = low,
                   .thin = thin.data(),
                   .keep = nullptr,
                   .bias = static_cast<const uint16_t*>(p.bias),
                   .out_scale = p.out_scale,
                   .out = static_cast<uint16_t*>(p.y),
                   .M = p.M,
                   .N = p.N,
                   .K = p.K,
                   .R = p.R,
                   .ld_left = p.ldx,
                   .ld_right = p.ldw,
                   .Rp = Rp,
                   .ld_thin = thin.ld(),
                   .ld_keep = 0,
                   .scale = 1.0f,
                   .by_rows = p.W_transposed};
  bf16_gemm(y, buffers, threads_worth(p.M * p.N * p.K / 4, p.threads));
}
#endif

}  // namespace
}  // namespace fused_lora::cpu

namespace fused_lora {
using namespace cpu;

Status cpu_forward(const CpuForwardParams& p) {
  if (const Status status = check(p); status != Status::ok) return status;
  Buffers buffers;
  if (few(p)) return forward_of_few(p, buffers), Status::ok;
#ifdef FUSED_LORA_AMX
  if (p.dtype == Dtype::bf16 && features.amx) return amx_forward(p, buffers), Status::ok;
#endif
#ifdef FUSED_LORA_BF16_DOT
  if (in_bf16(p.dtype)) return forward_bf16(p, buffers), Status::ok;
#endif
  const int64_t Rp = round_up(p.R, BlockFp32::kRanks);
  float* low = p.W && (p.h_in || p.gate) ? buffers.take(p.M * Rp) : nullptr;  // else it is h
  low_rank<BlockFp32>(p, buffers, thin_of<BlockFp32>(p, buffers, !p.W), low);
  if (p.W) {
    const LoraGemm y{.left = static_cast<const float*>(p.x),
                     .left_scale = nullptr,
                     .right = static_cast<const float*>(p.W),
                     .low = low ? low : static_cast<const float*>(p.h),
                     .thin = static_cast<const float*>(p.B),
                     .bias = static_cast<const float*>(p.bias),
                     .scale = p.out_scale,
                     .out = static_cast<float*>(p.y),
                     .M = p.M,
                     .N = p.N,
                     .K = p.K,
                     .R = p.R,
                     .ld_left = p.ldx,
                     .ld_right = p.ldw,
                     .ld_low = low ? Rp : p.R,
                     .ld_thin = p.R,
                     .by_rows = p.W_transposed,
                     .thin_by_rows = false};
    lora_gemm(y, buffers, threads_worth(p.M * p.N * p.K, p.threads));
  }
  return Status::ok;
}

}  // namespace fused_lora
