// Updates by an adapter of its own for each group of rows, forward and backward.
//
//   forward    h  = s_g * drop(x) A_g^T      y  += h B_g^T
//   backward   dh = s_g * dy B_g             dx += mask * (dh A_g) / (1 - p_g)
//              dA_g = dh^T drop(x)           dB_g = dy^T h
//
// A task is a piece of a group's rows, with factors packed for it alone: so many adapters cost one adapter's scratch,
// and each its own rank. A second round of tasks, one for a panel of columns of one gradient, walks all the rows of
// its group, so sums have one order whatever the number of threads is. Tasks go to whichever thread is free.
// Rows that lie in a run are read and updated in place; scattered ones, a block's panel at a time, through a copy.
#include <array>

#include "block_bf16.h"
#include "block_fp32.h"
#include "grouped.h"

namespace fused_lora::cpu {
namespace {

constexpr int64_t kRun = 2 * kStrip;  // rows that make a block of their own; of shorter runs a block is gathered

// Positions m .. m + rows of a group, and whether their rows lie one after the other.
struct Span {
  int64_t m, rows;
  bool run;
};

class Rows {
 public:
  explicit Rows(const CpuGroups& p) : rows_(p.rows) {}
  int64_t operator[](int64_t m) const { return rows_ ? rows_[m] : m; }

  // The next block of positions m .. end.
  Span block(int64_t m, int64_t end) const {
    const int64_t most = std::min(kRows, end - m);
    int64_t run = rows_ ? 1 : most;
    while (run < most && rows_[m + run] == rows_[m] + run) ++run;
    return run >= kRun || run == most ? Span{m, run, true} : Span{m, most, false};
  }

