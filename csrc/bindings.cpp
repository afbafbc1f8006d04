// The Python module _C: tensors and numbers in by keyword, Status -> ValueError. Whether tensors go together is checked
// in Python.
#include <pybind11/pybind11.h>

#include <array>
#include <cstring>
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
void forward(CpuForwardParams& p) { check(cpu_forward(p)); }
// Of how many columns of dout_scale y tells too little.
template <auto run, class Params> int64_t lost_columns(Params& p) {
  int64_t lost = 0;
  if (p.dout_scale) p.lost = &lost;
  check(run(p));
  return lost;
}
int64_t backward(CpuBackwardParams& p) { return lost_columns<cpu_backward>(p); }
int64_t scale(CpuScaleParams& p) { return lost_columns<cpu_scale>(p); }
void product(CpuProductParams& p) { check(cpu_product(p)); }
int64_t row_norm(CpuRowNormParams& p) {  // of how many rows the norm is 0
  int64_t empty = 0;
  p.empty = &empty;
  check(cpu_row_norm(p));
  return empty;
}
void grouped_forward(CpuGroupedForwardParams& p) { check(cpu_grouped_forward(p)); }
void grouped_backward(CpuGroupedBackwardParams& p) { check(cpu_grouped_backward(p)); }

using F = CpuForwardParams;
constexpr Keyword<F> kForward[] = {
    {"x", put_rows<F, &F::x, &F::ldx, &F::dtype, &F::K, &F::M>},
    {"W", put_weight<F, &F::W, &F::ldw, &F::W_transposed>},
    {"A", put_whole<F, &F::A>},
    {"B", put_whole<F, &F::B, &F::adapter_dtype, &F::R, &F::N>},
    {"bias", put_whole<F, &F::bias>},
    {"h", put_output<F, &F::h>},
    {"y", put_output<F, &F::y>},
    {"scaling", put<F, &F::scaling>},
    {"dropout", put<F, &F::dropout>},
    {"threads", put<F, &F::threads>},
    {"x_lora", put_rows<F, &F::x_lora, &F::ldx_lora>},
    {"h_in", put_whole<F, &F::h_in>},
    {"gate", put_whole<F, &F::gate, &F::gates>},
    {"out_scale", put_whole<F, &F::out_scale>},
};

using D = CpuBackwardParams;
// What the walk makes of out_scale, or None: out_scale, y, bias and dout_scale.
bool put_scaled(D& params, PyObject* value, Copies& copies) {
  if (value == Py_None) return true;
  if (!PyTuple_Check(value) || PyTuple_GET_SIZE(value) != 4) return false;
  PyObject* const* each = PySequence_Fast_ITEMS(value);
  return put_whole<D, &D::out_scale>(params, each[0], copies) && put_rows<D, &D::y, &D::ldy>(params, each[1], copies) &&
         put_whole<D, &D::bias>(params, each[2], copies) && put_output<D, &D::dout_scale>(params, each[3], copies);
}
constexpr Keyword<D> kBackward[] = {
    {"dy", put_rows<D, &D::dy, &D::lddy, &D::dtype, &D::N, &D::M>},
    {"x", put_rows<D, &D::x, &D::ldx>},
    {"W", put_weight<D, &D::W, &D::ldw, &D::W_transposed>},
    {"A", put_whole<D, &D::A, &D::adapter_dtype, &D::K, &D::R>},
    {"B", put_whole<D, &D::B>},
    {"h", put_whole<D, &D::h>},
    {"dx", put_output<D, &D::dx>},
    {"dA", put_output<D, &D::dA>},
    {"dB", put_output<D, &D::dB>},
    {"dbias", put_output<D, &D::dbias>},
    {"scaling", put<D, &D::scaling>},
    {"dropout", put<D, &D::dropout>},
    {"threads", put<D, &D::threads>},
    {"scaled", put_scaled},
    {"add", put<D, &D::add>, true},
    {"h_in", put_whole<D, &D::h_in>, true},
    {"gate", put_whole<D, &D::gate, &D::gates>, true},
    {"row_scale", put_whole<D, &D::row_scale>, true},
    {"dh", put_whole<D, &D::dh>, true},
    {"dx_lora", put_output<D, &D::dx_lora>, true},
    {"dh_in", put_output<D, &D::dh_in>, true},
    {"dgate", put_output<D, &D::dgate>, true},
};

using S = CpuScaleParams;
constexpr Keyword<S> kScale[] = {
    {"dy", put_rows<S, &S::dy, &S::lddy, &S::dtype, &S::N, &S::M>},
    {"y", put_rows<S, &S::y, &S::ldy>},
    {"bias", put_whole<S, &S::bias>},
    {"out_scale", put_whole<S, &S::out_scale>},
    {"dz", put_output<S, &S::dz>},
    {"dout_scale", put_output<S, &S::dout_scale>},
    {"dbias", put_output<S, &S::dbias>},
    {"threads", put<S, &S::threads>},
};

