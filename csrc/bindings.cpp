// The pybind11 module svag_fast._C: addresses, sizes and options in, a status out as an exception. No logic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "cpu/simd_level.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
    m.doc() = "svag_fast's compiled kernels. Addresses are unchecked here: svag_fast.ops checks them first.";
    m.def("simd_level", [] { return std::string(svag::simd_level_name(svag::simd_level())); });
    m.def("best_simd_level", [] { return std::string(svag::simd_level_name(svag::best_simd_level())); });
    m.def("select_simd_level", [](const std::string& name) { return svag::select_simd_level(name.c_str()); });
}
