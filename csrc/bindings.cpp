// pybind11 only: integers in, Status -> ValueError. Every tensor check is in Python.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "lora.h"

namespace py = pybind11;
using namespace fused_lora;

void bind_heuristics(py::module_& m);  // csrc/cuda/bindings_heuristics.cpp, host code only: in every build
#ifdef FUSED_LORA_CUDA
void bind_cuda(py::module_& m);  // csrc/cuda/bindings_cuda.cpp
#endif

namespace {

template <class T> T* ptr(uintptr_t address) { return reinterpret_cast<T*>(address); }

void check(Status status) {
  if (status != Status::ok) throw std::invalid_argument(message(status));
}

void forward(uintptr_t x, int64_t ldx, uintptr_t W, int64_t ldw, uintptr_t A, uintptr_t B, uintptr_t bias, uintptr_t h,
             uintptr_t y, int64_t M, int64_t N, int64_t K, int64_t R, int dtype, int adapter_dtype, float scaling,
             uintptr_t seed, uint32_t threshold, int threads) {
  check(cpu_forward({ptr<void>(x),
                     ptr<void>(W),
                     ptr<void>(A),
                     ptr<void>(B),
                     ptr<void>(bias),
                     ptr<void>(h),
                     ptr<void>(y),
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
                     threads}));
}

void backward(uintptr_t dy, int64_t lddy, uintptr_t x, int64_t ldx, uintptr_t W, int64_t ldw, uintptr_t A, uintptr_t B,
              uintptr_t h, uintptr_t dx, uintptr_t dA, uintptr_t dB, uintptr_t dbias, int64_t M, int64_t N, int64_t K,
              int64_t R, int dtype, int adapter_dtype, float scaling, uintptr_t seed, uint32_t threshold, int threads) {
  check(cpu_backward({ptr<void>(dy),
                      ptr<void>(x),
                      ptr<void>(W),
                      ptr<void>(A),
                      ptr<void>(B),
                      ptr<void>(h),
                      ptr<void>(dx),
                      ptr<void>(dA),
                      ptr<void>(dB),
                      ptr<void>(dbias),
                      M,
                      N,
                      K,
                      R,
                      ldx,
                      lddy,
                      ldw,
                      Dtype(dtype),
                      Dtype(adapter_dtype),
                      scaling,
                      {ptr<int64_t>(seed), threshold},
                      threads}));
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
#ifdef FUSED_LORA_CUDA
  info["cuda"] = true;
  info["cuda_archs"] = FUSED_LORA_CUDA_ARCHS;
#else
  info["cuda"] = false;
  info["cuda_archs"] = "";
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fused-lora's native kernels; addresses, sizes and strides in, nothing out";
  m.def("cpu_forward", &forward, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_backward", &backward, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_prefers_lora_gemm", &cpu_prefers_lora_gemm,
        "Whether cpu_forward and cpu_backward should be given W for fp32 x.");
  m.def("build_info", &build_info, "What this build holds: compiler, cuda, cuda_archs.");
  bind_heuristics(m);
#ifdef FUSED_LORA_CUDA
  bind_cuda(m);
#endif
}