using P = CpuProductParams;
constexpr Keyword<P> kProduct[] = {
    {"x", put_rows<P, &P::x, &P::ldx, &P::dtype, &P::K, &P::M>},
    {"W", put_weight<P, &P::W, &P::ldw, &P::W_transposed>},
    {"bias", put_whole<P, &P::bias>},
    {"y", put_output<P, &P::y, &P::N>},
    {"threads", put<P, &P::threads>},
};

using N = CpuRowNormParams;
constexpr Keyword<N> kRowNorm[] = {
    {"W", put_rows<N, &N::W, &N::ldw, &N::dtype>},
    {"A", put_whole<N, &N::A, &N::K, &N::R>},
    {"B", put_whole<N, &N::B>},
    {"norm", put_output<N, &N::norm, &N::N>},
    {"scaling", put<N, &N::scaling>},
    {"threads", put<N, &N::threads>},
};

using GF = CpuGroupedForwardParams;
constexpr Keyword<GF> kGroupedForward[] = {
    {"x", put_rows<GF, &GF::x, &GF::ldx, &GF::dtype>},
    {"h", put_output<GF, &GF::h>},
    {"y", put_output<GF, &GF::y>},
    {"factors", put<GF, &GF::A, &GF::B, &GF::ranks>},
    {"segments", put<GF, &GF::offsets, &GF::rows>},
    {"scaling", put_whole<GF, &GF::scaling>},
    {"sizes", put<GF, &GF::G, &GF::N, &GF::K, &GF::R>},
    {"adapter_dtype", put<GF, &GF::adapter_dtype>},
    {"dropout", put<GF, &GF::seed, &GF::thresholds>},
    {"threads", put<GF, &GF::threads>},
};

using GB = CpuGroupedBackwardParams;
constexpr Keyword<GB> kGroupedBackward[] = {
    {"dy", put_rows<GB, &GB::dy, &GB::lddy, &GB::dtype>},
    {"x", put_rows<GB, &GB::x, &GB::ldx>},
    {"h", put_whole<GB, &GB::h>},
    {"dx", put_output<GB, &GB::dx>},
    {"dA", put<GB, &GB::dA, &GB::shared_A>},
    {"dB", put<GB, &GB::dB, &GB::shared_B>},
    {"factors", put<GB, &GB::A, &GB::B, &GB::ranks>},
    {"segments", put<GB, &GB::offsets, &GB::rows>},
    {"scaling", put_whole<GB, &GB::scaling>},
    {"sizes", put<GB, &GB::G, &GB::N, &GB::K, &GB::R>},
    {"adapter_dtype", put<GB, &GB::adapter_dtype>},
    {"dropout", put<GB, &GB::seed, &GB::thresholds>},
    {"threads", put<GB, &GB::threads>},
};

// sample(tensor, memory, size) -> bytes or None.
PyObject* sample(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3) return PyErr_SetString(PyExc_TypeError, "sample takes a tensor, an address and a size"), nullptr;
  const size_t memory = PyLong_AsSize_t(args[1]), size = PyLong_AsSize_t(args[2]);
  dlpack::Tensor t;
  if (PyErr_Occurred()) return nullptr;
  if (!dlpack::load(args[0], t)) {
    if (PyErr_Occurred()) return nullptr;
    Py_RETURN_NONE;
  }
  size_t bytes = t.dtype.bits * t.dtype.lanes / 8u;
  for (int32_t d = 0; d < t.dims; ++d) bytes *= static_cast<size_t>(t.shape[d]);
  const size_t start = reinterpret_cast<size_t>(t.data) + t.byte_offset;
  const bool inside = memory && start >= memory && start + bytes <= memory + size;
  if (!inside || bytes < 32 || !dlpack::is_contiguous(t)) Py_RETURN_NONE;
  std::array<uint64_t, 5> words{start};
  for (size_t i = 0; i < 3; ++i)
    std::memcpy(&words[1 + i], reinterpret_cast<char*>(start + (bytes - 8) / 24 * 8 * i), 8);
  std::memcpy(&words[4], reinterpret_cast<char*>(start + bytes - 8), 8);
  return PyBytes_FromStringAndSize(reinterpret_cast<char*>(words.data()), sizeof words);
}
PyMethodDef kSample[] = {
    {"sample", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&sample)), METH_FASTCALL,
     "sample($module, tensor, memory, size, /)\n--\n\nThe address of a contiguous tensor and four of its words, "
     "the first and the last among them; None unless it lies in the size bytes at the address memory."},
    {}};

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
  m.doc() = "fused-lora's native kernels, which write into their arguments";
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
  if (PyModule_AddFunctions(m.ptr(), kSample)) throw py::error_already_set();
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
