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

// One tensor of each list of a step: beside its gradients up to two that the optimizer keeps for it, written in place.
struct ReadTensor {
    void* param;
    const void* grad1;
    const void* grad2;
    void* kept[2];
    int64_t size;
    DType param_dtype, grad_dtype;
    DType kept_dtypes[2];
};

// Whose lists they are, by the dtypes that fit: the step of SVAG (gradients of the param's dtype or float32; kept are
// float32 compensation, not beside float64, and momentum in the param's arithmetic), or of Adam and RMSprop (all alike).
enum class StepKind : int { svag = 0, adaptive = 1 };

struct ReadTensors {
    std::vector<ReadTensor> tensors;
    bool has_grads2, has_kept[2];
    int32_t device_type, device_id;  // DLPack's

    bool all_float64() const;
};

// Whether no two of the tensors share memory of which one is written, or a first and a second gradient; but a gradient
// may be its param.
bool apart(const std::vector<ReadTensor>& tensors);

class TensorReader {
public:
    using OptionalList = std::optional<pybind11::list>;

    // From the types' `__dlpack_c_exchange_api__` and two of their methods; nothing where the interface's major version
    // is not known here.
    static std::optional<TensorReader> of(const pybind11::capsule& exchange_api, std::vector<pybind11::object> types,
                                          pybind11::object is_neg, pybind11::object storage_offset);

    // What a fused step may take as it is; nothing where anything needs a copy or an error: tensors of exactly the types
    // given, all on one device, the CPU or one of CUDA, whose address holds their values, params dense in memory,
    // gradients and what is kept of their shape and order in memory, both gradients of one dtype, dtypes as the kind
    // wants them; all `apart`.
    std::optional<ReadTensors> read(StepKind kind, const pybind11::list& params, const pybind11::list& grads1,
                                    const OptionalList& grads2, const OptionalList& kept1,
                                    const OptionalList& kept2) const;

private:
    TensorReader(dlpack::Read read, std::vector<pybind11::object> types, pybind11::object is_neg,
                 pybind11::object storage_offset)
        : read_(read),
          types_(std::move(types)),
          is_neg_(std::move(is_neg)),
          storage_offset_(std::move(storage_offset)) {}

    bool read_one(PyObject* object, dlpack::Tensor& tensor, DType& dtype) const;
    bool holds_values(PyObject* object, const dlpack::Tensor& tensor) const;
    static bool answers(const pybind11::object& method, PyObject* object, PyObject* expected);

    dlpack::Read read_;
    std::vector<pybind11::object> types_;
    pybind11::object is_neg_, storage_offset_;
};

}  // namespace svag
