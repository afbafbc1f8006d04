// See between.h. R numbers a row, against N + K in the products around: plain loops.
#include "between.h"

#include "walk.h"

namespace fused_lora::cpu {

Between::Between(const CpuForwardParams& p, int64_t Rp)
    : h_in(p.h_in),
      dh_ext(nullptr),
      gate(p.gate),
      gates(p.gates),
      dh_in(nullptr),
      dgate(nullptr),
      R(p.R),
      Rp(Rp),
      dtype(p.dtype),
      scaling(p.scaling) {}

Between::Between(const CpuBackwardParams& p, int64_t Rp)
    : h_in(p.h_in),
      dh_ext(p.dh),
      gate(p.gate),
      gates(p.gates),
      dh_in(p.dh_in),
      dgate(p.dgate),
      R(p.R),
      Rp(Rp),
      dtype(p.dtype),
      scaling(p.scaling) {}

void Between::add_h_in(float* h, int64_t m, int64_t rows) const {
  if (h_in) add_matrix(at(h_in, m * R, dtype), dtype, scaling, h, rows, R, Rp);
}

void Between::times_gate(float* t, int64_t m, int64_t rows) const {
  if (!gate) return;
  const int64_t width = R / gates;
  for (int64_t i = 0; i < rows; ++i) {
    float* row = t + i * Rp;
    const float* g = gate + (m + i) * gates;
    if (width == 1)
      for (int64_t r = 0; r < R; ++r) row[r] *= g[r];
    else
      for (int64_t b = 0; b < gates; ++b)
        for (int64_t r = 0; r < width; ++r) row[b * width + r] *= g[b];
  }
}

void Between::gradient(float* t, const float* ungated, int64_t m, int64_t rows) const {
  const int64_t width = dgate ? R / gates : 0;
  for (int64_t i = 0; dgate && i < rows; ++i)
    for (int64_t b = 0; b < gates; ++b) {
      float sum = 0.0f;
      for (int64_t r = b * width; r < (b + 1) * width; ++r) sum += t[i * Rp + r] * ungated[i * Rp + r];
      dgate[(m + i) * gates + b] = sum;
    }
  times_gate(t, m, rows);
  for (int64_t i = 0; i < rows * Rp; ++i) t[i] *= scaling;
  if (dh_in) store_slab(t, Rp, at(dh_in, m * R, dtype), dtype, rows, R);
  if (dh_ext) add_matrix(at(dh_ext, m * R, dtype), dtype, scaling, t, rows, R, Rp);
}

void Between::gradient_c(float* t, int64_t m, int64_t rows) const {
  times_gate(t, m, rows);
  for (int64_t i = 0; i < rows * Rp; ++i) t[i] *= scaling;
  if (dh_ext) add_matrix(at(dh_ext, m * R, dtype), dtype, scaling, t, rows, R, Rp);
}

float* scaled_rows(Buffers& buffers, const void* B, Dtype dtype, const float* c, int64_t N, int64_t R) {
  float* scaled = buffers.take(N * R);
  load_matrix(B, dtype, scaled, N, R, R);
  widest([=]() INLINED {
    for (int64_t n = 0; n < N; ++n)
      for (int64_t r = 0; r < R; ++r) scaled[n * R + r] *= c[n];
  });
  return scaled;
}

const float* times(Buffers& buffers, const float* a, const float* b, int64_t N) {
  if (!a || !b) return a ? a : b;
  float* both = buffers.take(N);
  for (int64_t n = 0; n < N; ++n) both[n] = a[n] * b[n];
  return both;
}

}  // namespace fused_lora::cpu
