// The pybind11 module svag_fast._C: addresses, sizes and options in, a status out as an exception. No logic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/simd_level.h"
#include "cpu/step.h"
#include "cpu/triad.h"

namespace py = pybind11;

namespace {

using Addresses = std::vector<std::uintptr_t>;

void raise_for(int status) {
    switch (status) {
        case svag::kOk: return;
        case svag::kOutOfMemory: throw std::bad_alloc();
        case svag::kUnsupportedDType: throw std::invalid_argument("svag_fast._C: unsupported combination of dtypes");
        default: throw std::runtime_error("svag_fast._C: unknown status " + std::to_string(status));
    }
}

// An empty list stands for "none": no second gradients, no compensation.
std::vector<svag::StepTensor> step_tensors(const Addresses& params, const Addresses& grads1, const Addresses& grads2,
                                           const Addresses& compensation, const std::vector<int64_t>& sizes,
                                           const std::vector<int>& param_dtypes, const std::vector<int>& grad_dtypes) {
    std::vector<svag::StepTensor> tensors(params.size());
    for (std::size_t i = 0; i < params.size(); ++i) {
        tensors[i] = {reinterpret_cast<void*>(params[i]),
                      reinterpret_cast<const void*>(grads1[i]),
                      reinterpret_cast<const void*>(grads2.empty() ? 0 : grads2[i]),
                      reinterpret_cast<void*>(compensation.empty() ? 0 : compensation[i]),
                      sizes[i],
                      static_cast<svag::DType>(param_dtypes[i]),
                      static_cast<svag::DType>(grad_dtypes[i])};
    }
    return tensors;
}

void step(const Addresses& params, const Addresses& grads1, const Addresses& grads2, const Addresses& compensation,
          const std::vector<int64_t>& sizes, const std::vector<int>& param_dtypes, const std::vector<int>& grad_dtypes,
          double rate, double c1, double c2, double weight_decay, bool skip_nonfinite, int threads,
          std::uintptr_t stats) {
    const auto tensors = step_tensors(params, grads1, grads2, compensation, sizes, param_dtypes, grad_dtypes);
    const svag::StepOptions options{rate, c1, c2, weight_decay, skip_nonfinite, threads};
    py::gil_scoped_release unlocked;
    raise_for(SVAG_KERNEL(svag_step)(tensors.data(), static_cast<int64_t>(tensors.size()), options,
                                     reinterpret_cast<double*>(stats)));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "svag_fast's compiled kernels. Addresses are unchecked here: svag_fast.ops checks them first.";
    svag::select_simd_level_from_environment();
    m.def("simd_level", [] { return std::string(svag::simd_level_name(svag::simd_level())); });
    m.def("best_simd_level", [] { return std::string(svag::simd_level_name(svag::best_simd_level())); });
    m.def("select_simd_level", [](const std::string& name) { return svag::select_simd_level(name.c_str()); });
    m.def("step", &step);
    m.def("triad", [](std::uintptr_t x, std::uintptr_t y, std::uintptr_t z, int64_t size, int threads) {
        py::gil_scoped_release unlocked;
        raise_for(SVAG_KERNEL(svag_triad)(reinterpret_cast<float*>(x), reinterpret_cast<const float*>(y),
                                          reinterpret_cast<const float*>(z), size, threads));
    });
}
