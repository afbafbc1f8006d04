// A block of rows of bf16 x and its products in bf16, on CPUs that multiply bf16 (bf16_dot.h).
//
// Beside BlockFp32: a panel of x or dy is read where it lies; A, B, h and dh are rounded to bf16 for the products that
// follow, as every other back end does; dropout masks x to 0 or itself, and its factor joins the fp32 sums.
#pragma once

#include "bf16_dot.h"
#include "block_fp32.h"
#include "cpu_features.h"

namespace fused_lora::cpu {

#ifdef FUSED_LORA_BF16_DOT

class BlockBf16 {
 public:
  static constexpr int64_t kRanks = kLanes;         // R is padded to a multiple: Rp
  static constexpr int64_t kColumns = 2 * kLanes;   // columns of `thin` likewise
  static constexpr int64_t kGathered = 2 * kLanes;  // columns of a gradient's slab likewise
  static constexpr bool kMaskScales = false;        // a masked panel holds 0 or x itself

  // `down` [K or N, Rp] or `thin` [R, ld] in pairs of rows, [(rows + 1) / 2, ld], padded with zeros. The calling thread
  // takes the memory, any may fill it. src null: nobody will read it.
  class Factor {
   public:
    Factor(Buffers& buffers, const void* src, Dtype dtype, int64_t rows, int64_t cols, int64_t ld, bool transposed)
        : src_(src),
          dtype_(dtype),
          rows_(rows),
          cols_(cols),
          ld_(ld),
          transposed_(transposed) {
      if (!src) return;
      rounded_ = buffers.take<uint16_t>(round_up(rows, 2) * (transposed ? cols : ld));
      pairs_ = buffers.take<uint32_t>(round_up(rows, 2) / 2 * ld);
    }
    bool needs_fill() const { return src_; }
    void fill() const {
      const int64_t even = round_up(rows_, 2), pairs = even / 2;
      if (!src_) return;
      if (!transposed_) return pair_rows(rounded(rows_, cols_, even, ld_), pairs_, pairs, ld_);
      const auto* as_fp32 = rounded(cols_, rows_, cols_, even);  // 32 bits each
      load_transposed(as_fp32, Dtype::f32, reinterpret_cast<float*>(pairs_), cols_, pairs, ld_);
    }
    explicit operator bool() const { return src_; }
    const uint32_t* data() const { return pairs_; }
    int64_t ld() const { return ld_; }

   private:
    // src[rows, cols] in bf16: itself, or a copy [to_rows, to_cols] padded with zeros.
    const uint16_t* rounded(int64_t rows, int64_t cols, int64_t to_rows, int64_t to_cols) const {
      if (dtype_ == Dtype::bf16 && rows == to_rows && cols == to_cols) return static_cast<const uint16_t*>(src_);
      std::fill_n(rounded_ + rows * to_cols, (to_rows - rows) * to_cols, uint16_t{0});
      if (dtype_ == Dtype::f32 && cols == to_cols) {
        store_row(static_cast<const float*>(src_), rounded_, Dtype::bf16, rows * cols);
        return rounded_;
      }
      for (int64_t m = 0; m < rows; ++m) {
        uint16_t* to = rounded_ + m * to_cols;
        if (dtype_ == Dtype::bf16) std::copy_n(static_cast<const uint16_t*>(src_) + m * cols, cols, to);
        else store_row(static_cast<const float*>(src_) + m * cols, to, Dtype::bf16, cols);
        std::fill_n(to + cols, to_cols - cols, uint16_t{0});
      }
      return rounded_;
    }

    const void* src_;  // [rows, cols], or [cols, rows] where transposed
    Dtype dtype_;
    int64_t rows_, cols_, ld_;
    bool transposed_;
    uint16_t* rounded_ = nullptr;
    uint32_t* pairs_ = nullptr;
  };

  // Columns of the block's rows, at least to whole tiles and zero past the matrix.
  struct Panel {
    const uint16_t* data;
    int64_t ld;
  };

  // Bits of the elements that dropout keeps, [rows, columns / 32 (row stride ld)], none without it; and its factor.
  struct Keep {
    const uint32_t* bits = nullptr;
    int64_t ld = 0;
    float scale = 1.0f;
  };
  using Low = uint16_t;  // an element of low in bf16

  float* low;  // [rows, Rp] sums of h or dh

  // rows: a multiple of kStrip.
  BlockBf16(Buffers& buffers, int64_t rows, Dtype, bool dropout, int64_t R)
      : low(buffers.take(rows * round_up(R, kRanks))),
        R_(R),
        Rp_(round_up(R, kRanks)),
        size_(rows * Rp_),
        bits_(dropout ? buffers.take<uint32_t>(rows * kWords) : nullptr),
        panel_(buffers.take<uint16_t>(rows * kPanel)),
        rounded_(buffers.take<uint16_t>(size_)),
        pairs_(buffers.take<uint32_t>(size_ / 2)) {}

  void clear_low() { std::fill_n(low, size_, 0.0f); }

