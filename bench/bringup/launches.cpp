// The kernels beside lora_gemm, and the drivers that put all of them in order.
#include <algorithm>
#include <cstdio>

#include "cuda/plans.h"
#include "rungs.h"

namespace bringup {

using namespace fused_lora;

std::string name(const char* output, const Case& c) {
  char text[160];
  std::snprintf(text, sizeof text, "%s, %s, M=%lld N=%lld K=%lld R=%lld, tiles %d wide", output,
                c.dtype == Dtype::bf16 ? "bf16" : "fp16", static_cast<long long>(c.sizes.M),
                static_cast<long long>(c.sizes.N), static_cast<long long>(c.sizes.K), static_cast<long long>(c.sizes.R),
                c.block_n);
  return text;
}

void small_forward(Report& report) {
  for (const Dtype dtype : {Dtype::bf16, Dtype::f16})
    for (const Sizes s :
         {Sizes{1, 8, 64, 8}, {16, 136, 1000, 16}, {17, 264, 136, 12}, {50, 392, 1160, 64}, {128, 648, 520, 40}}) {
      const Case c{s, dtype, kSmallCols};
      const Layer layer(s);
      const Matrix h = layer.x.times(layer.A.transposed());
      const Matrix y = layer.x.times(layer.W.transposed()).plus(h.times(layer.B.transposed()));
      const int64_t Rp = padded_rank(s.R);
      const Device x(layer.x, dtype), W(layer.W, dtype), A(layer.A, dtype), B(layer.B, dtype, Rp);
      Device out(s.M, s.N, dtype), low(s.M, s.R, dtype, Rp);
      const SmallConfig config = small_config(s.M, s.N, s.K, s.R, multiprocessors());
      for (int run = 0; run < kRuns; ++run) {
        out.poison(), low.poison();
        Target target{0, nullptr};
        must(lora_gemm_small(config,
                             {.x = x.get(),
                              .W = W.get(),
                              .A = A.get(),
                              .B = B.get(),
                              .bias = nullptr,
                              .h = low.get(),
                              .y = out.get(),
                              .M = s.M,
                              .N = s.N,
                              .K = s.K,
                              .R = s.R,
                              .ldx = s.K,
                              .ldw = s.K,
                              .scale = 1.0f,
                              .dtype = dtype},
                             target),
             "lora_gemm_small");
        finish("lora_gemm_small");
        compare(report, name("y", c), out.read(), y);
        compare(report, name("h", c), low.read(), h);
      }
    }
}

void shrink_alone(Report& report) {
  for (const Dtype dtype : {Dtype::bf16, Dtype::f16})
    for (const bool down_mn : {false, true})
      for (const Sizes s :
           {Sizes{129, 8, 200, 16}, {300, 8, 328, 64}, {1000, 8, 136, 12}, {33, 8, 1104, 32}, {65, 8, 4104, 16}}) {
        const Case c{s, dtype, 0};
        const Matrix left = Matrix::random(s.M, s.K, 1), down = Matrix::random(s.R, s.K, 3);
        const int64_t Rp = padded_rank(s.R);
        const Device x(left, dtype), A(down_mn ? down.transposed() : down, dtype, down_mn ? Rp : s.K);
        Device low(s.M, s.R, dtype, Rp);
        for (int run = 0; run < kRuns; ++run) {
          low.poison();
          Target target{0, nullptr};
          must(shrink({.left = x.get(),
                       .down = A.get(),
                       .low = low.get(),
                       .M = s.M,
                       .K = s.K,
                       .R = s.R,
                       .ld_left = s.K,
                       .ld_down = A.ld(),
                       .down_mn = down_mn,
                       .scale = 1.0f,
                       .dtype = dtype,
                       .sms = multiprocessors()},
                      target),
               "shrink");
          finish("shrink");
          compare(report, name(down_mn ? "low (down K-major)" : "low", c), low.read(), left.times(down.transposed()));
        }
      }
}

void wgrad_alone(Report& report) {
  for (const Dtype dtype : {Dtype::bf16, Dtype::f16})
    for (const Sizes s : {Sizes{129, 136, 0, 16}, {600, 264, 0, 64}, {1000, 72, 0, 12}}) {
      const Case c{s, dtype, 0};
      const Matrix left = Matrix::random(s.M, s.N, 5), low = Matrix::random(s.M, s.R, 6);
      const int64_t Rp = padded_rank(s.R);
      const Device dy(left, dtype), h(low, dtype, Rp);
      const WgradConfig config = wgrad_config(s.M, ceil_div(s.N, kWgradCols), s.R, multiprocessors());
      Device slabs(config.splits, s.N * s.R, Dtype::f32), sums(config.splits, s.N, Dtype::f32);
      Device dB(s.N, s.R, Dtype::f32), dbias(1, s.N, dtype);
      Matrix columns(1, s.N);
      for (int64_t r = 0; r < s.M; ++r)
        for (int64_t n = 0; n < s.N; ++n) columns.at(0, n) += left.at(r, n);
      WgradParams p{.count = 1, .M = s.M, .R = s.R, .dtype = dtype, .out_dtype = Dtype::f32};
      p.jobs[0] = {.left = dy.get(),
                   .low = h.get(),
                   .slabs = slabs.floats(),
                   .sum_slabs = sums.floats(),
                   .out = dB.get(),
                   .column_sums = dbias.get(),
                   .C = s.N,
                   .ld_left = s.N,
                   .ld_low = Rp,
                   .scale = 1.0f};
      for (int run = 0; run < kRuns; ++run) {
        dB.poison(), dbias.poison(), slabs.poison(), sums.poison();
        Target target{0, nullptr};
        must(wgrad(config, p, target), "wgrad");
        finish("wgrad");
        compare(report, name("dB", c), dB.read(), left.transposed().times(low));
        compare(report, name("dbias", c), dbias.read(), columns);
      }
    }
}

void drivers(Report& report) {
  for (const Dtype dtype : {Dtype::bf16, Dtype::f16})
    for (const Sizes s : {Sizes{17, 264, 136, 12}, {300, 520, 328, 16}, {600, 264, 136, 100}}) {
      const Case c{s, dtype, 0};
      const Layer layer(s);
      const Matrix h = layer.x.times(layer.A.transposed()), dh = layer.dy.times(layer.B);
      const int64_t Rp = padded_rank(s.R);
      const int sms = multiprocessors();
      const Device x(layer.x, dtype), W(layer.W, dtype), A(layer.A, Dtype::f32), B(layer.B, Dtype::f32);
      const Device dy(layer.dy, dtype);
      Device y(s.M, s.N, dtype), low(s.M, s.R, dtype, Rp), dx(s.M, s.K, dtype);
      Device dA(s.R, s.K, Dtype::f32), dB(s.N, s.R, Dtype::f32);
      const ForwardPlan forward = forward_plan({s.M, s.N, s.K, s.R, dtype, Dtype::f32, false, sms});
      const BackwardPlan backward = backward_plan({.M = s.M,
                                                   .N = s.N,
                                                   .K = s.K,
                                                   .R = s.R,
                                                   .dtype = dtype,
                                                   .adapter_dtype = Dtype::f32,
                                                   .dropout = false,
                                                   .need_x = true,
                                                   .need_A = true,
                                                   .need_B = true,
                                                   .need_bias = false,
                                                   .deterministic = false,
                                                   .sms = sms});
      Device workspace(1, std::max(forward.bytes, backward.bytes) / 4 + 4, Dtype::f32);
      for (int run = 0; run < kRuns; ++run) {
        y.poison(), low.poison(), dx.poison(), dA.poison(), dB.poison(), workspace.poison();
        must(cuda_forward({.x = x.get(),
                           .W = W.get(),
                           .A = A.get(),
                           .B = B.get(),
                           .bias = nullptr,
                           .h = low.get(),
                           .y = y.get(),
                           .workspace = workspace.get(),
                           .workspace_bytes = forward.bytes,
                           .M = s.M,
                           .N = s.N,
                           .K = s.K,
                           .R = s.R,
                           .ldx = s.K,
                           .ldw = s.K,
                           .dtype = dtype,
                           .adapter_dtype = Dtype::f32,
                           .scaling = 1.0f,
                           .dropout = {},
                           .device = 0,
                           .stream = nullptr}),
             "cuda_forward");
        finish("cuda_forward");
        workspace.poison();
        must(cuda_backward({.dy = dy.get(),
                            .x = x.get(),
                            .W = W.get(),
                            .A = A.get(),
                            .B = B.get(),
                            .h = low.get(),
                            .dx = dx.get(),
                            .dA = dA.get(),
                            .dB = dB.get(),
                            .dbias = nullptr,
                            .workspace = workspace.get(),
                            .workspace_bytes = backward.bytes,
                            .M = s.M,
                            .N = s.N,
                            .K = s.K,
                            .R = s.R,
                            .lddy = s.N,
                            .ldx = s.K,
                            .ldw = s.K,
                            .ldh = Rp,
                            .dtype = dtype,
                            .adapter_dtype = Dtype::f32,
                            .scaling = 1.0f,
                            .dropout = {},
                            .deterministic = false,
                            .device = 0,
                            .stream = nullptr}),
             "cuda_backward");
        finish("cuda_backward");
        compare(report, name("y", c), y.read(),
                layer.x.times(layer.W.transposed()).plus(h.times(layer.B.transposed())));
        compare(report, name("dx", c), dx.read(), layer.dy.times(layer.W).plus(dh.times(layer.A)));
        compare(report, name("dA", c), dA.read(), dh.transposed().times(layer.x));
        compare(report, name("dB", c), dB.read(), layer.dy.transposed().times(h));
      }
    }
}

}  // namespace bringup
