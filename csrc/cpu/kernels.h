// The CPU kernels' common ground: fp32 panels. Each works on one block of rows and one panel of columns.
//
// A driver (lora.cpp) walks row blocks; every product reads a panel of x or dy as it lies or, where it is not fp32 or
// takes a dropout mask, from a copy in L2 ([kRows, kPanel] floats = 144 KiB). All products are fp32 with fp32
// accumulation.
#pragma once

#include <cstdint>

#include "lora.h"

namespace fused_lora::cpu {

constexpr int kStrip = 12;             // rows of a strip: one AVX-512 register tile or two of AVX2 (simd.h)
constexpr int kVec = 8;                // floats of one vector; R is padded to a multiple
constexpr int64_t kRows = 8 * kStrip;  // rows of a block; 24 to 192 measured alike on EPYC 9005, 2026-11-24
constexpr int64_t kPanel =
    384;  // columns of a panel: a multiple of kStrip, 2 * kVec, 2 * kLanes and Philox's 8; 192 and 576 no faster

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// shrink.cpp     out[rows, Rp] += panel[rows, cols (row stride ld)] P[cols, Rp]; rows a multiple of kStrip.
void shrink(const float* panel, int64_t ld, const float* P, float* out, int64_t rows, int64_t cols, int64_t Rp);

// wgrad.cpp      out[cols, Rp] += panel[rows, cols (row stride ld)]^T H[rows, Rp], cols rounded up to a multiple of
//                kStrip.
void wgrad(const float* panel, int64_t ld, const float* H, float* out, int64_t rows, int64_t cols, int64_t Rp);

// wgrad.cpp      out[cols] += sum over rows of panel (row stride ld): one panel's share of dbias.
void column_sums(const float* panel, int64_t ld, float* out, int64_t rows, int64_t cols);

// expand.cpp     out[kStrip, cols (row stride ldo)] += H[kStrip, Rp] Q[R, cols (row stride ldq)]; cols rounded up to a
//                multiple of 2 * kVec.
void expand(const float* H, const float* Q, float* out, int64_t ldo, int64_t cols, int64_t R, int64_t Rp, int64_t ldq);

// lora_gemm.cpp  out[M, J] = L[M, P] Q + low[M, R] S + bias, on all threads; Q [P, J] and S [R, J] where by_rows, else
//                Q [J, P] and S [J, R].
struct LoraGemm {
  const float* L;     // [M, P], row stride ldl
  const float* Q;     // row stride ldq
  const float* low;   // [M, R], row stride ldlow; R may be 0
  const float* S;     // row stride lds
  const float* bias;  // [J] or null
  float* out;         // [M, J], contiguous
  int64_t M, J, P, R, ldl, ldq, ldlow, lds;
  bool by_rows;
};
class Buffers;  // driver.h
void lora_gemm(const LoraGemm& g, Buffers& buffers, int threads);

// dropout.cpp    mask[rows, kPanel] = scale or 0 for rows row0.. and columns col0.. of the [M, K] input; col0 a
//                multiple of 8.
void dropout_mask(const Dropout& dropout, float* mask, int64_t row0, int64_t col0, int64_t rows, int64_t cols);

// convert.cpp
// out[rows, kPanel] = src[rows, cols (row stride ld)] (* mask); columns past cols and rows past rows zero, each up to a
// multiple of kStrip.
void load_panel(const void* src, Dtype dtype, int64_t ld, const float* mask, float* out, int64_t rows, int64_t cols);
// out[rows, kPanel] = bf16 src[rows, cols (row stride ld)], zero where mask[rows, kPanel] is; columns past cols and
// rows past rows zero, up to multiples of 2 * kLanes and kStrip.
void copy_panel(const uint16_t* src, int64_t ld, const float* mask, uint16_t* out, int64_t rows, int64_t cols);
// dst[0, n) = src[0, n).
void store_row(const float* src, void* dst, Dtype dtype, int64_t n);
// dst[0, n) += src[0, n) (* mask[0, n)), added in fp32 and rounded once.
void add_row(const float* src, const float* mask, void* dst, Dtype dtype, int64_t n);
// out[rows, ldo] = src[rows, cols] in fp32; columns past cols up to ldo zero.
void load_matrix(const void* src, Dtype dtype, float* out, int64_t rows, int64_t cols, int64_t ldo);
// out[cols, ldo] = src[rows, cols]^T in fp32; columns past rows up to ldo zero.
void load_transposed(const void* src, Dtype dtype, float* out, int64_t rows, int64_t cols, int64_t ldo);

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && __GNUC__ >= 10 && !defined(__clang__)
#define FUSED_LORA_BF16_DOT  // the compiler can make the code; has_bf16_dot() says whether the CPU can run it
#endif

// bf16.cpp: the same products on CPUs with AVX512-BF16, bf16 operands in pairs along the summed dimension, fp32
// accumulation. A pair is two bf16 in 32 bits, the lower index in the lower half. Ranks are padded to a multiple of
// kLanes.
constexpr int64_t kLanes = 16;  // pairs, or fp32 sums, of one AVX-512 vector
bool has_bf16_dot();
// out[pairs, cols (row stride ldo)] = (src[2p, n], src[2p + 1, n]); cols a multiple of kLanes.
void pair_rows(const uint16_t* src, int64_t ld, uint32_t* out, int64_t ldo, int64_t pairs, int64_t cols);
// out[rows, Rp] += x[rows, 2 * pairs (row stride ldx)] P[pairs, Rp]; rows a multiple of kStrip.
void shrink_bf16(const uint16_t* x, int64_t ldx, const uint32_t* P, float* out, int64_t rows, int64_t pairs,
                 int64_t Rp);
// out[Rp, cols (row stride ldo)] += H[pairs, Rp]^T x[2 * pairs, cols (row stride ldx)]; cols rounded up to a multiple
// of 2 * kLanes.
void wgrad_bf16(const uint16_t* x, int64_t ldx, const uint32_t* H, float* out, int64_t ldo, int64_t pairs, int64_t cols,
                int64_t Rp);
// out[cols] += sum over rows of x; cols rounded up to a multiple of kLanes.
void column_sums_bf16(const uint16_t* x, int64_t ldx, float* out, int64_t rows, int64_t cols);
// dst[rows, cols (row stride ldd)] += H[rows rounded up to kStrip, Rp] Q[pairs, cols (row stride ldq)] (* mask[rows,
// kPanel]).
void expand_bf16(const uint16_t* H, int64_t Rp, const uint32_t* Q, int64_t ldq, const float* mask, uint16_t* dst,
                 int64_t ldd, int64_t rows, int64_t cols, int64_t pairs);

// lora_bf16.cpp: cpu_forward and cpu_backward for bf16 x where has_bf16_dot().
Status forward_bf16(const CpuForwardParams& p);
Status backward_bf16(const CpuBackwardParams& p);

}  // namespace fused_lora::cpu
