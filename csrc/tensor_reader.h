// Reads PyTorch's tensors without its headers, by the C functions that the exchange standard DLPack 1 offers: an order
// of magnitude cheaper than asking Python for each tensor's address, dtype, shape and strides.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "tensor_list.h"

namespace svag {

// DLPack 1's binary interface, as far as it is used: https://dmlc.github.io/dlpack/latest/c_api.html
namespace dlpack {

struct Tensor {
    void* data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t dtype_code, dtype_bits;
    uint16_t dtype_lanes;
    const int64_t* shape;
    const int64_t* strides;
    uint64_t byte_offset;
};

// 0, or -1 with a Python exception set. What `shape` and `strides` point to is the tensor's own.
using Read = int (*)(void* py_object, Tensor* out);

struct ExchangeApi {
    uint32_t major, minor;
    const ExchangeApi* previous;
    void* managed_tensor_allocator;
    void* managed_tensor_from_py_object;
    void* managed_tensor_to_py_object;
    Read read;
    void* current_work_stream;
};

}  // namespace dlpack

class TensorReader {
public:
    // From the types' `__dlpack_c_exchange_api__`; nothing where its major version is not known here.
    static std::optional<TensorReader> of(const pybind11::capsule& exchange_api,
                                          std::vector<pybind11::object> types);

    // What a fused step on the CPU may take as it is; nothing where anything needs a copy, another backend or an error:
    // tensors of exactly the types given, on the CPU, params dense in memory and apart from each other, gradients of
    // their shape and order in memory, both of one dtype: the param's own or float32; momentum buffers likewise, of
    // float64 beside a param of float64, else float32, apart from each other and from the params.
    std::optional<std::vector<StepTensor>> step_tensors(
        const pybind11::list& params, const pybind11::list& grads1, const std::optional<pybind11::list>& grads2,
        const std::optional<pybind11::list>& momentum_buffers) const;

private:
    TensorReader(dlpack::Read read, std::vector<pybind11::object> types) : read_(read), types_(std::move(types)) {}

    bool read(PyObject* object, dlpack::Tensor& tensor, DType& dtype) const;

    dlpack::Read read_;
    std::vector<pybind11::object> types_;
};

}  // namespace svag
