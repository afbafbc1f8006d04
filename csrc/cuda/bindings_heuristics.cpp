#include <pybind11/pybind11.h>
void bind_heuristics(pybind11::module_&) {}
