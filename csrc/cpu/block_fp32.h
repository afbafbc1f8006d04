// A block of rows and its products in fp32, for x of any dtype.
#pragma once

#include "walk.h"

namespace fused_lora::cpu {

class BlockFp32 {
 public:
  static constexpr int64_t kRanks = kVec;        // R is padded to a multiple: Rp
  static constexpr int64_t kColumns = 2 * kVec;  // columns of `thin` likewise
  static constexpr int64_t kGathered = kLanes;   // columns of a gradient's slab likewise
  static constexpr bool kMaskScales = true;      // a masked panel holds dropout's factor

  // `down` [K or N, Rp] or `thin` [R, ld], its rows the summed dimension: src itself where it lies so, else a copy
  // padded with zeros. The calling thread takes the memory, any may fill it. src null: nobody will read it.
  class Factor {
   public:
    Factor(Buffers& buffers, const void* src, Dtype dtype, int64_t rows, int64_t cols, int64_t ld, bool transposed)
        : src_(src),
          dtype_(dtype),
          rows_(rows),
          cols_(cols),
          ld_(ld),
          transposed_(transposed) {
      const bool as_it_lies = !transposed && dtype == Dtype::f32 && cols == ld;
      if (src && !as_it_lies) copy_ = buffers.take(rows * ld);
    }
    bool needs_fill() const { return copy_; }
    void fill() const {
      if (copy_ && transposed_) load_transposed(src_, dtype_, copy_, cols_, rows_, ld_);
      else if (copy_) load_matrix(src_, dtype_, copy_, rows_, cols_, ld_);
    }
    explicit operator bool() const { return src_; }
    const float* data() const { return copy_ ? copy_ : static_cast<const float*>(src_); }
    int64_t ld() const { return ld_; }

   private:
    const void* src_;  // [rows, cols], or [cols, rows] where transposed
    Dtype dtype_;
    int64_t rows_, cols_, ld_;
    bool transposed_;
    float* copy_ = nullptr;
  };

  // Columns of the block's rows, at least to whole tiles and zero past the matrix.
  struct Panel {
    const float* data;
    int64_t ld;
  };

  using Keep = const float*;  // [rows, kPanel] dropout's factor or 0; or null
  using Low = float;          // an element of low

  float* low;  // [rows, Rp] h or dh

  BlockFp32(Buffers& buffers, int64_t rows, Dtype dtype, bool dropout, int64_t R)
      : low(buffers.take(rows * round_up(R, kRanks))),
        dtype_(dtype),
        R_(R),
        Rp_(round_up(R, kRanks)),
        size_(rows * Rp_),
        mask_(dropout ? buffers.take(rows * kPanel) : nullptr),
        panel_(buffers.take(rows * kPanel)),
        strip_(buffers.take(kStrip * kPanel)),
        h_(buffers.take(size_)) {}

  void clear_low() { std::fill_n(low, size_, 0.0f); }

  // Draws the mask of the block's rows i.., which are rows row0.. and columns col0.. of x.
  void draw(const Dropout& dropout, int64_t i, int64_t row0, int64_t col0, int64_t rows, int64_t cols) {
    dropout_mask(dropout, mask_ + i * kPanel, row0, col0, rows, cols);
  }
  Keep keep() const { return mask_; }

  // src[rows, cols (row stride ld)] (* keep): as it lies where that serves, else a copy.
  Panel panel(const void* src, int64_t ld, Keep keep, int64_t rows, int64_t cols) {
    if (dtype_ == Dtype::f32 && !keep && cols % kLanes == 0) return {static_cast<const float*>(src), ld};
    load_panel(src, dtype_, ld, keep, panel_, rows, cols);
    return {panel_, kPanel};
  }

  // low += left down[n : n + cols].
  void shrink(Panel left, const Factor& down, int64_t n, int64_t rows, int64_t cols) {
    cpu::shrink(left.data, left.ld, down.data() + n * Rp_, low, rows, cols, Rp_);
  }

  void scale_low(float factor, int64_t rows) {
    for (int64_t i = 0; i < rows * Rp_; ++i) low[i] *= factor;
  }

  void store_low(void* h, int64_t rows) const { store_slab(low, Rp_, h, dtype_, rows, R_); }
  // to[rows, Rp] = low.
  void copy_low(Low* to, int64_t rows) const { std::copy_n(low, rows * Rp_, to); }

  // out[rows, cols (row stride ldo)] += low thin[:, n : n + cols] (* keep), with ahead[kFetches], or null.
  void expand(const Factor& thin, Keep keep, void* out, int64_t ldo, int64_t n, int64_t rows, int64_t cols,
              Fetch* ahead = nullptr) {
    // whole register tiles of columns are updated where they lie
    const int64_t direct = dtype_ == Dtype::f32 && !keep ? cols / kColumns * kColumns : 0;
    const float* right = thin.data() + n;
    if (direct) cpu::expand(low, right, static_cast<float*>(out), ldo, rows, direct, R_, Rp_, thin.ld(), ahead);
    for (int64_t m = 0; direct < cols && m < rows; m += kStrip) {
      const int64_t height = std::min<int64_t>(kStrip, rows - m);
      expand_strip(low + m * Rp_, right + direct, strip_, height, cols - direct, R_, Rp_, thin.ld());
      for (int64_t i = 0; i < height; ++i)
        add_row(strip_ + i * kPanel, keep ? keep + (m + i) * kPanel : nullptr, at(out, (m + i) * ldo + direct, dtype_),
                dtype_, cols - direct);
    }
  }

  // The right side of the next wgrads: h[rows, R] of the forward, or low.
  void gather_by_h(const void* h, int64_t rows) {
    load_matrix(h, dtype_, h_, rows, R_, Rp_);
    right_ = h_;
  }
  void gather_by_low(int64_t) { right_ = low; }
  // Or any other [rows, Rp], which must stay until they are done.
  void gather_by(const float* other, int64_t) { right_ = other; }

  // slab[Rp, n : n + cols (row stride width)] += right^T left.
  void wgrad(Panel left, float* slab, int64_t width, int64_t n, int64_t rows, int64_t cols) {
    cpu::wgrad(left.data, left.ld, right_, slab + n, width, rows, cols, Rp_);
  }

  void column_sums(Panel left, float* out, int64_t rows, int64_t cols) {
    cpu::column_sums(left.data, left.ld, out, rows, cols);
  }

 private:
  Dtype dtype_;
  int64_t R_, Rp_, size_;               // size of low
  float *mask_, *panel_, *strip_, *h_;  // [rows, kPanel], null without dropout, and again; [kStrip, kPanel]; [rows, Rp]
  const float* right_ = nullptr;
};

}  // namespace fused_lora::cpu
