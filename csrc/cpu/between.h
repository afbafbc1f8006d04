// What the op's optional tensors do to h, and to its gradient, between shrink and expand: on rows m.. of the call, in
// fp32 [rows, Rp].
//
//   low = (h + s h_in) * gate            dh = s (gate * (dz B) + dh_ext)
//   dh_in = s gate * (dz B)              dgate = (dz B) * (h + s h_in), summed over each gate's ranks
#pragma once

#include "kernels.h"

namespace fused_lora::cpu {

struct Between {
  const void *h_in, *dh_ext;  // [M, R], dtype; or null
  const float* gate;          // [M, gates] or null
  int64_t gates;
  void* dh_in;   // [M, R], dtype; or null
  float* dgate;  // [M, gates] or null
  int64_t R, Rp;
  Dtype dtype;
  float scaling;

  Between(const CpuForwardParams& p, int64_t Rp);
  Between(const CpuBackwardParams& p, int64_t Rp);
  // Whether there is anything to do.
  explicit operator bool() const { return h_in || dh_ext || gate || dh_in || dgate; }

  void add_h_in(float* h, int64_t m, int64_t rows) const;
  void times_gate(float* t, int64_t m, int64_t rows) const;
  // t, which holds dz B, becomes dh. ungated: h + s h_in, read for dgate only.
  void gradient(float* t, const float* ungated, int64_t m, int64_t rows) const;
  // t, which holds (c * dz) B, becomes dh_c.
  void gradient_c(float* t, int64_t m, int64_t rows) const;
};

// c[N] * B[N, R] in fp32, from the buffers of a call.
class Buffers;
float* scaled_rows(Buffers& buffers, const void* B, Dtype dtype, const float* c, int64_t N, int64_t R);
// a[N] * b[N], the one that there is, or null.
const float* times(Buffers& buffers, const float* a, const float* b, int64_t N);

}  // namespace fused_lora::cpu
