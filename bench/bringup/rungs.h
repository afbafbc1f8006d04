// The rungs of bringup.cpp.
#pragma once

#include "matrix.h"

namespace bringup {

struct Sizes {
  int64_t M, N, K, R;
};

struct Case {
  Sizes sizes;
  Dtype dtype;
  int block_n;  // the tile width to run, whatever the heuristics say; 0 where there is no choice
};

constexpr int kRuns = 2;  // of each kernel, in the same memory

std::string name(const char* output, const Case& c);

// The operands of y = x W^T + h B^T, and a gradient of y.
struct Layer {
  Matrix x, W, A, B, dy;
  explicit Layer(const Sizes& s)
      : x(Matrix::random(s.M, s.K, 1)),
        W(Matrix::random(s.N, s.K, 2)),
        A(Matrix::random(s.R, s.K, 3)),
        B(Matrix::random(s.N, s.R, 4)),
        dy(Matrix::random(s.M, s.N, 5)) {}
};

// gemm.cpp       lora_gemm's forward, low given (R may be 0) or made in the launch, of the masked x with dropout; its
//                backward with what is asked for; `halves`: low by two columns of tiles, where there are two.
void gemm_forward(Report& report, const Case& c, bool makes_low, bool dropout, bool low_by_warps = false,
                  bool halves = false);
void gemm_backward(Report& report, const Case& c, bool need_B, bool need_A, bool dropout, bool halves = false);

// launches.cpp   the other kernels, and the two drivers.
void small_forward(Report& report);
void shrink_alone(Report& report);
void wgrad_alone(Report& report);
void drivers(Report& report);

}  // namespace bringup
