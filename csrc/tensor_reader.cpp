#include "tensor_reader.h"

#include <algorithm>
#include <tuple>
#include <utility>

namespace py = pybind11;

namespace svag {
namespace {

constexpr int32_t kCpu = 1, kCuda = 2;
constexpr uint8_t kFloat = 2, kBfloat = 4;

bool dtype_of(const dlpack::Tensor& tensor, DType& dtype) {
    if (tensor.dtype_lanes != 1) return false;
    if (tensor.dtype_code == kBfloat && tensor.dtype_bits == 16)
        dtype = DType::bfloat16;
    else if (tensor.dtype_code != kFloat)
        return false;
    else if (tensor.dtype_bits == 32)
        dtype = DType::float32;
    else if (tensor.dtype_bits == 64)
        dtype = DType::float64;
    else if (tensor.dtype_bits == 16)
        dtype = DType::float16;
    else
        return false;
    return true;
}

int64_t size_of(const dlpack::Tensor& tensor) {
    int64_t size = 1;
    for (int32_t d = 0; d < tensor.ndim; ++d) size *= tensor.shape[d];
    return size;
}

// Whether the elements fill an interval of memory, each once, in whatever order of the dimensions.
bool is_dense(const dlpack::Tensor& tensor, int64_t size, std::vector<std::pair<int64_t, int64_t>>& scratch) {
    if (size == 0) return true;
    int64_t expected = 1;
    int32_t d = tensor.ndim - 1;
    for (; d >= 0 && (tensor.shape[d] == 1 || tensor.strides[d] == expected); --d) expected *= tensor.shape[d];
    if (d < 0) return true;  // contiguous
    scratch.clear();
    for (d = 0; d < tensor.ndim; ++d)
        if (tensor.shape[d] != 1) scratch.emplace_back(tensor.strides[d], tensor.shape[d]);
    std::sort(scratch.begin(), scratch.end());
    expected = 1;
    for (const auto& [stride, length] : scratch) {
        if (stride != expected) return false;
        expected *= length;
    }
    return true;
}

bool same_shape_and_order(const dlpack::Tensor& a, const dlpack::Tensor& b, int64_t size) {
    if (a.ndim != b.ndim || !std::equal(a.shape, a.shape + a.ndim, b.shape)) return false;
    for (int32_t d = 0; d < a.ndim && size != 0; ++d)
        if (a.shape[d] != 1 && a.strides[d] != b.strides[d]) return false;
    return true;
}

char* data_of(const dlpack::Tensor& tensor) { return static_cast<char*>(tensor.data) + tensor.byte_offset; }

int64_t item_size(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

enum Kind : int { kWritten = 0, kGrad1 = 1, kGrad2 = 2, kKinds = 3 };

// What a tensor fills. They sort by their places in memory, at one place by their kind.
struct Span {
    std::uintptr_t begin, end;
    Kind kind;
    bool operator<(const Span& other) const {
        return std::tie(begin, end, kind) < std::tie(other.begin, other.end, other.kind);
    }
};

}  // namespace

bool apart(const std::vector<ReadTensor>& tensors) {
    std::vector<Span> spans;
    spans.reserve(5 * tensors.size());
    for (const ReadTensor& t : tensors) {
        const auto add = [&](const void* data, DType dtype, Kind kind) {
            const auto begin = reinterpret_cast<std::uintptr_t>(data);
            if (data != nullptr && t.size != 0) spans.push_back({begin, begin + t.size * item_size(dtype), kind});
        };
        add(t.param, t.param_dtype, kWritten);
        for (int k = 0; k < 2; ++k) add(t.kept[k], t.kept_dtypes[k], kWritten);
        add(t.grad1, t.grad_dtype, kGrad1);
        add(t.grad2, t.grad_dtype, kGrad2);
    }
    std::sort(spans.begin(), spans.end());
    std::uintptr_t ends[kKinds] = {};  // how far those before reach
    Span written{};                    // the last
    for (const Span& span : spans) {
        if (span.kind == kWritten) {
            if (span.begin < std::max({ends[kWritten], ends[kGrad1], ends[kGrad2]})) return false;
            written = span;
        } else {
            if (span.begin < ends[span.kind == kGrad1 ? kGrad2 : kGrad1]) return false;
            // A gradient may be its param: its elements are read before they are written.
            if (span.begin < ends[kWritten] && (span.begin != written.begin || span.end != written.end)) return false;
        }
        ends[span.kind] = std::max(ends[span.kind], span.end);
    }
    return true;
}

bool ReadTensors::all_float64() const {
    return std::all_of(tensors.begin(), tensors.end(), [](const auto& t) { return t.param_dtype == DType::float64; });
}

std::optional<TensorReader> TensorReader::of(const py::capsule& exchange_api, std::vector<py::object> types,
                                             py::object is_neg, py::object storage_offset) {
    const auto* api = exchange_api.get_pointer<const dlpack::ExchangeApi>();
    while (api != nullptr && api->major != 1) api = api->previous;
    if (api == nullptr || api->read == nullptr) return std::nullopt;
    return TensorReader(api->read, std::move(types), std::move(is_neg), std::move(storage_offset));
}

bool TensorReader::answers(const py::object& method, PyObject* object, PyObject* expected) {
    const auto answer = py::reinterpret_steal<py::object>(PyObject_CallOneArg(method.ptr(), object));
    if (!answer) PyErr_Clear();
    return answer && PyObject_RichCompareBool(answer.ptr(), expected, Py_EQ) == 1;
}

// Whether the values are at the tensor's address: DLPack shows neither that they are the negated ones (`is_neg`) nor
// that the storage was freed, whose address is then null plus the tensor's offset in it.
bool TensorReader::holds_values(PyObject* object, const dlpack::Tensor& tensor) const {
    constexpr uintptr_t kSomewhereLow = uintptr_t(1) << 40;  // null plus any offset, and the heap of few programs
    const auto address = reinterpret_cast<uintptr_t>(data_of(tensor));
    if (address < kSomewhereLow && size_of(tensor) != 0) {
        const py::int_ zero(0);
        if (address == 0 || !answers(storage_offset_, object, zero.ptr())) return false;
    }
    return answers(is_neg_, object, Py_False);
}

bool TensorReader::read_one(PyObject* object, dlpack::Tensor& tensor, DType& dtype) const {
    const auto is_type = [&](const py::object& type) { return type.ptr() == reinterpret_cast<PyObject*>(Py_TYPE(object)); };
    if (std::none_of(types_.begin(), types_.end(), is_type)) return false;
    if (read_(object, &tensor) != 0) {
        PyErr_Clear();  // no memory of its own, as of a sparse tensor
        return false;
    }
    const bool device = tensor.device_type == kCpu || tensor.device_type == kCuda;
    return device && dtype_of(tensor, dtype) && holds_values(object, tensor);
}

std::optional<ReadTensors> TensorReader::read(StepKind kind, const py::list& params, const py::list& grads1,
                                              const OptionalList& grads2, const OptionalList& kept1,
                                              const OptionalList& kept2) const {
    const std::size_t count = params.size();
    const auto as_long = [&](const OptionalList& list) { return !list || list->size() == count; };
    if (count == 0 || grads1.size() != count || !as_long(grads2) || !as_long(kept1) || !as_long(kept2))
        return std::nullopt;
    ReadTensors found{std::vector<ReadTensor>(count), bool(grads2), {bool(kept1), bool(kept2)}, 0, 0};
    std::vector<std::pair<int64_t, int64_t>> scratch;
    for (std::size_t i = 0; i < count; ++i) {
        ReadTensor& t = found.tensors[i];
        dlpack::Tensor param;
        if (!read_one(PyList_GET_ITEM(params.ptr(), i), param, t.param_dtype)) return std::nullopt;
        if (i == 0) found.device_type = param.device_type, found.device_id = param.device_id;
        t.param = data_of(param);
        t.size = size_of(param);
        if (!is_dense(param, t.size, scratch)) return std::nullopt;
        const auto on_device = [&](const dlpack::Tensor& tensor) {
            return tensor.device_type == found.device_type && tensor.device_id == found.device_id;
        };
        if (!on_device(param)) return std::nullopt;
        // Reads what is beside the param; whether it fits.
        const auto beside = [&](const py::list& list, DType& dtype, char*& address) {
            dlpack::Tensor tensor;
            if (!read_one(PyList_GET_ITEM(list.ptr(), i), tensor, dtype)) return false;
            address = data_of(tensor);
            return on_device(tensor) && same_shape_and_order(tensor, param, t.size);
        };
        char* address;
        if (!beside(grads1, t.grad_dtype, address)) return std::nullopt;
        t.grad1 = address;
        const bool widened = kind == StepKind::svag && t.grad_dtype == DType::float32;
        if (t.grad_dtype != t.param_dtype && !widened) return std::nullopt;
        if (grads2) {
            DType dtype;
            if (!beside(*grads2, dtype, address) || dtype != t.grad_dtype) return std::nullopt;
            t.grad2 = address;
        }
        const DType arithmetic = t.param_dtype == DType::float64 ? DType::float64 : DType::float32;
        for (int k = 0; k < 2; ++k) {
            const OptionalList& kept = k == 0 ? kept1 : kept2;
            if (!kept) continue;
            if (!beside(*kept, t.kept_dtypes[k], address)) return std::nullopt;
            t.kept[k] = address;
            const bool compensation = kind == StepKind::svag && k == 0;
            const DType wanted =
                kind == StepKind::adaptive ? t.param_dtype : compensation ? DType::float32 : arithmetic;
            if (t.kept_dtypes[k] != wanted || (compensation && arithmetic == DType::float64)) return std::nullopt;
        }
    }
    if (!apart(found.tensors)) return std::nullopt;
    return found;
}

}  // namespace svag
