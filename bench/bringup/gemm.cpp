// lora_gemm's instances, one piece after another.
#include <algorithm>
#include <cstring>

#include "rungs.h"

namespace bringup {

using namespace fused_lora;

namespace {

constexpr int64_t kSeed = 1234567890123;
constexpr uint32_t kThreshold = 32768;  // p = 1/2: the factor is 2
// The seed as the two fp32 numbers that have its bits.
Matrix seed_bits() {
  Matrix m(1, 2);
  std::memcpy(m.values.data(), &kSeed, sizeof kSeed);
  return m;
}

// What heuristics.h plans, with tiles of the width that the case asks for.
GemmConfig config_for(const Case& c, int64_t out_cols, bool makes_low, bool dropout, bool backward, bool gradients,
                      bool low_by_warps, bool halves) {
  return gemm_config({.M = c.sizes.M,
                      .N = out_cols,
                      .R = c.sizes.R,
                      .sms = multiprocessors(),
                      .makes_low = makes_low,
                      .dropout = dropout,
                      .backward = backward,
                      .gradients = gradients,
                      .block_n = c.block_n,
                      .low_by_warps = low_by_warps,
                      .halves = halves});
}

void run_gemm(const GemmConfig& config, const GemmParams& p, Device& control) {
  control.clear();
  Target target{0, nullptr};
  must(lora_gemm(config, p, target), "lora_gemm");
  finish("lora_gemm");
}

Device control_for(const GemmConfig& config) {
  return Device(1, std::max<int64_t>(control_bytes(config), 4) / 4, Dtype::f32);
}
Device low_sums_for(const GemmConfig& config) {
  return Device(1, std::max<int64_t>(low_sums_bytes(config), 4) / 4, Dtype::f32);
}

}  // namespace

// The forward GEMM: low is given, or made in the launch, of the masked x if `dropout`.
void gemm_forward(Report& report, const Case& c, bool makes_low, bool dropout, bool low_by_warps, bool halves) {
  const auto [M, N, K, R] = c.sizes;
  const Layer layer(c.sizes);
  const Device seed(seed_bits(), Dtype::f32);
  const Matrix h = (dropout ? layer.x.dropped(kSeed, kThreshold) : layer.x).times(layer.A.transposed());
  Matrix y = layer.x.times(layer.W.transposed());
  if (R) y = y.plus(h.times(layer.B.transposed()));
  const int64_t Rp = padded_rank(R);
  const Device x(layer.x, c.dtype), W(layer.W, c.dtype), A(layer.A, c.dtype), B(layer.B, c.dtype, Rp);
  Device low = makes_low ? Device(M, R, c.dtype, Rp) : Device(h, c.dtype, Rp);
  Device out(M, N, c.dtype);
  const GemmConfig config = config_for(c, N, makes_low, dropout, false, false, low_by_warps, halves);
  Device control = control_for(config), low_sums = low_sums_for(config);
  const GemmParams p{.left = x.get(),
                     .right = W.get(),
                     .thin = R ? B.get() : nullptr,
                     .down = A.get(),
                     .low = low.get(),
                     .out = out.get(),
                     .control = control.ints(),
                     .low_sums = low_sums.floats(),
                     .ld_left = K,
                     .ld_right = K,
                     .ld_thin = Rp,
                     .ld_down = K,
                     .ld_low = Rp,
                     .ld_out = N,
                     .M = M,
                     .N = N,
                     .K = K,
                     .R = R,
                     .alpha = 1.0f,
                     .scale = dropout ? 2.0f : 1.0f,
                     .dropout = dropout ? Dropout{static_cast<const int64_t*>(seed.get()), kThreshold} : Dropout{},
                     .dtype = c.dtype};
  for (int run = 0; run < kRuns; ++run) {
    out.poison();
    low_sums.poison();
    if (makes_low) low.poison();
    run_gemm(config, p, control);
    compare(report, name("y", c), out.read(), y);
    if (makes_low) compare(report, name("h", c), low.read(), h);
  }
}

// The backward GEMM: dh and dx, and with them dB and dA, under a mask or not.
void gemm_backward(Report& report, const Case& c, bool need_B, bool need_A, bool dropout, bool halves) {
  const auto [M, N, K, R] = c.sizes;
  const Layer layer(c.sizes);
  const Device seed(seed_bits(), Dtype::f32);
  const Matrix x_dropped = dropout ? layer.x.dropped(kSeed, kThreshold) : layer.x;
  const Matrix h = x_dropped.times(layer.A.transposed()), dh = layer.dy.times(layer.B);
  const Matrix low_term = dh.times(layer.A);
  const Matrix dx = layer.dy.times(layer.W).plus(dropout ? low_term.dropped(kSeed, kThreshold) : low_term);
  const int64_t Rp = padded_rank(R);
  const Device dy(layer.dy, c.dtype), W(layer.W, c.dtype), A(layer.A, c.dtype), B(layer.B, c.dtype, Rp);
  const Device x(layer.x, c.dtype), saved_h(h, c.dtype, Rp);
  Device out(M, K, c.dtype), low(M, R, c.dtype, Rp), dA(R, K, Dtype::f32), dB(N, R, Dtype::f32);
  const GemmConfig config = config_for(c, K, true, dropout, true, need_A || need_B, false, halves);
  const bool gradients = config.kind.gradients;  // not with every mask
  Device control = control_for(config), low_sums = low_sums_for(config);
  Device mask(M, mask_words(K), Dtype::f32);  // its words are 32 bits each
  const Dropout drop = dropout ? Dropout{static_cast<const int64_t*>(seed.get()), kThreshold} : Dropout{};
  if (dropout) {
    Target target{0, nullptr};
    must(prepare({.mask = static_cast<uint32_t*>(mask.get()),
                  .dropout = drop,
                  .M = M,
                  .N = 8,
                  .K = K,
                  .R = R,
                  .dtype = c.dtype,
                  .adapter_dtype = c.dtype},
                 target),
         "prepare");
  }
  const GemmParams p{.left = dy.get(),
                     .right = W.get(),
                     .thin = A.get(),
                     .down = B.get(),
                     .low = low.get(),
                     .out = out.get(),
                     .h = saved_h.get(),
                     .x = x.get(),
                     .dB = need_B && gradients ? dB.floats() : nullptr,
                     .dA = need_A && gradients ? dA.floats() : nullptr,
                     .control = control.ints(),
                     .low_sums = low_sums.floats(),
                     .mask = static_cast<const uint32_t*>(mask.get()),
                     .ld_left = N,
                     .ld_right = K,
                     .ld_thin = K,
                     .ld_down = Rp,
                     .ld_low = Rp,
                     .ld_out = K,
                     .ld_h = Rp,
                     .ld_x = K,
                     .M = M,
                     .N = K,
                     .K = N,
                     .R = R,
                     .alpha = 1.0f,
                     .scale = 1.0f,
                     .dropout = drop,
                     .dtype = c.dtype};
  for (int run = 0; run < kRuns; ++run) {
    out.poison(), low.poison(), low_sums.poison(), dA.clear(), dB.clear();
    run_gemm(config, p, control);
    compare(report, name("dx", c), out.read(), dx);
    compare(report, name("dh", c), low.read(), dh);
    if (p.dB) compare(report, name("dB", c), dB.read(), layer.dy.transposed().times(h));
    if (p.dA) compare(report, name("dA", c), dA.read(), dh.transposed().times(x_dropped));
  }
}

}  // namespace bringup
