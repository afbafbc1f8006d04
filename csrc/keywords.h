// The door from Python: functions that take keyword arguments only, each of which fills members of a params struct.
//
// A table says which keyword fills which members, so no argument has a position that could be mistaken. CPython hands
// the names over as interned strings, which are compared by address. pybind11's own keywords are interned again at each
// call, for 75 ns each: 1.4 us a call of cpu_forward (pybind11 3.1, CPython 3.11, Intel Xeon, 2026-11-26). Call with at
// most 15 keywords: from more, CPython's compiler builds a dict, for 0.3 us; numbers that belong together travel as a
// tuple. What comes past the fifteenth is optional.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <exception>
#include <iterator>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "lora.h"
#include "tensors.h"

namespace fused_lora {

template <class Params> struct Keyword {
  const char* name;
  // false where value is nothing that the members can hold; tensors' copies last as long as the call
  bool (*put)(Params& params, PyObject* value, Copies& copies);
  bool optional = false;  // members stay zero where it is not given
};

// to = value: an address, a number, an enumerator's number.
template <class T> bool put_value(T& to, PyObject* value) {
  if constexpr (std::is_pointer_v<T>) {
    const size_t address = PyLong_AsSize_t(value);
    to = reinterpret_cast<T>(address);
    return address != SIZE_MAX || !PyErr_Occurred();
  } else if constexpr (std::is_floating_point_v<T>) {
    to = static_cast<T>(PyFloat_AsDouble(value));
    return to != T{-1} || !PyErr_Occurred();
  } else {
    const long long number = PyLong_AsLongLong(value);
    to = static_cast<T>(number);
    return static_cast<long long>(to) == number && (number != -1 || !PyErr_Occurred());
  }
}

// to... = value, a tuple of as many.
template <class... T> bool put_tuple(PyObject* value, T&... to) {
  if (!PyTuple_Check(value) || PyTuple_GET_SIZE(value) != Py_ssize_t{sizeof...(to)}) return false;
  Py_ssize_t i = 0;
  return (put_value(to, PyTuple_GET_ITEM(value, i++)) && ...);
}

inline bool put_value(Dropout& to, PyObject* value) { return put_tuple(value, to.seed, to.threshold); }
inline bool put_value(CudaPlan& to, PyObject* value) {
  return put_tuple(value, to.y, to.h, to.dx, to.dh, to.wgrad, to.launches, to.h_share, to.dh_share);
}

// Fills the members: put<P, &P::h> from a number, put<P, &P::x, &P::ldx> from a tuple of two.
template <class Params, auto... members> bool put(Params& params, PyObject* value, Copies&) {
  if constexpr (sizeof...(members) == 1) return (put_value(params.*members, value), ...);
  else return put_tuple(value, params.*members...);
}

namespace detail {

template <class Params, size_t n> Params params_of(const Keyword<Params> (&)[n]);  // for its type only

template <const auto& keywords> inline PyObject* interned[std::size(keywords)];  // their names, filled by def_keywords

// Which of the keywords `name` is; the i-th argument mostly is the i-th keyword.
template <const auto& keywords> size_t find(PyObject* name, size_t i) {
  constexpr size_t n = std::size(keywords);
  if (i < n && interned<keywords>[i] == name) return i;
  for (size_t k = 0; k < n; ++k)
    if (interned<keywords>[k] == name || PyUnicode_CompareWithASCIIString(name, keywords[k].name) == 0) return k;
  return n;
}

// Params from a call's arguments. False, with Python's error set, where they are not the keywords, each once.
template <const auto& keywords, class Params>
bool parse(Params& params, Copies& copies, PyObject* const* args, Py_ssize_t positions, PyObject* names) {
  constexpr size_t n = std::size(keywords);
  static_assert(n < 64);
  const size_t given = names ? static_cast<size_t>(PyTuple_GET_SIZE(names)) : 0;
  uint64_t missing = 0;
  for (size_t k = 0; k < n; ++k) missing |= uint64_t{!keywords[k].optional} << k;
  if (positions) return PyErr_SetString(PyExc_TypeError, "arguments must be given by keyword"), false;
  for (size_t i = 0; i < given; ++i) {
    PyObject* name = PyTuple_GET_ITEM(names, static_cast<Py_ssize_t>(i));
    const size_t k = find<keywords>(name, i);
    if (k == n) return PyErr_Format(PyExc_TypeError, "%U is not a keyword of this function", name), false;
    if (!keywords[k].put(params, args[i], copies)) {
      if (copies.failed) return false;
      PyErr_Clear();
      const char* what = Py_TYPE(args[i])->tp_name;
      return PyErr_Format(PyExc_TypeError, "%s does not take this %s", keywords[k].name, what), false;
    }
    missing &= ~(uint64_t{1} << k);
  }
  for (size_t k = 0; missing && k < n; ++k)
    if (missing >> k & 1) return PyErr_Format(PyExc_TypeError, "%s is missing", keywords[k].name), false;
  return true;
}

// Other Python threads may run meanwhile. pybind11's own looks its thread state up first.
struct WithoutGil {
  PyThreadState* const state = PyEval_SaveThread();
  ~WithoutGil() { PyEval_RestoreThread(state); }
};

template <auto run, class Params> int64_t without_gil(Params& params) {
  const WithoutGil release;
  return run(params);
}

template <const auto& keywords, auto run>
PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t positions, PyObject* names) {
  decltype(params_of(keywords)) params{};
  Copies copies;
  if (!parse<keywords>(params, copies, args, positions, names)) return nullptr;
  try {
    if constexpr (std::is_void_v<decltype(run(params))>) {
      const WithoutGil release;
      run(params);
    } else {
      return PyLong_FromLongLong(without_gil<run>(params));
    }
  } catch (const std::invalid_argument& e) {
    return PyErr_SetString(PyExc_ValueError, e.what()), nullptr;
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::exception& e) {
    return PyErr_SetString(PyExc_RuntimeError, e.what()), nullptr;
  }
  Py_RETURN_NONE;
}

}  // namespace detail

// m.name(*, keywords...) calls run(params) without the GIL and returns its number, or None. `keywords` is a constexpr
// array of Keyword<Params>; an std::invalid_argument of run arrives as ValueError.
template <const auto& keywords, auto run> void def_keywords(pybind11::module_& m, const char* name, const char* doc) {
  static const std::string text = [&] {
    std::string signature = std::string(name) + "($module, /, *";
    for (const auto& keyword : keywords) signature += std::string(", ") + keyword.name;
    return signature + ")\n--\n\n" + doc;
  }();
  const auto function = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&detail::call<keywords, run>));
  static PyMethodDef methods[] = {{name, function, METH_FASTCALL | METH_KEYWORDS, text.c_str()}, {}};
  for (size_t k = 0; k < std::size(keywords); ++k)
    detail::interned<keywords>[k] = PyUnicode_InternFromString(keywords[k].name);
  if (PyModule_AddFunctions(m.ptr(), methods)) throw pybind11::error_already_set();
}

}  // namespace fused_lora
