// The device, tensor maps and CUDA's error messages; host code only.
#include "launch.h"

#include <array>
#include <string>

namespace fused_lora {
namespace {

thread_local std::string failure = "nothing failed in this thread";

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function, found at run time: nothing links to libcuda.
Status find_encode(Encode* encode) {
  static std::atomic<Encode> found{nullptr};
  *encode = found.load(std::memory_order_acquire);
  if (*encode) return Status::ok;
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult result{};
  const Status status =
      from_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result),
                "cudaGetDriverEntryPointByVersion");
  if (status != Status::ok) return status;
  if (result != cudaDriverEntryPointSuccess || !entry) return Status::unsupported_device;
  *encode = reinterpret_cast<Encode>(entry);
  found.store(*encode, std::memory_order_release);
  return Status::ok;
}

bool same(const MatrixView& a, const MatrixView& b) {
  return a.data == b.data && a.rows == b.rows && a.cols == b.cols && a.ld == b.ld && a.box_rows == b.box_rows &&
         a.box_cols == b.box_cols && a.dtype == b.dtype;
}

size_t hash(const MatrixView& v) {
  uint64_t h = reinterpret_cast<uintptr_t>(v.data);
  for (const uint64_t part : {static_cast<uint64_t>(v.rows), static_cast<uint64_t>(v.cols), static_cast<uint64_t>(v.ld),
                              static_cast<uint64_t>(v.box_rows * 512 + v.box_cols)})
    h = (h ^ part) * 0x9E3779B97F4A7C15u;
  return h >> 40;
}

Status encode_map(const MatrixView& v, CUtensorMap* map) {
  Encode encode = nullptr;
  const Status status = find_encode(&encode);
  if (status != Status::ok) return status;
  const CUtensorMapSwizzle swizzle = v.box_cols == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : v.box_cols == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                        : CU_TENSOR_MAP_SWIZZLE_32B;
  const cuuint64_t dims[2] = {static_cast<cuuint64_t>(v.cols), static_cast<cuuint64_t>(v.rows)},
                   strides[1] = {static_cast<cuuint64_t>(v.ld) * 2};
  CUtensorMapDataType type{};
  switch (v.dtype) {
    case Dtype::f16: type = CU_TENSOR_MAP_DATA_TYPE_FLOAT16; break;
    case Dtype::bf16: type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16; break;
    default: return Status::bad_dtype;
  }
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(v.box_cols), static_cast<cuuint32_t>(v.box_rows)},
                   steps[2] = {1, 1};
  const CUresult result =
      encode(map, type, 2, const_cast<void*>(v.data), dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return Status::ok;
  failure = "cuTensorMapEncodeTiled returned " + std::to_string(result) + " for a matrix of " + std::to_string(v.rows) +
            " x " + std::to_string(v.cols) + ", row stride " + std::to_string(v.ld) + ", box " +
            std::to_string(v.box_rows) + " x " + std::to_string(v.box_cols);
  return Status::launch_failed;
}

}  // namespace

const char* cuda_failure() { return failure.c_str(); }

Status from_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return Status::ok;
  failure = std::string(what) + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error);
  cudaGetLastError();  // it is reported here and must not surface in the next caller's launch
  return Status::launch_failed;
}

Status use_device(int device, int* sms) {
  struct Known {
    std::atomic<int> sms{0};
  };
  static Known known[64];
  if (device < 0 || device >= 64) return Status::unsupported_device;
  Status status = from_cuda(cudaSetDevice(device), "cudaSetDevice");
  if (status != Status::ok) return status;
  *sms = known[device].sms.load(std::memory_order_relaxed);
  if (*sms) return Status::ok;
  int major = 0, minor = 0;
  status =
      from_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  if (status == Status::ok)
    status =
        from_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  if (status == Status::ok)
    status = from_cuda(cudaDeviceGetAttribute(sms, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  if (status != Status::ok) return status;
  if (major != 9 || minor != 0) return Status::unsupported_device;
  known[device].sms.store(*sms, std::memory_order_relaxed);
  return Status::ok;
}

Status tensor_map(const MatrixView& v, CUtensorMap* map) {
  if (v.rows < 1 || v.cols < 1 || v.rows > INT32_MAX || v.cols > INT32_MAX ||
      (v.box_cols != 16 && v.box_cols != 32 && v.box_cols != 64))
    return Status::bad_shape;
  if (reinterpret_cast<uintptr_t>(v.data) % 16 || v.ld % 8 || v.ld < v.cols) return Status::bad_alignment;
  struct Entry {
    MatrixView key;
    CUtensorMap map;
  };
  thread_local std::array<Entry, 1024> cache{};  // one way: a clash costs an encoding, never a wrong map
  Entry& entry = cache[hash(v) % cache.size()];
  if (!entry.key.data || !same(entry.key, v)) {
    entry.key.data = nullptr;
    const Status status = encode_map(v, &entry.map);
    if (status != Status::ok) return status;
    entry.key = v;
  }
  *map = entry.map;
  return Status::ok;
}

}  // namespace fused_lora
