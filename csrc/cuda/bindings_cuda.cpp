// pybind11 only: integers in, Status -> exception. In builds with CUDA.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "lora.h"

namespace py = pybind11;
using namespace fused_lora;

namespace {

template <class T> T* ptr(uintptr_t address) { return reinterpret_cast<T*>(address); }

void check(Status status) {
  if (status == Status::ok) return;
  if (status == Status::launch_failed) throw std::runtime_error(std::string(message(status)) + ": " + cuda_failure());
  throw std::invalid_argument(message(status));
}

void forward(uintptr_t x, int64_t ldx, uintptr_t W, int64_t ldw, uintptr_t A, uintptr_t B, uintptr_t bias, uintptr_t h,
             uintptr_t y, uintptr_t workspace, int64_t workspace_bytes, int64_t M, int64_t N, int64_t K, int64_t R,
             int dtype, int adapter_dtype, float scaling, uintptr_t seed, uint32_t threshold, int device,
             uintptr_t stream) {
  check(cuda_forward({ptr<void>(x),
                      ptr<void>(W),
                      ptr<void>(A),
                      ptr<void>(B),
                      ptr<void>(bias),
                      ptr<void>(h),
                      ptr<void>(y),
                      ptr<void>(workspace),
                      workspace_bytes,
                      M,
                      N,
                      K,
                      R,
                      ldx,
                      ldw,
                      Dtype(dtype),
                      Dtype(adapter_dtype),
                      scaling,
                      {ptr<int64_t>(seed), threshold},
                      device,
                      ptr<void>(stream)}));
}

void backward(uintptr_t dy, int64_t lddy, uintptr_t x, int64_t ldx, uintptr_t W, int64_t ldw, uintptr_t A, uintptr_t B,
              uintptr_t h, int64_t ldh, uintptr_t dx, uintptr_t dA, uintptr_t dB, uintptr_t dbias, uintptr_t workspace,
              int64_t workspace_bytes, int64_t M, int64_t N, int64_t K, int64_t R, int dtype, int adapter_dtype,
              float scaling, uintptr_t seed, uint32_t threshold, bool deterministic, int device, uintptr_t stream) {
  check(cuda_backward({ptr<void>(dy),
                       ptr<void>(x),
                       ptr<void>(W),
                       ptr<void>(A),
                       ptr<void>(B),
                       ptr<void>(h),
                       ptr<void>(dx),
                       ptr<void>(dA),
                       ptr<void>(dB),
                       ptr<void>(dbias),
                       ptr<void>(workspace),
                       workspace_bytes,
                       M,
                       N,
                       K,
                       R,
                       lddy,
                       ldx,
                       ldw,
                       ldh,
                       Dtype(dtype),
                       Dtype(adapter_dtype),
                       scaling,
                       {ptr<int64_t>(seed), threshold},
                       deterministic,
                       device,
                       ptr<void>(stream)}));
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_forward", &forward, py::call_guard<py::gil_scoped_release>());
  m.def("cuda_backward", &backward, py::call_guard<py::gil_scoped_release>());
}