 private:
  const int64_t* rows_;
};

// What a thread multiplies the rows of groups of rank R with: a Block, and a copy for rows that are scattered.
template <class Block> class Walker {
 public:
  Walker(const CpuGroups& p, int64_t R, int64_t rows, Buffers& buffers)
      : p_(p),
        rows_(p),
        R_(R),
        block(buffers, std::min(kRows, round_up(rows, kStrip)), p.dtype, p.thresholds, R),
        scattered_(p.rows ? buffers.take<char>(kRows * kPanel * item_size(p.dtype)) : nullptr),
        low_(R < p.R ? buffers.take<char>(kRows * R * item_size(p.dtype)) : nullptr) {}

  // Draws dropout's mask for a panel of x; none without dropout.
  typename Block::Keep draw(const Dropout& dropout, const Span& at, int64_t k, int64_t cols) {
    if (dropout.threshold == 0) return {};
    if (at.run) block.draw(dropout, 0, rows_[at.m], k, at.rows, cols);
    else
      for (int64_t i = 0; i < at.rows; ++i) block.draw(dropout, i, rows_[at.m + i], k, 1, cols);
    return block.keep();
  }

  typename Block::Panel panel(const void* src, int64_t ld, typename Block::Keep keep, const Span& at, int64_t n,
                              int64_t cols) {
    if (at.run) return block.panel(cpu::at(src, rows_[at.m] * ld + n, p_.dtype), ld, keep, at.rows, cols);
    gather(src, ld, at, n, cols);
    return block.panel(scattered_, kPanel, keep, at.rows, cols);
  }

  // dst[rows, n : n + cols (row stride ld)] += low thin (* keep), with ahead[kFetches].
  void expand(const typename Block::Factor& thin, typename Block::Keep keep, void* dst, int64_t ld, const Span& at,
              int64_t n, int64_t cols, Fetch* ahead) {
    if (at.run)
      return block.expand(thin, keep, cpu::at(dst, rows_[at.m] * ld + n, p_.dtype), ld, n, at.rows, cols, ahead);
    gather(dst, ld, at, n, cols);
    block.expand(thin, keep, scattered_, kPanel, n, at.rows, cols, ahead);
    for (int64_t i = 0; i < at.rows; ++i)
      std::copy_n(cpu::at(scattered_, i * kPanel, p_.dtype), cols * item_size(p_.dtype),
                  cpu::at(dst, rows_[at.m + i] * ld + n, p_.dtype));
  }

  // h[m .. m + rows, R] = low, zero past the group's rank; and back, as the right side of the next wgrads.
  void store_low(void* h, const Span& at) {
    char* to = cpu::at(h, at.m * p_.R, p_.dtype);
    block.store_low(low_ ? low_ : to, at.rows);
    const int64_t size = item_size(p_.dtype);
    for (int64_t i = 0; low_ && i < at.rows; ++i) {
      std::copy_n(low_ + i * R_ * size, R_ * size, to + i * p_.R * size);
      std::fill_n(to + (i * p_.R + R_) * size, (p_.R - R_) * size, char{0});
    }
  }
  void gather_by(const void* h, const Span& at) {
    const char* from = cpu::at(h, at.m * p_.R, p_.dtype);
    const int64_t size = item_size(p_.dtype);
    for (int64_t i = 0; low_ && i < at.rows; ++i) std::copy_n(from + i * p_.R * size, R_ * size, low_ + i * R_ * size);
    block.gather_by_h(low_ ? low_ : from, at.rows);
  }

 private:
  void gather(const void* src, int64_t ld, const Span& at, int64_t n, int64_t cols) {
    for (int64_t i = 0; i < at.rows; ++i)
      std::copy_n(cpu::at(src, rows_[at.m + i] * ld + n, p_.dtype), cols * item_size(p_.dtype),
                  cpu::at(scattered_, i * kPanel, p_.dtype));
  }

  const CpuGroups& p_;
  Rows rows_;
  int64_t R_;

 public:
  Block block;

 private:
  char *scattered_, *low_;  // [kRows, kPanel], or null without `rows`; [kRows, R_g], or null where that is R
};

template <class Block> struct OnBlocks {
  static constexpr int64_t kWidth = kPanel;  // columns of a strip
  static void by_rows(const CpuGroups& p, const RowsPass& pass, int threads);
  static void gradient(const CpuGroupedBackwardParams& p, const void* dh, const Strip& strip);
};

template <class Block> void OnBlocks<Block>::by_rows(const CpuGroups& p, const RowsPass& pass, int threads) {
  using Factor = typename Block::Factor;
  const std::vector<Piece> work = pieces(p, threads);
  const Rows rows(p);
  // The factors of the piece that this thread, as a rule, takes after piece i, to be fetched while it updates `out`:
  // adapters being many, they come from memory. The forward takes 16 % less, the backward 5 (EPYC 9005, 2026-11-27).
  const auto factors_after = [&](int64_t i, int64_t tiles) -> std::array<Fetch, kFetches> {
    if (!pass.out || i + threads >= static_cast<int64_t>(work.size())) return {};
    const int64_t g = work[static_cast<size_t>(i + threads)].g;
    const auto whole = [&](const void* factor, int64_t width) -> Fetch {
      const auto* from = static_cast<const char*>(factor);
      const int64_t size = width * p.ranks[g] * item_size(p.adapter_dtype);
      return {from, from + size, round_up((size + tiles - 1) / tiles, 64)};
    };
    return {whole(pass.down[g], pass.cols_in), whole(pass.thin[g], pass.cols_out)};
  };
  run_tasks(static_cast<int64_t>(work.size()), threads, [&](int64_t i) {
    const auto [g, begin, end] = work[static_cast<size_t>(i)];
    const int64_t R = p.ranks[g];
    const bool turned = !pass.backward;
    Buffers buffers;
    const Factor down(buffers, pass.down[g], p.adapter_dtype, pass.cols_in, R, round_up(R, Block::kRanks), turned),
        thin(buffers, pass.out ? pass.thin[g] : nullptr, p.adapter_dtype, R, pass.cols_out,
             round_up(pass.cols_out, Block::kColumns), turned);
    down.fill(), thin.fill();
    Walker<Block> walker(p, R, end - begin, buffers);
    const Dropout dropout = dropout_of(p, g), none{};
    const Dropout &of_in = pass.backward ? none : dropout, &of_out = pass.backward ? dropout : none;
    const float factor = p.scaling[g] * (Block::kMaskScales ? 1.0f : of_in.scale());
    auto ahead = factors_after(i, (end - begin + kStrip - 1) / kStrip * ((pass.cols_out + 15) / 16));
    for (int64_t m = begin; m < end;) {
      const Span at = rows.block(m, end);
      walker.block.clear_low();
      for (int64_t k = 0; k < pass.cols_in; k += kPanel) {
        const int64_t cols = std::min(kPanel, pass.cols_in - k);
        const auto keep = walker.draw(of_in, at, k, cols);
        walker.block.shrink(walker.panel(pass.in, pass.ld_in, keep, at, k, cols), down, k, at.rows, cols);
      }
      walker.block.scale_low(factor, at.rows);
      if (pass.low) walker.store_low(pass.low, at);
      for (int64_t n = 0; thin && n < pass.cols_out; n += kPanel) {
        const int64_t cols = std::min(kPanel, pass.cols_out - n);
        walker.expand(thin, walker.draw(of_out, at, n, cols), pass.out, pass.cols_out, at, n, cols, ahead.data());
      }
      m += at.rows;
    }
  });
}

// A strip of dA [R, K] or dB [N, R].
template <class Block>
void OnBlocks<Block>::gradient(const CpuGroupedBackwardParams& p, const void* dh, const Strip& strip) {
  const auto [is_A, first, end, n, cols] = strip;
  const int64_t R = p.ranks[first], Rp = round_up(R, Block::kRanks), width = round_up(cols, Block::kGathered),
                size = Rp * width;
  const bool several = end - first > 1;
  const Rows rows(p);
  Buffers buffers;
  float *slab = buffers.take(size), *sum = several ? buffers.take(size) : slab;
  std::fill_n(sum, size, 0.0f);
  int64_t most = 0;
  for (int64_t g = first; g < end; ++g) most = std::max(most, p.offsets[g + 1] - p.offsets[g]);
  Walker<Block> walker(p, R, std::max<int64_t>(most, 1), buffers);
  for (int64_t g = first; g < end; ++g) {
    if (p.offsets[g] == p.offsets[g + 1]) continue;
    const Dropout dropout = dropout_of(p, g);
    if (several) std::fill_n(slab, size, 0.0f);
    for (int64_t m = p.offsets[g]; m < p.offsets[g + 1];) {
      const Span at = rows.block(m, p.offsets[g + 1]);
      walker.gather_by(is_A ? dh : p.h, at);
      const auto keep = is_A ? walker.draw(dropout, at, n, cols) : typename Block::Keep{};
      const auto panel = walker.panel(is_A ? p.x : p.dy, is_A ? p.ldx : p.lddy, keep, at, n, cols);
      walker.block.wgrad(panel, slab, width, 0, at.rows, cols);
      m += at.rows;
    }
    const float factor = is_A && !Block::kMaskScales ? dropout.scale() : 1.0f;
    if (several)
      for (int64_t i = 0; i < size; ++i) sum[i] += factor * slab[i];
    else if (factor != 1.0f)
      for (int64_t i = 0; i < size; ++i) slab[i] *= factor;
  }
  if (is_A) {
    for (int64_t r = 0; r < R; ++r)
      store_row(sum + r * width, at(p.dA[first], r * p.K + n, p.adapter_dtype), p.adapter_dtype, cols);
    return;
  }
  char* dst = at(p.dB[first], n * R, p.adapter_dtype);
  const bool as_it_lies = p.adapter_dtype == Dtype::f32 && R == Rp && cols == width;
  float* turned = as_it_lies ? reinterpret_cast<float*>(dst) : buffers.take(size);
  load_transposed(sum, Dtype::f32, turned, Rp, width, Rp);
  if (!as_it_lies) store_slab(turned, Rp, dst, p.adapter_dtype, cols, R);
}

template <class Walk> void forward(const CpuGroupedForwardParams& p) {
  const RowsPass y{.backward = false,
                   .in = p.x,
                   .down = p.A,
                   .thin = p.B,
                   .low = p.h,
                   .out = p.y,
                   .ld_in = p.ldx,
                   .cols_in = p.K,
                   .cols_out = p.N};
  Walk::by_rows(p, y, threads_of(p));
}

template <class Walk> void backward(const CpuGroupedBackwardParams& p) {
  const int threads = threads_of(p);
  const int64_t M = p.offsets[p.G];
  const Lines kept(p.dA ? static_cast<size_t>(M * p.R * item_size(p.dtype)) : 0);
  void* dh = p.dA ? kept.data() : nullptr;
  if (p.dA && M && !dh) throw std::bad_alloc();
  const RowsPass dx{.backward = true,
                    .in = p.dy,
                    .down = p.B,
                    .thin = p.A,
                    .low = dh,
                    .out = p.dx,
                    .ld_in = p.lddy,
                    .cols_in = p.N,
                    .cols_out = p.K};
  if (p.dA || p.dx) Walk::by_rows(p, dx, threads);
  const std::vector<Strip> work = strips(p, Walk::kWidth);
  run_tasks(static_cast<int64_t>(work.size()), threads,
            [&](int64_t i) { Walk::gradient(p, dh, work[static_cast<size_t>(i)]); });
}

Status check(const CpuGroups& p) {
  if (!known_dtypes(p.dtype, p.adapter_dtype)) return Status::bad_dtype;
  return p.G < 1 || p.N < 1 || p.K < 1 || p.R < 1 ? Status::bad_shape : Status::ok;
}

}  // namespace
}  // namespace fused_lora::cpu

namespace fused_lora {
using namespace cpu;

Status cpu_grouped_forward(const CpuGroupedForwardParams& p) {
  if (const Status status = check(static_cast<const CpuGroups&>(p)); status != Status::ok) return status;
#ifdef FUSED_LORA_AMX
  if (p.dtype == Dtype::bf16 && features.amx) return forward<OnTiles>(p), Status::ok;
#endif
  in_bf16(p.dtype) ? forward<OnBlocks<BlockBf16>>(p) : forward<OnBlocks<BlockFp32>>(p);
  return Status::ok;
}

Status cpu_grouped_backward(const CpuGroupedBackwardParams& p) {
  if (const Status status = check(static_cast<const CpuGroups&>(p)); status != Status::ok) return status;
#ifdef FUSED_LORA_AMX
  if (p.dtype == Dtype::bf16 && features.amx) return backward<OnTiles>(p), Status::ok;
#endif
  in_bf16(p.dtype) ? backward<OnBlocks<BlockBf16>>(p) : backward<OnBlocks<BlockFp32>>(p);
  return Status::ok;
}

}  // namespace fused_lora
