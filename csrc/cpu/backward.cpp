// The CPU backward: dh = s * dy B, dx += mask * (dh A) / (1 - p) into the caller's dy W or, with W, dx by lora_gemm;
// dA = dh^T drop(x), dB = dy^T h, dbias = sum_M dy. The op's optional tensors act on h and dh between the products
// (between.h); row_scale makes a second dh, for dA, from the same panels of dy.
//
// One walk for all dtypes, but for bf16 on AMX (amx_walk.cpp). Each thread takes a run of rows in blocks of kRows: dy
// is read once, in panels of kPanel columns, for dh, dB and dbias; then x is read and dx updated once, under one
// dropout mask. dA, dB and dbias gather in one fp32 slab a thread; the slabs are summed in thread order, so results
// repeat bit for bit.
#include "amx.h"
#include "between.h"
#include "block_bf16.h"
#include "block_fp32.h"
#include "scale.h"
#include "walk.h"

namespace fused_lora::cpu {
namespace {

// dA [R, width] (ranks_first) or dB [width, R], and the slabs it gathers in. Nothing where dst is null.
template <class Block> class Gradient {
 public:
  Gradient(void* dst, Dtype dtype, int64_t width, int64_t R, bool ranks_first)
      : dst_(dst),
        dtype_(dtype),
        width_(width),
        // rows a multiple of 2 KiB apart would meet in one or two sets of L1
        padded_(round_up(width, Block::kGathered) + (width % 512 ? 0 : Block::kGathered)),
        R_(R),
        Rp_(round_up(R, Block::kRanks)),
        ranks_first_(ranks_first),
        slabs_(dst, padded_ * Rp_) {}

  // For the next thread.
  void add(Buffers& buffers) {
    if (dst_ && !turned_ && !ranks_first_) turned_ = buffers.take(padded_ * Rp_);
    slabs_.add(buffers);
  }
  void clear(int t) { slabs_.clear(t); }
  void gather(Block& block, typename Block::Panel panel, int t, int64_t n, int64_t rows, int64_t cols) {
    block.wgrad(panel, slabs_[t], padded_, n, rows, cols);
  }

  // dst = the slabs' sum * factor (* c[width]).
  void store(float factor, const float* c) {
    if (!dst_) return;
    float* sum = slabs_.sum();
    for (int64_t i = 0; factor != 1.0f && i < padded_ * Rp_; ++i) sum[i] *= factor;
    for (int64_t r = 0; c && r < R_; ++r)
      for (int64_t n = 0; n < width_; ++n) sum[r * padded_ + n] *= c[n];
    if (turned_) load_transposed(sum, Dtype::f32, turned_, Rp_, padded_, Rp_);
    store_slab(turned_ ? turned_ : sum, turned_ ? Rp_ : padded_, dst_, dtype_, ranks_first_ ? R_ : width_,
               ranks_first_ ? width_ : R_);
  }
  explicit operator bool() const { return dst_; }

 private:
  void* dst_;
  Dtype dtype_;
  int64_t width_, padded_, R_, Rp_;
  bool ranks_first_;
  Slabs slabs_;              // [Rp, padded]
  float* turned_ = nullptr;  // the sum transposed, where dst needs it
};

// What the optional tensors need beside a thread's Block: h + s h_in, low, and the sums of dh_c, [rows, Rp] each.
struct Beside {
  float *ungated, *low, *sums_c;
};

// A, what stands right of dh.
template <class Block> typename Block::Factor thin_of(const CpuBackwardParams& p, Buffers& buffers, bool wanted) {
  const void* A = wanted ? p.A : nullptr;
  return {buffers, A, p.adapter_dtype, p.R, p.K, round_up(p.K, Block::kColumns), false};
}

// What the base product takes of the walk over rows where it is ours and has the update inside; null where it does not.
template <class Block> struct ForProduct {
  typename Block::Low* dh;  // [M, Rp]
  uint32_t* bits;           // [M, (K + 31) / 32] of x that dropout keeps, in bf16 only; null without dropout
};

// dA, dB, dbias, dh_in, dgate, what `product` takes and, with `update`, the update of dx or dx_lora by `thin`, which is
// filled here.
template <class Block>
void low_rank(const CpuBackwardParams& p, Buffers& buffers, const typename Block::Factor& thin, bool update,
              const ForProduct<Block>& product) {
  using Factor = typename Block::Factor;
  const int64_t Rp = round_up(p.R, Block::kRanks), words = (p.K + 31) / 32;
  const int threads = threads_for(p.M, p.N + p.K, p.R, p.threads);
  const bool need_dh = p.dx || p.dx_lora || p.dA || p.dh_in || p.dgate, dropout = p.dropout.threshold > 0;
  const Between between(p, Rp);
  // What scales the columns of dy scales the rows of B instead, and those of dB at the end.
  const float *scale = p.out_scale, *scale_c = times(buffers, p.out_scale, p.row_scale, p.N);
  const auto scaled_B = [&](bool wanted, const float* by) -> const void* {
    return !wanted ? nullptr : by ? scaled_rows(buffers, p.B, p.adapter_dtype, by, p.N, p.R) : p.B;
  };
  void* updated = p.dx_lora ? p.dx_lora : p.dx;
  const Factor down(buffers, scaled_B(need_dh, scale), scale ? Dtype::f32 : p.adapter_dtype, p.N, p.R, Rp, false),
      down_c(buffers, scaled_B(p.dA && p.row_scale, scale_c), Dtype::f32, p.N, p.R, Rp, false);
  fill(threads, down, thin);
  if (down_c.needs_fill()) down_c.fill();
  Gradient<Block> dA(p.dA, p.adapter_dtype, p.K, p.R, true), dB(p.dB, p.adapter_dtype, p.N, p.R, false);
  Slabs dbias(p.dbias && !p.out_scale, round_up(p.N, Block::kColumns));
  ScaleSums scale_sums(scale_params(p), buffers, threads);
  std::vector<Block> blocks;
  std::vector<Beside> besides;
  for (int t = 0; t < threads; ++t) {
    const int64_t size = block_rows(p.M, threads) * Rp;
    const auto take = [&](bool wanted) { return wanted ? buffers.take(size) : nullptr; };
    besides.push_back({take(bool(between)), take(bool(between)), take(bool(down_c))});
    blocks.emplace_back(buffers, block_rows(p.M, threads), p.dtype, dropout, p.R);
    dA.add(buffers), dB.add(buffers), dbias.add(buffers);
  }

  const auto clear = [&](int t) { dA.clear(t), dB.clear(t), dbias.clear(t), scale_sums.clear(t); };
  const auto body = [&](int t, int64_t m, int64_t rows) {
    Block& block = blocks[static_cast<size_t>(t)];
    Beside& beside = besides[static_cast<size_t>(t)];
    const auto on_c = [&](const auto& work) {
      std::swap(block.low, beside.sums_c);
      work();
      std::swap(block.low, beside.sums_c);
    };
    block.clear_low();
    if (down_c) on_c([&] { block.clear_low(); });
    if (between && p.h) {
      load_matrix(at(p.h, m * p.R, p.dtype), p.dtype, beside.ungated, rows, p.R, Rp);
      between.add_h_in(beside.ungated, m, rows);
      std::copy_n(beside.ungated, rows * Rp, beside.low);
      between.times_gate(beside.low, m, rows);
      if (dB) block.gather_by(beside.low, rows);
    } else if (dB) {
      block.gather_by_h(at(p.h, m * p.R, p.dtype), rows);
    }
    for (int64_t n = 0; n < p.N; n += kPanel) {
      const int64_t cols = std::min(kPanel, p.N - n);
      const char* from = at(p.dy, m * p.lddy + n, p.dtype);
      if (scale_sums) scale_sums.gather(t, m, n, rows, cols);
      const auto dy = block.panel(from, p.lddy, {}, rows, cols);
      if (need_dh) block.shrink(dy, down, n, rows, cols);
      if (down_c) on_c([&] { block.shrink(dy, down_c, n, rows, cols); });
      if (dB) dB.gather(block, dy, t, n, rows, cols);
      if (dbias) block.column_sums(dy, dbias[t] + n, rows, cols);
    }
    if (!need_dh) return;
    const float factor = between ? 1.0f : p.scaling;  // which is in it already
    if (down_c)
      on_c([&] {
        if (between) between.gradient_c(block.low, m, rows);
        block.scale_low(factor, rows);
        block.gather_by_low(rows);
      });
    if (between) between.gradient(block.low, beside.ungated, m, rows);
    block.scale_low(factor, rows);
    if (dA && !down_c) block.gather_by_low(rows);
    for (int64_t k = 0; (dA || update || product.bits) && k < p.K; k += kPanel) {
      const int64_t cols = std::min(kPanel, p.K - k);
      if (dropout) block.draw(p.dropout, 0, m, k, rows, cols);
      if constexpr (requires { block.copy_bits(product.bits, words, rows, cols); })
        if (product.bits) block.copy_bits(product.bits + m * words + k / 32, words, rows, cols);
      const auto keep = block.keep();
      if (dA) dA.gather(block, block.panel(at(p.x, m * p.ldx + k, p.dtype), p.ldx, keep, rows, cols), t, k, rows, cols);
      if (update) block.expand(thin, keep, at(updated, m * p.K + k, p.dtype), p.K, k, rows, cols);
    }
    if (product.dh) block.copy_low(product.dh + m * Rp, rows);
  };
  for_row_blocks(p.M, threads, clear, body);

  const float factor = Block::kMaskScales ? 1.0f : p.dropout.scale();
  both(dA && dB ? threads : 1, [&] { dA.store(factor, nullptr); }, [&] { dB.store(1.0f, scale_c); });
  if (dbias) store_row(dbias.sum(), p.dbias, p.dtype, p.N);
  scale_sums.store();
}

#ifdef FUSED_LORA_BF16_DOT
void backward_bf16(const CpuBackwardParams& p, Buffers& buffers) {
  // dx by bf16_gemm has the update inside, but where it goes elsewhere.
  const bool own = p.dx && p.W, inside = own && !p.dx_lora, update = p.dx_lora || (p.dx && !inside);
  const int64_t Rp = round_up(p.R, BlockBf16::kRanks), words = (p.K + 31) / 32;
  const ForProduct<BlockBf16> product{
      .dh = inside ? buffers.take<uint16_t>(p.M * Rp) : nullptr,
      .bits = inside && p.dropout.threshold > 0 ? buffers.take<uint32_t>(p.M * words) : nullptr};
  const auto thin = thin_of<BlockBf16>(p, buffers, inside || update);
  low_rank<BlockBf16>(p, buffers, thin, update, product);
  if (!own) return;
  const Bf16Gemm dx{.left = static_cast<const uint16_t*>(p.dy),
                    .left_scale = p.out_scale,
                    .right = static_cast<const uint16_t*>(p.W),
                    .low = product.dh,
                    .thin = thin.data(),
                    .keep = product.bits,
                    .bias = nullptr,
                    .out_scale = nullptr,
                    .out = static_cast<uint16_t*>(p.dx),
                    .M = p.M,
                    .N = p.K,
                    .K = p.N,
                    .R = inside ? p.R : 0,
                    .ld_left = p.lddy,
                    .ld_right = p.ldw,
                    .Rp = Rp,
                    .ld_thin = thin.ld(),
                    .ld_keep = words,
                    .scale = p.dropout.scale(),
                    .by_rows = !p.W_transposed};
  bf16_gemm(dx, buffers, threads_worth(p.M * p.N * p.K / 4, p.threads));
}
#endif

}  // namespace
}  // namespace fused_lora::cpu

