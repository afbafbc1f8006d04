// The Python module _C: addresses, sizes and strides in by keyword, Status -> ValueError. Every tensor check is in
// Python.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "cpu/cpu_features.h"
#include "cpu/few_rows.h"
#include "keywords.h"
#include "lora.h"

namespace py = pybind11;
using namespace fused_lora;

void bind_heuristics(py::module_& m);  // csrc/cuda/bindings_heuristics.cpp, host code only: in every build
#ifdef FUSED_LORA_CUDA
void bind_cuda(py::module_& m);  // csrc/cuda/bindings_cuda.cpp
#endif

namespace {

void check(Status status) {
  if (status != Status::ok) throw std::invalid_argument(message(status));
}
void forward(const CpuForwardParams& p) { check(cpu_forward(p)); }
void backward(const CpuBackwardParams& p) { check(cpu_backward(p)); }
void scale(const CpuScaleParams& p) { check(cpu_scale(p)); }
void product(const CpuProductParams& p) { check(cpu_product(p)); }
void row_norm(const CpuRowNormParams& p) { check(cpu_row_norm(p)); }
void grouped_forward(const CpuGroupedForwardParams& p) { check(cpu_grouped_forward(p)); }
void grouped_backward(const CpuGroupedBackwardParams& p) { check(cpu_grouped_backward(p)); }

using F = CpuForwardParams;
constexpr Keyword<F> kForward[] = {
    {"x", put<F, &F::x, &F::ldx>},
    {"W", put<F, &F::W, &F::ldw, &F::W_transposed>},
    {"A", put<F, &F::A>},
    {"B", put<F, &F::B>},
    {"bias", put<F, &F::bias>},
    {"h", put<F, &F::h>},
    {"y", put<F, &F::y>},
    {"sizes", put<F, &F::M, &F::N, &F::K, &F::R>},
    {"dtypes", put<F, &F::dtype, &F::adapter_dtype>},
    {"scaling", put<F, &F::scaling>},
    {"dropout", put<F, &F::dropout>},
    {"threads", put<F, &F::threads>},
    {"x_lora", put<F, &F::x_lora, &F::ldx_lora>, true},
    {"h_in", put<F, &F::h_in>, true},
    {"gate", put<F, &F::gate, &F::gates>, true},
    {"out_scale", put<F, &F::out_scale>, true},
};

using D = CpuBackwardParams;
constexpr Keyword<D> kBackward[] = {
    {"dy", put<D, &D::dy, &D::lddy>},
    {"x", put<D, &D::x, &D::ldx>},
    {"W", put<D, &D::W, &D::ldw, &D::W_transposed>},
    {"A", put<D, &D::A>},
    {"B", put<D, &D::B>},
    {"h", put<D, &D::h>},
    {"dx", put<D, &D::dx, &D::add>},
    {"dA", put<D, &D::dA>},
    {"dB", put<D, &D::dB>},
    {"dbias", put<D, &D::dbias>},
    {"sizes", put<D, &D::M, &D::N, &D::K, &D::R>},
    {"dtypes", put<D, &D::dtype, &D::adapter_dtype>},
    {"scaling", put<D, &D::scaling>},
    {"dropout", put<D, &D::dropout>},
    {"threads", put<D, &D::threads>},
    {"h_in", put<D, &D::h_in>, true},
    {"gate", put<D, &D::gate, &D::gates>, true},
    {"row_scale", put<D, &D::row_scale>, true},
    {"dh", put<D, &D::dh>, true},
    {"dx_lora", put<D, &D::dx_lora>, true},
    {"dh_in", put<D, &D::dh_in>, true},
    {"dgate", put<D, &D::dgate>, true},
    {"out_scale", put<D, &D::out_scale>, true},
    {"y", put<D, &D::y, &D::ldy>, true},
    {"bias", put<D, &D::bias>, true},
    {"dout_scale", put<D, &D::dout_scale, &D::lost>, true},
};

using S = CpuScaleParams;
constexpr Keyword<S> kScale[] = {
    {"dy", put<S, &S::dy, &S::lddy>}, {"y", put<S, &S::y, &S::ldy>},
    {"bias", put<S, &S::bias>},       {"out_scale", put<S, &S::out_scale>},
    {"dz", put<S, &S::dz>},           {"dout_scale", put<S, &S::dout_scale, &S::lost>},
    {"dbias", put<S, &S::dbias>},     {"sizes", put<S, &S::M, &S::N>},
    {"dtype", put<S, &S::dtype>},     {"threads", put<S, &S::threads>},
};

using P = CpuProductParams;
constexpr Keyword<P> kProduct[] = {
    {"x", put<P, &P::x, &P::ldx>},
    {"W", put<P, &P::W, &P::ldw, &P::W_transposed>},
    {"bias", put<P, &P::bias>},
    {"y", put<P, &P::y>},
    {"sizes", put<P, &P::M, &P::N, &P::K>},
    {"dtype", put<P, &P::dtype>},
    {"threads", put<P, &P::threads>},
};

using N = CpuRowNormParams;
constexpr Keyword<N> kRowNorm[] = {
    {"W", put<N, &N::W, &N::ldw>},          {"factors", put<N, &N::A, &N::B>}, {"norm", put<N, &N::norm, &N::empty>},
    {"sizes", put<N, &N::N, &N::K, &N::R>}, {"dtype", put<N, &N::dtype>},      {"scaling", put<N, &N::scaling>},
    {"threads", put<N, &N::threads>},
};

using GF = CpuGroupedForwardParams;
constexpr Keyword<GF> kGroupedForward[] = {
    {"x", put<GF, &GF::x, &GF::ldx>},
    {"h", put<GF, &GF::h>},
    {"y", put<GF, &GF::y>},
    {"factors", put<GF, &GF::A, &GF::B, &GF::ranks>},
    {"segments", put<GF, &GF::offsets, &GF::rows>},
    {"scaling", put<GF, &GF::scaling>},
    {"sizes", put<GF, &GF::G, &GF::N, &GF::K, &GF::R>},
    {"dtypes", put<GF, &GF::dtype, &GF::adapter_dtype>},
    {"dropout", put<GF, &GF::seed, &GF::thresholds>},
    {"threads", put<GF, &GF::threads>},
};

using GB = CpuGroupedBackwardParams;
constexpr Keyword<GB> kGroupedBackward[] = {
    {"dy", put<GB, &GB::dy, &GB::lddy>},
    {"x", put<GB, &GB::x, &GB::ldx>},
    {"h", put<GB, &GB::h>},
    {"dx", put<GB, &GB::dx>},
    {"dA", put<GB, &GB::dA, &GB::shared_A>},
    {"dB", put<GB, &GB::dB, &GB::shared_B>},
    {"factors", put<GB, &GB::A, &GB::B, &GB::ranks>},
    {"segments", put<GB, &GB::offsets, &GB::rows>},
    {"scaling", put<GB, &GB::scaling>},
    {"sizes", put<GB, &GB::G, &GB::N, &GB::K, &GB::R>},
    {"dtypes", put<GB, &GB::dtype, &GB::adapter_dtype>},
    {"dropout", put<GB, &GB::seed, &GB::thresholds>},
    {"threads", put<GB, &GB::threads>},
};

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
#ifdef FUSED_LORA_CUDA
  info["cuda"] = true;
  info["cuda_archs"] = FUSED_LORA_CUDA_ARCHS;
  info["ptxas"] = FUSED_LORA_PTXAS;
#else
  info["cuda"] = false;
  info["cuda_archs"] = "";
  info["ptxas"] = "";
#endif
  return info;
}

