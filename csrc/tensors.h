// Tensors from Python: DLPack's C exchange API (https://github.com/dmlc/dlpack, 1.3), which torch.Tensor has from 2.11
// on, tells what a tensor is for 45 ns, without a line of its framework's headers. An attribute in Python is 40 to 140
// ns, and a call of cpu_backward asked for 30 of them (EPYC 9005, torch 2.13, 2026-11-27).
//
// The puts of this file are what keywords.h takes for keywords that are tensors. None leaves the members null. A tensor
// that lies otherwise than the kernels read it is copied, by its own contiguous() or clone(), for the length of the
// call; one that they write must lie as they write it.
#pragma once

#include <Python.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "lora.h"

namespace fused_lora {
namespace dlpack {

struct Device {
  int32_t type, index;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t dims;
  DataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct Header {
  uint32_t major, minor;
  Header* previous;
};
struct Api {
  Header header;
  void (*allocate)(), (*managed_from_object)(), (*object_from_managed)();
  int (*from_object)(void* object, Tensor* tensor);  // borrowed from the object; else Python's error is set
  void (*stream)();
};
constexpr int32_t kCpu = 1;
constexpr uint8_t kFloat = 2, kBfloat = 4;

// The functions of an object's type; null, with Python's error set, where it has none.
inline const Api* api_of(PyObject* object) {
  struct Known {
    PyTypeObject* type;
    const Api* api;
  };
  static std::array<Known, 4> known{};  // Tensor and Parameter, as a rule; touched with the GIL only
  static size_t next = 0;
  PyTypeObject* const type = Py_TYPE(object);
  for (const Known& each : known)
    if (each.type == type) return each.api;
  PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (!capsule) return nullptr;
  const auto* header = static_cast<const Header*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);
  if (!header) return nullptr;
  while (header && header->major != 1) header = header->previous;  // newer ones may keep it beside their own
  const auto* api = reinterpret_cast<const Api*>(header);
  if (!api || !api->from_object) return PyErr_SetString(PyExc_TypeError, "no DLPack of version 1"), nullptr;
  Py_INCREF(type);  // so that no other type takes its address
  const Known former = std::exchange(known[next++ % known.size()], {type, api});
  Py_XDECREF(former.type);  // last, for it may run anything
  return api;
}

// Python's error may be set where it is false.
inline bool load_anywhere(PyObject* object, Tensor& tensor) {
  const Api* api = api_of(object);
  return api && api->from_object(object, &tensor) == 0;
}
inline bool load(PyObject* object, Tensor& tensor) {
  return load_anywhere(object, tensor) && tensor.device.type == kCpu;
}

inline bool dtype_of(const Tensor& t, Dtype& to) {
  if (t.dtype.lanes != 1) return false;
  if (t.dtype.code == kBfloat && t.dtype.bits == 16) to = Dtype::bf16;
  else if (t.dtype.code == kFloat && t.dtype.bits == 16) to = Dtype::f16;
  else if (t.dtype.code == kFloat && t.dtype.bits == 32) to = Dtype::f32;
  else return false;
  return true;
}

inline bool is_contiguous(const Tensor& t) {
  int64_t step = 1;
  bool so = true;
  for (int32_t d = t.dims - 1; d >= 0; --d) {
    so &= t.shape[d] == 1 || t.strides[d] == step;
    step *= t.shape[d];
  }
  return so || step == 0;
}

// Of a matrix, whether neighbouring columns are adjacent; a row's stride then means what it says, or nothing.
inline bool has_rows(const Tensor& t) { return t.dims == 2 && (t.strides[1] == 1 || is_contiguous(t)); }
inline bool has_columns(const Tensor& t) { return t.dims == 2 && t.strides[0] == 1; }
inline int64_t row_stride(const Tensor& t) { return t.shape[0] > 1 && t.strides[1] == 1 ? t.strides[0] : t.shape[1]; }

}  // namespace dlpack

// Copies of tensors for the length of a call.
class Copies {
 public:
  Copies() = default;
  Copies(const Copies&) = delete;
  Copies& operator=(const Copies&) = delete;
  ~Copies() {
    for (size_t i = 0; i < count_; ++i) Py_DECREF(copies_[i]);
  }

  // tensor = that of object, or of a contiguous copy where `fits` is false of it.
  template <auto load_tensor = dlpack::load, class Fits>
  bool load(PyObject* object, dlpack::Tensor& tensor, Fits fits) {
    if (!load_tensor(object, tensor)) return false;
    if (fits(tensor)) return true;
    PyObject* dense = copy_by(object, "contiguous");  // itself, where it lies wrongly but in one piece
    PyObject* copy = dense == object ? copy_by(object, "clone") : dense;
    return copy && load_tensor(copy, tensor) && fits(tensor);
  }

