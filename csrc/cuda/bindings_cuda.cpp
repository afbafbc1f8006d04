// The CUDA back end's two calls for Python: addresses, sizes and strides in by keyword, Status -> exception. In builds
// with CUDA.
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

using F = CudaForwardParams;
constexpr Keyword<F> kForward[] = {
    {"x", put<F, &F::x, &F::ldx>},
    {"W", put<F, &F::W, &F::ldw>},
    {"A", put<F, &F::A>},
    {"B", put<F, &F::B>},
    {"bias", put<F, &F::bias>},
    {"h", put<F, &F::h>},
    {"y", put<F, &F::y>},
    {"workspace", put<F, &F::workspace, &F::workspace_bytes>},
    {"sizes", put<F, &F::M, &F::N, &F::K, &F::R>},
    {"dtypes", put<F, &F::dtype, &F::adapter_dtype>},
    {"scaling", put<F, &F::scaling>},
    {"dropout", put<F, &F::dropout>},
    {"plan", put<F, &F::plan>},
    {"device", put<F, &F::device>},
    {"stream", put<F, &F::stream>},
};

using D = CudaBackwardParams;
constexpr Keyword<D> kBackward[] = {
    {"dy", put<D, &D::dy, &D::lddy>},
    {"x", put<D, &D::x, &D::ldx>},
    {"W", put<D, &D::W, &D::ldw>},
    {"A", put<D, &D::A>},
    {"B", put<D, &D::B>},
    {"h", put<D, &D::h, &D::ldh>},
    {"dx", put<D, &D::dx>},
    {"dA", put<D, &D::dA>},
    {"dB", put<D, &D::dB>},
    {"dbias", put<D, &D::dbias>},
    {"workspace", put<D, &D::workspace, &D::workspace_bytes>},
    {"sizes", put<D, &D::M, &D::N, &D::K, &D::R>},
    {"dtypes", put<D, &D::dtype, &D::adapter_dtype>},
    {"scaling", put<D, &D::scaling>},
    {"dropout", put<D, &D::dropout>},
    {"deterministic", put<D, &D::deterministic>},
    {"plan", put<D, &D::plan>},
    {"device", put<D, &D::device>},
    {"stream", put<D, &D::stream>},
};

}  // namespace

void bind_cuda(py::module_& m) {
  def_keywords<kForward, forward>(m, "cuda_forward", "Writes h and y; CudaForwardParams of csrc/lora.h.");
  def_keywords<kBackward, backward>(m, "cuda_backward",
                                    "Writes the gradients that are not null; CudaBackwardParams of csrc/lora.h.");
}
