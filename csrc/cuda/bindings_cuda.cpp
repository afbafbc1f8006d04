// The CUDA back end's two calls for Python: tensors and numbers in by keyword, Status -> exception. In builds with
// CUDA.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "keywords.h"
#include "lora.h"

namespace py = pybind11;
using namespace fused_lora;

namespace {

void check(Status status) {
  if (status == Status::ok) return;
  if (status == Status::launch_failed) throw std::runtime_error(std::string(message(status)) + ": " + cuda_failure());
  throw std::invalid_argument(message(status));
}
void forward(const CudaForwardParams& p) { check(cuda_forward(p)); }
void backward(const CudaBackwardParams& p) { check(cuda_backward(p)); }

// Whether TMA and loads of 16 bytes can read it.
bool on_16_bytes(const dlpack::Tensor& t) { return (reinterpret_cast<uintptr_t>(t.data) + t.byte_offset) % 16 == 0; }
bool has_tma_rows(const dlpack::Tensor& t) {
  if (t.dims != 2 || t.strides[1] != 1 || !on_16_bytes(t)) return false;
  const int64_t step = dlpack::row_stride(t);  // a single row's own means nothing
  return step % 8 == 0 && step >= t.shape[1];
}
bool is_flat(const dlpack::Tensor& t) { return dlpack::is_contiguous(t) && on_16_bytes(t); }

// Tensors of whatever device, which Python has checked.
template <class P, auto... members>
constexpr auto put_tma_rows = put_matrix<dlpack::load_anywhere, has_tma_rows, P, members...>;
template <class P, auto... members> constexpr auto put_flat = put_piece<dlpack::load_anywhere, is_flat, P, members...>;
template <class P, auto... members>
constexpr auto put_result = put_written<dlpack::load_anywhere, is_flat, P, members...>;

using F = CudaForwardParams;
constexpr Keyword<F> kForward[] = {
    {"x", put_tma_rows<F, &F::x, &F::ldx, &F::dtype, &F::K, &F::M>},
    {"W", put_tma_rows<F, &F::W, &F::ldw>},
    {"A", put_flat<F, &F::A>},
    {"B", put_flat<F, &F::B, &F::adapter_dtype, &F::R, &F::N>},
    {"bias", put_flat<F, &F::bias>},
    {"h", put_result<F, &F::h>},
    {"y", put_result<F, &F::y>},
    {"workspace", put<F, &F::workspace, &F::workspace_bytes>},
    {"scaling", put<F, &F::scaling>},
    {"dropout", put<F, &F::dropout>},
    {"plan", put<F, &F::plan>},
    {"target", put<F, &F::device, &F::stream>},
};

using D = CudaBackwardParams;
// dx, dA, dB and dbias, None for what is not wanted.
bool put_gradients(D& params, PyObject* value, Copies& copies) {
  if (!PyTuple_Check(value) || PyTuple_GET_SIZE(value) != 4) return false;
  PyObject* const* each = PySequence_Fast_ITEMS(value);
  return put_result<D, &D::dx>(params, each[0], copies) && put_result<D, &D::dA>(params, each[1], copies) &&
         put_result<D, &D::dB>(params, each[2], copies) && put_result<D, &D::dbias>(params, each[3], copies);
}
constexpr Keyword<D> kBackward[] = {
    {"dy", put_tma_rows<D, &D::dy, &D::lddy, &D::dtype, &D::N, &D::M>},
    {"x", put_tma_rows<D, &D::x, &D::ldx>},
    {"W", put_tma_rows<D, &D::W, &D::ldw>},
    {"A", put_flat<D, &D::A, &D::adapter_dtype, &D::K, &D::R>},
    {"B", put_flat<D, &D::B>},
    {"h", put_tma_rows<D, &D::h, &D::ldh>},
    {"grads", put_gradients},
    {"workspace", put<D, &D::workspace, &D::workspace_bytes>},
    {"scaling", put<D, &D::scaling>},
    {"dropout", put<D, &D::dropout>},
    {"deterministic", put<D, &D::deterministic>},
    {"plan", put<D, &D::plan>},
    {"target", put<D, &D::device, &D::stream>},
};

}  // namespace

void bind_cuda(py::module_& m) {
  def_keywords<kForward, forward>(m, "cuda_forward", "Writes h and y; CudaForwardParams of csrc/lora.h.");
  def_keywords<kBackward, backward>(m, "cuda_backward",
                                    "Writes the gradients that are not null; CudaBackwardParams of csrc/lora.h.");
}
