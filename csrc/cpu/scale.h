// The gradient of out_scale, and dbias, which read dy as it is before out_scale: one slab a thread for each sum.
//
//   dout_scale = sum_M dy * (y - bias) / out_scale      dbias = sum_M dy      squares = sum_M (y - bias)^2
//
// The squares tell of which columns y tells too little: those are NaN and counted, and somebody else computes them.
#pragma once

#include "walk.h"

namespace fused_lora::cpu {

class ScaleSums {
 public:
  // p.dz is not read.
  ScaleSums(const CpuScaleParams& p, Buffers& buffers, int threads);
  explicit operator bool() const { return p_.dout_scale || p_.dbias; }
  void clear(int t) { sums_.clear(t), squares_.clear(t), dbias_.clear(t); }
  // A thread's share: rows m.. and columns n.. of dy and y.
  void gather(int t, int64_t m, int64_t n, int64_t rows, int64_t cols);
  void store();

 private:
  CpuScaleParams p_;
  Slabs sums_, squares_, dbias_;
  const float* bias_;  // [N] in fp32
};

// What the backward's own walk has of it.
inline CpuScaleParams scale_params(const CpuBackwardParams& p) {
  return {.dy = p.dy,
          .y = p.y,
          .bias = p.bias,
          .out_scale = p.out_scale,
          .dz = nullptr,
          .dout_scale = p.dout_scale,
          .lost = p.lost,
          .dbias = p.out_scale ? p.dbias : nullptr,
          .M = p.M,
          .N = p.N,
          .lddy = p.lddy,
          .ldy = p.ldy,
          .dtype = p.dtype,
          .threads = p.threads};
}

}  // namespace fused_lora::cpu
