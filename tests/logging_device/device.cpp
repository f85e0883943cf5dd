// A PyTorch device "logged" (PrivateUse1, two of them) whose memory is the host's and whose ops the CPU computes. What
// it is for is its log: each op that a GPU would start work for is a launch, each wait of the host for the device a
// synchronisation, and both know which line of Python asked. As on a GPU, autograd's backward pass runs in a thread of
// the device's own.
//
// One op of ATen counts as one launch, however many kernels a GPU's library starts for it.
#include <Python.h>

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/ForeachUtils.h>
#include <ATen/ops/_foreach_add_native.h>
#include <ATen/ops/_foreach_mul_native.h>
#include <ATen/ops/_foreach_norm_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/csrc/autograd/function.h>
#include <torch/library.h>

#include <cstring>
#include <mutex>
#include <string>
#include <vector>

namespace {

constexpr auto kDevice = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex kDevices = 2;
thread_local c10::DeviceIndex current = 0;

// ---- the log

struct Entry {
    std::string kind, name, origin;
};
std::mutex mutex;
std::vector<Entry> entries;
thread_local int unlogged = 0;  // inside an op whose launch is counted already

struct Unlogged {
    Unlogged() { ++unlogged; }
    ~Unlogged() { --unlogged; }
};

// The innermost lines of Python's stack, innermost first; where there is none, autograd's node.
std::string origin() {
    std::string text;
    if (Py_IsInitialized()) {
        const PyGILState_STATE state = PyGILState_Ensure();
        PyFrameObject* frame = PyThreadState_GetFrame(PyThreadState_Get());
        for (int depth = 0; frame != nullptr && depth < 40; ++depth) {
            PyCodeObject* code = PyFrame_GetCode(frame);
            const char* file = PyUnicode_AsUTF8(code->co_filename);
            const char* function = PyUnicode_AsUTF8(code->co_name);
            if (file != nullptr && function != nullptr) {
                if (!text.empty()) text += "|";
                text += std::string(file) + ":" + std::to_string(PyFrame_GetLineNumber(frame)) + " " + function;
            } else {
                PyErr_Clear();
            }
            Py_DECREF(code);
            PyFrameObject* back = PyFrame_GetBack(frame);
            Py_DECREF(frame);
            frame = back;
        }
        Py_XDECREF(frame);
        PyGILState_Release(state);
    }
    if (const auto node = torch::autograd::get_current_node()) text += (text.empty() ? "" : "|") + ("backward of " + node->name());
    return text;
}

void note(const char* kind, const std::string& name) {
    if (unlogged != 0) return;
    std::string from = origin();
    const std::lock_guard<std::mutex> guard(mutex);
    entries.push_back({kind, name, std::move(from)});
}
void launch(const std::string& name) { note("launch", name); }
void synchronisation(const std::string& name) { note("synchronisation", name); }

// ---- the device

struct Allocator final : c10::Allocator {
    c10::DataPtr allocate(size_t bytes) override {
        void* p = c10::alloc_cpu(bytes ? bytes : 1);
        return {p, p, &c10::free_cpu, c10::Device(kDevice, current)};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
    void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Allocator allocator;
REGISTER_ALLOCATOR(kDevice, &allocator)

struct Hooks final : at::PrivateUse1HooksInterface {
    bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    c10::DeviceIndex deviceCount() const override { return kDevices; }
    c10::DeviceIndex getCurrentDevice() const override { return current; }
};

// One stream, whose events are done at once.
struct Guard final : c10::impl::DeviceGuardImplInterface {
    static constexpr c10::DeviceType static_type = kDevice;
    static c10::Stream stream_of(c10::Device d) { return c10::Stream(c10::Stream::DEFAULT, d); }
    static c10::Device here() { return c10::Device(kDevice, current); }
    c10::DeviceType type() const override { return kDevice; }
    c10::Device exchangeDevice(c10::Device d) const override {
        const auto before = here();
        setDevice(d);
        return before;
    }
    c10::Device getDevice() const override { return here(); }
    void setDevice(c10::Device d) const override { uncheckedSetDevice(d); }
    void uncheckedSetDevice(c10::Device d) const noexcept override {
        if (d.has_index()) current = d.index();
    }
    c10::Stream getStream(c10::Device d) const override { return stream_of(d); }
    c10::Stream getDefaultStream(c10::Device d) const override { return stream_of(d); }
    c10::Stream getNewStream(c10::Device d, int) const override { return stream_of(d); }
    c10::Stream getStreamFromGlobalPool(c10::Device d, bool) const override { return stream_of(d); }
    c10::Stream exchangeStream(c10::Stream s) const override { return stream_of(s.device()); }
    c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
    bool queryStream(const c10::Stream&) const override { return true; }
    void synchronizeStream(const c10::Stream&) const override { synchronisation("stream"); }
    void synchronizeDevice(c10::DeviceIndex) const override { synchronisation("device"); }
    void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
    void record(void** event, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {
        *event = reinterpret_cast<void*>(1);
    }
    void block(void*, const c10::Stream&) const override {}
    bool queryEvent(void*) const override { return true; }
    void synchronizeEvent(void*) const override { synchronisation("event"); }
    void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// ---- memory

struct At {  // allocations inside go to this device
    explicit At(std::optional<at::Device> d) : before(current) {
        if (d && d->has_index()) current = d->index();
    }
    ~At() { current = before; }
    c10::DeviceIndex before;
};

const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
    const At on(device);
    return at::detail::empty_generic(size, &allocator, kKeys, dtype.value_or(at::kFloat), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
    const At on(device);
    return at::detail::empty_strided_generic(size, stride, &allocator, kKeys, dtype.value_or(at::kFloat));
}

// The same memory as a CPU tensor.
at::Tensor on_host(const at::Tensor& t) {
    if (!t.defined() || t.device().type() != kDevice) return t;
    return at::from_blob(t.data_ptr(), t.sizes(), t.strides(), [t](void*) {}, at::TensorOptions().dtype(t.dtype()));
}
std::optional<at::Tensor> on_host(const std::optional<at::Tensor>& t) {
    return t && t->defined() ? std::optional<at::Tensor>(on_host(*t)) : std::nullopt;
}
// A CPU op's result in the device's own memory.
at::Tensor to_device(const at::Tensor& t, const at::Tensor& like) { return t.defined() ? t.to(like.device()) : t; }

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
    const bool reads = from.device().type() == kDevice, writes = to.device().type() == kDevice;
    if (reads && writes)
        launch("copy_");
    else if (non_blocking)
        launch(writes ? "copy from the host" : "copy to the host");
    else
        synchronisation(writes ? "copy from the host" : "copy to the host");
    const Unlogged inside;
    on_host(to).copy_(on_host(from));
    return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
    if (to.sizes() != from.sizes()) const_cast<at::Tensor&>(to).resize_(from.sizes());
    return copy_from(from, to, false);
}

const at::Tensor& resize(const at::Tensor& t, c10::SymIntArrayRef symbolic, std::optional<at::MemoryFormat>) {
    const auto size = C10_AS_INTARRAYREF_SLOW(symbolic);
    const auto bytes = static_cast<size_t>(c10::multiply_integers(size)) * t.itemsize();
    auto* storage = t.unsafeGetTensorImpl()->storage().unsafeGetStorageImpl();
    if (storage->nbytes() < bytes) {
        const At on(t.device());
        storage->set_data_ptr_noswap(allocator.allocate(bytes));
        storage->set_nbytes(bytes);
    }
    t.unsafeGetTensorImpl()->set_sizes_contiguous(size);
    return t;
}

at::Scalar item(const at::Tensor& t) {
    synchronisation("item");
    const Unlogged inside;
    return on_host(t).item();
}

at::Tensor as_strided(const at::Tensor& t, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
    return at::native::as_strided_tensorimpl(t, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                             offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt);
}
at::Tensor view(const at::Tensor& t, c10::SymIntArrayRef size) {
    return at::native::view(t, C10_AS_INTARRAYREF_SLOW(size));
}
at::Tensor reshape_alias(const at::Tensor& t, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
    return at::native::_reshape_alias(t, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

// ---- ops that PyTorch would else decompose, unlike on a GPU

at::Tensor convolution(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& bias,
                       c10::IntArrayRef stride, c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed,
                       c10::IntArrayRef output_padding, int64_t groups) {
    launch("convolution");
    const Unlogged inside;
    return to_device(at::convolution(on_host(x), on_host(w), on_host(bias), stride, padding, dilation, transposed,
                                     output_padding, groups),
                     x);
}

using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// cuDNN and ATen form the gradients of input, weight and bias by a launch each.
Three convolution_backward(const at::Tensor& b, const at::Tensor& x, const at::Tensor& w, c10::IntArrayRef stride,
                           c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed,
                           c10::IntArrayRef output_padding, int64_t groups, std::array<bool, 3> wanted) {
    const char* names[] = {"convolution's input gradient", "convolution's weight gradient", "convolution's bias gradient"};
    for (int i = 0; i < 3; ++i)
        if (wanted[i]) launch(names[i]);
    const Unlogged inside;
    const std::vector<int64_t> bias_size{w.size(transposed ? 1 : 0) * (transposed ? groups : 1)};
    auto [gx, gw, gb] = at::convolution_backward(on_host(b), on_host(x), on_host(w), at::OptionalIntArrayRef(bias_size),
                                                 stride, padding, dilation, transposed, output_padding, groups, wanted);
    return {to_device(gx, x), to_device(gw, x), to_device(gb, x)};
}

Three group_norm(const at::Tensor& x, const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                 c10::SymInt n, c10::SymInt c, c10::SymInt pixels, int64_t groups, double eps) {
    launch("native_group_norm");
    const Unlogged inside;
    auto [y, mean, rstd] = at::native_group_norm(on_host(x), on_host(weight), on_host(bias), n.expect_int(),
                                                 c.expect_int(), pixels.expect_int(), groups, eps);
    return {to_device(y, x), to_device(mean, x), to_device(rstd, x)};
}

Three group_norm_backward(const at::Tensor& b, const at::Tensor& x, const at::Tensor& mean, const at::Tensor& rstd,
                          const std::optional<at::Tensor>& weight, c10::SymInt n, c10::SymInt c, c10::SymInt pixels,
                          int64_t groups, std::array<bool, 3> wanted) {
    launch("native_group_norm_backward");
    const Unlogged inside;
    auto [gx, gw, gb] =
        at::native_group_norm_backward(on_host(b), on_host(x), on_host(mean), on_host(rstd), on_host(weight),
                                       n.expect_int(), c.expect_int(), pixels.expect_int(), groups, wanted);
    return {to_device(gx, x), to_device(gw, x), to_device(gb, x)};
}

// Lists in one launch where CUDA has them so: one device and layout, and of one dtype with a scalar tensor.
bool one_launch(at::TensorList tensors) { return at::native::can_use_fast_route(tensors); }

std::vector<at::Tensor> on_host(at::TensorList tensors) {
    std::vector<at::Tensor> out;
    for (const auto& t : tensors) out.push_back(on_host(t));
    return out;
}

void foreach_mul_tensor(at::TensorList tensors, const at::Tensor& factor) {
    const bool one = one_launch(tensors) && tensors[0].scalar_type() == factor.scalar_type();
    if (!one) return at::native::foreach_tensor_mul_tensor_kernel_slow_(tensors, factor);
    launch("_foreach_mul_");
    const Unlogged inside;
    auto listed = on_host(tensors);
    at::_foreach_mul_(listed, on_host(factor));
}

void foreach_mul_scalar(at::TensorList tensors, const at::Scalar& factor) {
    if (!one_launch(tensors)) return at::native::foreach_tensor_mul_scalar_kernel_slow_(tensors, factor);
    launch("_foreach_mul_");
    const Unlogged inside;
    auto listed = on_host(tensors);
    at::_foreach_mul_(listed, factor);
}

void foreach_add_scalar(at::TensorList tensors, const at::Scalar& term) {
    if (!one_launch(tensors)) return at::native::foreach_tensor_add_scalar_kernel_slow_(tensors, term);
    launch("_foreach_add_");
    const Unlogged inside;
    auto listed = on_host(tensors);
    at::_foreach_add_(listed, term);
}

std::vector<at::Tensor> foreach_norm(at::TensorList tensors, const at::Scalar& order, std::optional<at::ScalarType> dtype) {
    if (!one_launch(tensors)) return at::native::foreach_tensor_norm_slow(tensors, order, dtype);
    launch("_foreach_norm");
    const Unlogged inside;
    auto norms = at::_foreach_norm(on_host(tensors), order, dtype);
    for (size_t i = 0; i < norms.size(); ++i) norms[i] = to_device(norms[i], tensors[i]);
    return norms;
}

// ---- all other ops

bool is_host_list(const c10::IValue& value) {  // such as indices, which a GPU's op would fetch
    const auto moved = [](const at::Tensor& t) { return t.defined() && t.is_cpu() && t.dim() > 0; };
    if (value.isTensor()) return moved(value.toTensor());
    if (value.isTensorList())
        for (const at::Tensor& t : value.toTensorList())
            if (moved(t)) return true;
    if (value.isOptionalTensorList())
        for (const std::optional<at::Tensor>& t : value.toOptionalTensorList())
            if (t && moved(*t)) return true;
    return false;
}

void by_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    const auto& schema = op.schema();
    const std::string name = schema.name() + (schema.overload_name().empty() ? "" : "." + schema.overload_name());
    const auto arguments = torch::jit::last(*stack, schema.arguments().size());
    if (std::any_of(arguments.begin(), arguments.end(), is_host_list)) synchronisation("copy from the host for " + name);
    launch(name);
    // What it returns, or its size, the host must know.
    if (op.hasTag(at::Tag::dynamic_output_shape) || op.hasTag(at::Tag::data_dependent_output)) synchronisation(name);
    const Unlogged inside;
    at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
    m.impl("empty.memory_format", empty);
    m.impl("empty_strided", empty_strided);
    m.impl("_copy_from", copy_from);
    m.impl("_copy_from_and_resize", copy_from_and_resize);
    m.impl("resize_", resize);
    m.impl("_local_scalar_dense", item);
    m.impl("as_strided", as_strided);
    m.impl("view", view);
    m.impl("_reshape_alias", reshape_alias);
    m.impl("convolution_overrideable", convolution);
    m.impl("convolution_backward_overrideable", convolution_backward);
    m.impl("native_group_norm", group_norm);
    m.impl("native_group_norm_backward", group_norm_backward);
    m.impl("_foreach_mul_.Tensor", foreach_mul_tensor);
    m.impl("_foreach_mul_.Scalar", foreach_mul_scalar);
    m.impl("_foreach_add_.Scalar", foreach_add_scalar);
    m.impl("_foreach_norm.Scalar", foreach_norm);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_the_cpu>()); }

}  // namespace

// ---- what Python calls (ctypes.PyDLL)

extern "C" void logged_register() { at::RegisterPrivateUse1HooksInterface(new Hooks()); }  // lives as long as PyTorch

extern "C" void logged_note(const char* kind, const char* name) { note(kind, name); }

extern "C" void logged_pause(int by) { unlogged += by; }

// The entries since the last call, as a list of (kind, name, origin).
extern "C" PyObject* logged_take() {
    std::vector<Entry> taken;
    {
        const std::lock_guard<std::mutex> guard(mutex);
        taken.swap(entries);
    }
    PyObject* list = PyList_New(static_cast<Py_ssize_t>(taken.size()));
    for (size_t i = 0; list != nullptr && i < taken.size(); ++i)
        PyList_SET_ITEM(list, static_cast<Py_ssize_t>(i),
                        Py_BuildValue("(sss)", taken[i].kind.c_str(), taken[i].name.c_str(), taken[i].origin.c_str()));
    return list;
}
