// Launching with every CUDA error caught, and the tensor maps that TMA reads matrices through.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "lora.h"

namespace fused_lora {

// Status::launch_failed with CUDA's own words kept for cuda_failure(), or Status::ok.
Status from_cuda(cudaError_t error, const char* what);

// This thread's device from here on, and its number of SMs; only compute capability 9.0 has the instructions of
// lora_gemm.
Status use_device(int device, int* sms);

// Where a call's kernels go, one after another: only the first of them waits for all that was on the stream before.
struct Target {
  int device;
  void* stream;
  bool overlap = true;  // a kernel may start while the one before it ends
  int launched = 0;
};

struct Grid {
  int64_t blocks;
  int threads, smem, cluster;  // smem: bytes of dynamic shared memory; cluster: blocks of a cluster along x
};

// Allows `kernel` its shared memory, once for each device. One instance (and one mask) for each kernel.
template <auto kernel> Status allow_smem(int bytes, int device) {
  static std::atomic<uint64_t> allowed{0};
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (bytes <= 48 * 1024 || (allowed.load(std::memory_order_relaxed) & bit)) return Status::ok;
  const Status status = from_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                                  "cudaFuncSetAttribute");
  if (status == Status::ok) allowed.fetch_or(bit, std::memory_order_relaxed);
  return status;
}

// With `overlap` a call's second kernel and later ones may start while the one before them ends: each calls
// ptx::wait_for_previous_kernel() before it touches memory.
template <auto kernel, class... Args> Status launch(const Grid& grid, Target& target, const Args&... args) {
  if (grid.blocks < 1 || grid.blocks > INT32_MAX) return Status::bad_shape;
  const Status status = allow_smem<kernel>(grid.smem, target.device);
  if (status != Status::ok) return status;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.smem);
  config.stream = static_cast<cudaStream_t>(target.stream);
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (grid.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = static_cast<unsigned>(grid.cluster);
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (target.launched++ > 0 && target.overlap) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  config.attrs = attributes;
  config.numAttrs = count;
  return from_cuda(cudaLaunchKernelEx(&config, kernel, args...), "cudaLaunchKernelEx");
}

// A row-major [rows, cols] matrix of 2-byte elements, row stride ld, read or written in boxes of [box_rows, box_cols].
// Rows of a box lie 2 * box_cols bytes apart in shared memory, swizzled over as many bytes (32, 64 or 128). Outside the
// matrix a load gives zeros and a store does nothing.
struct MatrixView {
  const void* data;
  int64_t rows, cols, ld;
  int box_rows, box_cols;
  Dtype dtype;
};

// The map of `view`, from a cache of this thread that is keyed by everything a map depends on.
Status tensor_map(const MatrixView& view, CUtensorMap* map);

}  // namespace fused_lora