  // Draws which elements of the block's rows i.. are kept, which are rows row0.. and columns col0.. of x.
  void draw(const Dropout& dropout, int64_t i, int64_t row0, int64_t col0, int64_t rows, int64_t cols) {
    dropout_bits(dropout, bits_ + i * kWords, kWords, row0, col0, rows, cols);
    scale_ = dropout.scale();
  }
  Keep keep() const { return {bits_, kWords, scale_}; }
  // to[rows, cols / 32 (row stride ld)] = what was drawn.
  void copy_bits(uint32_t* to, int64_t ld, int64_t rows, int64_t cols) const {
    for (int64_t i = 0; i < rows; ++i) std::copy_n(bits_ + i * kWords, (cols + 31) / 32, to + i * ld);
  }

  // src[rows, cols (row stride ld)], 0 where it is not kept: as it lies where that serves, else a copy.
  Panel panel(const void* src, int64_t ld, Keep keep, int64_t rows, int64_t cols) {
    const auto* from = static_cast<const uint16_t*>(src);
    if (!keep.bits && rows % 2 == 0 && cols % kColumns == 0) return {from, ld};
    copy_panel(from, ld, keep.bits, keep.ld, panel_, rows, cols);
    return {panel_, kPanel};
  }

  // low += left down[n : n + cols].
  void shrink(Panel left, const Factor& down, int64_t n, int64_t rows, int64_t cols) {
    shrink_bf16(left.data, left.ld, down.data() + n / 2 * Rp_, low, rows, (cols + 1) / 2, Rp_);
  }

  // Ranks and rows of the padding become zero: an Inf beside its zeros has made them NaN.
  void scale_low(float factor, int64_t rows) {
    const int64_t size = round_up(rows, kStrip) * Rp_;
    for (int64_t i = 0; i < rows; ++i) std::fill_n(low + i * Rp_ + R_, Rp_ - R_, 0.0f);
    std::fill_n(low + rows * Rp_, size - rows * Rp_, 0.0f);
    for (int64_t i = 0; i < size; ++i) low[i] *= factor;
    store_row(low, rounded_, Dtype::bf16, size);
  }

  void store_low(void* h, int64_t rows) const {
    for (int64_t i = 0; i < rows; ++i) std::copy_n(rounded_ + i * Rp_, R_, static_cast<uint16_t*>(h) + i * R_);
  }

  // to[rows, Rp] = low in bf16.
  void copy_low(Low* to, int64_t rows) const { std::copy_n(rounded_, rows * Rp_, to); }

  // out[rows, cols (row stride ldo)] += low thin[:, n : n + cols] (* keep), with ahead[kFetches], or null.
  void expand(const Factor& thin, Keep keep, void* out, int64_t ldo, int64_t n, int64_t rows, int64_t cols,
              Fetch* ahead = nullptr) {
    expand_bf16(rounded_, Rp_, thin.data() + n, thin.ld(), keep.bits, keep.ld, keep.scale, static_cast<uint16_t*>(out),
                ldo, rows, cols, (R_ + 1) / 2, ahead);
  }

  // The right side of the next wgrads: h[rows, R] of the forward, or low.
  void gather_by_h(const void* h, int64_t rows) {
    std::fill_n(rounded_, round_up(rows, kStrip) * Rp_, uint16_t{0});
    for (int64_t i = 0; i < rows; ++i) std::copy_n(static_cast<const uint16_t*>(h) + i * R_, R_, rounded_ + i * Rp_);
    gather_by_low(rows);
  }
  void gather_by(const float* other, int64_t rows) {
    store_row(other, rounded_, Dtype::bf16, rows * Rp_);
    std::fill_n(rounded_ + rows * Rp_, (round_up(rows, kStrip) - rows) * Rp_, uint16_t{0});
    gather_by_low(rows);
  }
  void gather_by_low(int64_t rows) { pair_rows(rounded_, pairs_, (rows + 1) / 2, Rp_); }

  // slab[Rp, n : n + cols (row stride width)] += right^T left.
  void wgrad(Panel left, float* slab, int64_t width, int64_t n, int64_t rows, int64_t cols) {
    wgrad_bf16(left.data, left.ld, pairs_, slab + n, width, (rows + 1) / 2, cols, Rp_);
  }

  void column_sums(Panel left, float* out, int64_t rows, int64_t cols) {
    column_sums_bf16(left.data, left.ld, out, rows, cols);
  }

 private:
  static constexpr int64_t kWords = kPanel / 32;

  int64_t R_, Rp_, size_;  // size of low
  uint32_t* bits_;         // [rows, kWords], or null without dropout
  float scale_ = 1.0f;
  uint16_t *panel_, *rounded_;  // [rows, kPanel]; [rows, Rp] low, or h, in bf16
  uint32_t* pairs_;             // [rows / 2, Rp] rounded, rows in pairs
};

// Whether x of this dtype is multiplied in bf16.
inline bool in_bf16(Dtype dtype) { return dtype == Dtype::bf16 && features.bf16_dot; }

#else

using BlockBf16 = BlockFp32;
inline bool in_bf16(Dtype) { return false; }

#endif

}  // namespace fused_lora::cpu