namespace fused_lora {
using namespace cpu;

Status cpu_backward(const CpuBackwardParams& p) {
  if (const Status status = check(p); status != Status::ok) return status;
  Buffers buffers;
#ifdef FUSED_LORA_AMX
  if (p.dtype == Dtype::bf16 && features.amx) return amx_backward(p, buffers), Status::ok;
#endif
#ifdef FUSED_LORA_BF16_DOT
  if (in_bf16(p.dtype)) return backward_bf16(p, buffers), Status::ok;
#endif
  // dx by lora_gemm has the update inside, but where dropout's mask keeps it out or it goes elsewhere.
  const bool own = p.dx && p.W, inside = own && p.dropout.threshold == 0 && !p.dx_lora;
  const int64_t Rp = round_up(p.R, BlockFp32::kRanks);
  float* dh = inside ? buffers.take(p.M * Rp) : nullptr;
  const LoraGemm dx{.left = static_cast<const float*>(p.dy),
                    .left_scale = p.out_scale,
                    .right = static_cast<const float*>(p.W),
                    .low = dh,
                    .thin = static_cast<const float*>(p.A),
                    .bias = nullptr,
                    .scale = nullptr,
                    .out = static_cast<float*>(p.dx),
                    .M = p.M,
                    .N = p.K,
                    .K = p.N,
                    .R = inside ? p.R : 0,
                    .ld_left = p.lddy,
                    .ld_right = p.ldw,
                    .ld_low = Rp,
                    .ld_thin = p.K,
                    .by_rows = !p.W_transposed,
                    .thin_by_rows = true,
                    .add = p.add};
  const int threads = threads_worth(p.M * p.N * p.K, p.threads);
  if (own && !inside) lora_gemm(dx, buffers, threads);
  const bool update = p.dx_lora || (p.dx && !inside);
  low_rank<BlockFp32>(p, buffers, thin_of<BlockFp32>(p, buffers, update), update, {dh, nullptr});
  if (inside) lora_gemm(dx, buffers, threads);
  return Status::ok;
}

}  // namespace fused_lora