py::dict cpu_features() {
  const cpu::Features& f = cpu::features;
  py::dict used;
  used["avx2"] = f.avx2;
  used["avx512"] = f.avx512;
  used["bf16_dot"] = f.bf16_dot;
  used["amx"] = f.amx;
  return used;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  cpu::check_max_isa();
  m.doc() = "fused-lora's native kernels; addresses, sizes and strides in, nothing out";
  def_keywords<kForward, forward>(m, "cpu_forward", "Writes h and y, or updates y; CpuForwardParams of csrc/lora.h.");
  def_keywords<kBackward, backward>(
      m, "cpu_backward", "Writes dA, dB and dbias, and writes or updates dx; CpuBackwardParams of csrc/lora.h.");
  def_keywords<kScale, scale>(m, "cpu_scale", "Writes dz, dbias and dout_scale; CpuScaleParams of csrc/lora.h.");
  def_keywords<kProduct, product>(m, "cpu_product", "Writes a product with a weight; CpuProductParams of csrc/lora.h.");
  def_keywords<kRowNorm, row_norm>(m, "cpu_row_norm", "Writes the norms of rows; CpuRowNormParams of csrc/lora.h.");
  def_keywords<kGroupedForward, grouped_forward>(
      m, "cpu_grouped_forward", "Writes h and updates y by groups of rows; CpuGroupedForwardParams of csrc/lora.h.");
  def_keywords<kGroupedBackward, grouped_backward>(
      m, "cpu_grouped_backward", "Updates dx and writes every dA and dB; CpuGroupedBackwardParams of csrc/lora.h.");
  m.attr("few_rows") = cpu::kFewRows;
  m.def("cpu_features", &cpu_features,
        "Which of avx2, avx512, bf16_dot, amx the CPU kernels use; FUSED_LORA_MAX_CPU_ISA caps them.");
  m.def("build_info", &build_info,
        "What this build holds: compiler, cuda, cuda_archs, and the release of the ptxas that assembled them.");
  bind_heuristics(m);
#ifdef FUSED_LORA_CUDA
  bind_cuda(m);
#endif
}