  bool failed = false;  // to make one, for what Python's error says

 private:
  // object.method(), kept; null where it fails.
  PyObject* copy_by(PyObject* object, const char* method) {
    if (count_ == copies_.size()) return nullptr;
    PyObject* copy = PyObject_CallMethod(object, method, nullptr);
    failed |= !copy;
    if (copy) copies_[count_++] = copy;
    return copy;
  }

  std::array<PyObject*, 16> copies_{};
  size_t count_ = 0;
};

namespace detail {

// to = the memory of t; false where `to` is of floats and t is not, and where t has elements and no memory, as one that
// is sharded while it is freed: null would stand for no tensor.
template <class T> bool point(T*& to, const dlpack::Tensor& t) {
  Dtype dtype;
  if (!dlpack::dtype_of(t, dtype) || (std::is_same_v<std::remove_const_t<T>, float> && dtype != Dtype::f32))
    return false;
  if (!t.data && std::all_of(t.shape, t.shape + t.dims, [](int64_t n) { return n > 0; })) return false;
  to = reinterpret_cast<T*>(static_cast<char*>(t.data) + t.byte_offset);
  return true;
}

// What a tensor says beside its memory, as far as it is asked: its dtype, and its sizes from the last on.
template <class Params, class... Members> void describe(Params& params, const dlpack::Tensor& t, Members... members) {
  [[maybe_unused]] int32_t dim = t.dims;
  [[maybe_unused]] const auto one = [&]<class T>(T& to) {
    if constexpr (std::is_same_v<T, Dtype>) dlpack::dtype_of(t, to);
    else to = dim > 0 ? t.shape[--dim] : 1;
  };
  (one(params.*members), ...);
}

}  // namespace detail

// A matrix whose rows `fits`: its memory, the stride of its rows, and what else it says.
template <auto load, auto fits, class Params, auto data, auto ld, auto... more>
bool put_matrix(Params& params, PyObject* value, Copies& copies) {
  if (value == Py_None) return true;
  dlpack::Tensor t;
  if (!copies.load<load>(value, t, fits) || !detail::point(params.*data, t)) return false;
  params.*ld = dlpack::row_stride(t);
  detail::describe(params, t, more...);
  return true;
}

// What is read as one piece, of any number of dimensions.
template <auto load, auto fits, class Params, auto data, auto... more>
bool put_piece(Params& params, PyObject* value, Copies& copies) {
  if (value == Py_None) return true;
  dlpack::Tensor t;
  if (!copies.load<load>(value, t, fits) || !detail::point(params.*data, t)) return false;
  detail::describe(params, t, more...);
  return true;
}

// What is written as one piece, and so not copied.
template <auto load, auto fits, class Params, auto data, auto... more>
bool put_written(Params& params, PyObject* value, Copies&) {
  if (value == Py_None) return true;
  dlpack::Tensor t;
  if (!load(value, t) || !fits(t) || !detail::point(params.*data, t)) return false;
  detail::describe(params, t, more...);
  return true;
}

// These of the CPU's tensors: rows of which neighbouring columns are adjacent, pieces at any address.
template <class P, auto... members> constexpr auto put_rows = put_matrix<dlpack::load, dlpack::has_rows, P, members...>;
template <class P, auto... members>
constexpr auto put_whole = put_piece<dlpack::load, dlpack::is_contiguous, P, members...>;
template <class P, auto... members>
constexpr auto put_output = put_written<dlpack::load, dlpack::is_contiguous, P, members...>;

// A weight, whose rows or columns are in one piece each: its memory, the stride of those, and whether they are columns.
template <class Params, auto data, auto ld, auto transposed, auto... more>
bool put_weight(Params& params, PyObject* value, Copies& copies) {
  if (value == Py_None) return true;
  const auto fits = [](const dlpack::Tensor& t) { return dlpack::has_rows(t) || dlpack::has_columns(t); };
  dlpack::Tensor t;
  if (!copies.load(value, t, fits) || !detail::point(params.*data, t)) return false;
  params.*transposed = !dlpack::has_rows(t);
  params.*ld = params.*transposed ? t.strides[1] : dlpack::row_stride(t);
  detail::describe(params, t, more...);
  return true;
}

}  // namespace fused_lora
