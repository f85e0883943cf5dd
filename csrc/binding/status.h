// What every binding needs: addresses as Python gives them, and a kernel's status as an exception.
// Included by bindings.cpp alone, as is every header in this folder.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "tensor_list.h"
#ifdef SVAG_WITH_CUDA
#include "cuda/error.h"
#endif

namespace py = pybind11;

namespace {

using Addresses = std::vector<std::uintptr_t>;

void raise_for(int status) {
    switch (status) {
        case svag::kOk: return;
        case svag::kOutOfMemory: throw std::bad_alloc();
        case svag::kUnsupportedDType: throw std::invalid_argument("svag_fast._C: unsupported combination of dtypes");
        default: break;
    }
#ifdef SVAG_WITH_CUDA
    if (status < 0)
        throw std::runtime_error(std::string("CUDA error ") + svag_cuda_error_name(status) + ": " +
                                 svag_cuda_error_text(status));
#endif
    throw std::runtime_error("svag_fast._C: unknown status " + std::to_string(status));
}

}  // namespace
