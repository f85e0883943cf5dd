// The pybind11 module svag_fast._C: addresses, sizes and options in, a status out as an exception. No logic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/adaptive_step.h"
#include "cpu/affine_walk.h"
#include "cpu/kernels/weight_grad/weight_grad.h"
#include "cpu/kernels/weight_grad/weight_gram.h"
#include "cpu/norm_relu.h"
#include "cpu/philox_normal.h"
#include "cpu/replicas/net.h"
#include "cpu/replicas/runs.h"
#include "cpu/simd_level.h"
#include "cpu/step.h"
#include "cpu/step_per_sample.h"
#include "tensor_reader.h"
#ifdef SVAG_WITH_CUDA
#include "cuda/error.h"
#include "cuda/step.h"
#include "cuda/step_per_sample.h"
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

// The tensors of a step over lists: read and checked here, which keeps the lists alive, or described by the caller.
class StepTensors {
  public:
    using OptionalList = svag::TensorReader::OptionalList;

    static std::optional<StepTensors> read(const svag::TensorReader& reader, int kind, const py::list& params,
                                           const py::list& grads1, const OptionalList& grads2,
                                           const OptionalList& kept1, const OptionalList& kept2) {
        auto read = reader.read(static_cast<svag::StepKind>(kind), params, grads1, grads2, kept1, kept2);
        if (!read) return std::nullopt;
        StepTensors tensors;
        tensors.read_ = std::move(*read);
        tensors.lists_ = py::make_tuple(params, grads1, grads2, kept1, kept2);
        return tensors;
    }

    // An empty list stands for "none": no second gradients, nothing kept.
    StepTensors(const Addresses& params, const Addresses& grads1, const Addresses& grads2, const Addresses& kept1,
                const Addresses& kept2, const std::vector<int64_t>& sizes, const std::vector<int>& param_dtypes,
                const std::vector<int>& grad_dtypes)
        : read_{std::vector<svag::ReadTensor>(params.size()), !grads2.empty(), {!kept1.empty(), !kept2.empty()}, 0, 0} {
        for (std::size_t i = 0; i < params.size(); ++i) {
            svag::ReadTensor& t = read_.tensors[i];
            t.param = reinterpret_cast<void*>(params[i]);
            t.grad1 = reinterpret_cast<const void*>(grads1[i]);
            if (has_grads2()) t.grad2 = reinterpret_cast<const void*>(grads2[i]);
            for (int k = 0; k < 2; ++k)
                if (read_.has_kept[k]) t.kept[k] = reinterpret_cast<void*>((k == 0 ? kept1 : kept2)[i]);
            t.size = sizes[i];
            t.param_dtype = static_cast<svag::DType>(param_dtypes[i]);
            t.grad_dtype = static_cast<svag::DType>(grad_dtypes[i]);
        }
    }

    // What the constructor takes.
    py::tuple columns() const {
        py::list params, grads1, grads2, kept1, kept2, sizes, param_dtypes, grad_dtypes;
        const auto append = [](py::list& list, const void* address, bool given = true) {
            if (given) list.append(reinterpret_cast<std::uintptr_t>(address));
        };
        for (const svag::ReadTensor& t : read_.tensors) {
            append(params, t.param);
            append(grads1, t.grad1);
            append(grads2, t.grad2, has_grads2());
            append(kept1, t.kept[0], read_.has_kept[0]);
            append(kept2, t.kept[1], read_.has_kept[1]);
            sizes.append(t.size);
            param_dtypes.append(static_cast<int>(t.param_dtype));
            grad_dtypes.append(static_cast<int>(t.grad_dtype));
        }
        return py::make_tuple(params, grads1, grads2, kept1, kept2, sizes, param_dtypes, grad_dtypes);
    }

    bool all_float64() const { return read_.all_float64(); }

    // Whether the tensors of several steps, each `apart` in itself, are so together.
    static bool apart(const std::vector<StepTensors*>& steps) {
        std::vector<svag::ReadTensor> tensors;
        for (const StepTensors* step : steps)
            tensors.insert(tensors.end(), step->read_.tensors.begin(), step->read_.tensors.end());
        return svag::apart(tensors);
    }

    void step(double rate, double c1, double c2, double weight_decay, double momentum64, double momentum32,
              bool skip_nonfinite, int threads, std::uintptr_t stats) const {
        const svag::StepOptions options{rate, c1, c2, weight_decay, skip_nonfinite, threads, {momentum64, momentum32}};
        step_segments(&options, 1, stats);
    }

    // A segment of every tensor for each of `scalars`, which are those of `step`.
    void replicas_step(const std::vector<std::array<double, 6>>& scalars, bool skip_nonfinite, int threads,
                       std::uintptr_t stats) const {
        std::vector<svag::StepOptions> options;
        for (const auto& [rate, c1, c2, weight_decay, momentum64, momentum32] : scalars)
            options.push_back({rate, c1, c2, weight_decay, skip_nonfinite, threads, {momentum64, momentum32}});
        const auto segments = static_cast<int64_t>(options.size());
        const auto cut = [&](const svag::ReadTensor& t) { return segments > 0 && t.size % segments == 0; };
        if (!std::all_of(read_.tensors.begin(), read_.tensors.end(), cut))
            throw std::invalid_argument("svag_fast._C: the replicas' number doesn't divide a tensor's size");
        step_segments(options.data(), segments, stats);
    }

    void adaptive_step(const std::vector<double>& step_sizes, const std::vector<double>& bias_corrections2_sqrt,
                       double c1, double c2, double weight_decay, double one_minus_beta1, double beta2,
                       double one_minus_beta2, double eps, bool skip_nonfinite, int threads,
                       std::uintptr_t stats) const {
        std::vector<svag::AdaptiveTensor> tensors(read_.tensors.size());
        for (std::size_t i = 0; i < tensors.size(); ++i) {
            const svag::ReadTensor& t = read_.tensors[i];
            tensors[i] = {plain(t), t.kept[0], t.kept[1], step_sizes[i], bias_corrections2_sqrt[i]};
        }
        const svag::AdaptiveOptions options{c1,  c2,  weight_decay,   one_minus_beta1, beta2, one_minus_beta2,
                                            eps, skip_nonfinite, threads};
        py::gil_scoped_release unlocked;
        raise_for(SVAG_KERNEL(svag_adaptive_step)(tensors.data(), static_cast<int64_t>(tensors.size()), options,
                                                  reinterpret_cast<double*>(stats)));
    }

  private:
    StepTensors() = default;

    static svag::StepTensor plain(const svag::ReadTensor& t) {
        return {t.param, t.grad1, t.grad2, t.kept[0], t.kept[1], t.size, t.param_dtype, t.grad_dtype};
    }

    void step_segments(const svag::StepOptions* options, int64_t segments, std::uintptr_t stats) const {
        std::vector<svag::StepTensor> tensors(read_.tensors.size());
        std::transform(read_.tensors.begin(), read_.tensors.end(), tensors.begin(), plain);
        py::gil_scoped_release unlocked;
        raise_for(SVAG_KERNEL(svag_step)(tensors.data(), static_cast<int64_t>(tensors.size()), options, segments,
                                         reinterpret_cast<double*>(stats)));
    }

    bool has_grads2() const { return read_.has_grads2; }

    svag::ReadTensors read_{};
    py::object lists_;
};

void step_per_sample(const Addresses& params, const Addresses& grads1, const Addresses& grads2,
                     const std::vector<int64_t>& sizes, const std::vector<bool>& is_double, int64_t samples1,
                     int64_t samples2, double rate, double c1, double c2, double weight_decay, int threads,
                     std::uintptr_t sq_norms, std::uintptr_t stats) {
    std::vector<svag::PerSampleTensor> tensors(params.size());
    for (std::size_t i = 0; i < params.size(); ++i)
        tensors[i] = {reinterpret_cast<void*>(params[i]), reinterpret_cast<const void*>(grads1[i]),
                      reinterpret_cast<const void*>(grads2.empty() ? 0 : grads2[i]), sizes[i], is_double[i]};
    const svag::StepOptions options{rate, c1, c2, weight_decay, false, threads, {}};
    py::gil_scoped_release unlocked;
    raise_for(SVAG_KERNEL(svag_step_per_sample)(tensors.data(), static_cast<int64_t>(tensors.size()), samples1, samples2,
                                                options, reinterpret_cast<double*>(sq_norms),
                                                reinterpret_cast<double*>(stats)));
}

using FourStrides = std::array<int64_t, 4>;
// In the order of svag::LayerOperands, from `batch` to `dilation_w`.
using LayerSizes = std::array<int64_t, 16>;

// A layer of one shape and dtype; its tensors' addresses are given to each call.
svag::LayerOperands layer_operands(bool is_double, const FourStrides& input_strides, const FourStrides& output_strides,
                                   const LayerSizes& sizes) {
    svag::LayerOperands operands{};
    operands.is_double = is_double;
    std::copy(input_strides.begin(), input_strides.end(), operands.input_strides);
    std::copy(output_strides.begin(), output_strides.end(), operands.output_strides);
    static_assert(offsetof(svag::LayerOperands, dilation_w) - offsetof(svag::LayerOperands, batch) == 15 * 8, "");
    std::copy(sizes.begin(), sizes.end(), &operands.batch);
    return operands;
}

template <class Args>
Args layer_args(const svag::LayerOperands& operands, std::uintptr_t inputs, std::uintptr_t output_grads) {
    Args args{};
    static_cast<svag::LayerOperands&>(args) = operands;
    args.inputs = reinterpret_cast<const void*>(inputs);
    args.output_grads = reinterpret_cast<const void*>(output_grads);
    return args;
}

// step: rate, c1, c2, weight decay for a step of the weight, whose address `grad` then is; or empty.
void weight_grad(const svag::LayerOperands& operands, std::uintptr_t inputs, std::uintptr_t output_grads,
                 const std::vector<int64_t>& segment_ends, std::uintptr_t grad, const FourStrides& grad_strides,
                 std::uintptr_t sq_norms, int loop_order, int threads, int64_t segment_stride, std::uintptr_t weights,
                 std::uintptr_t order, std::uintptr_t segment_gram, const std::vector<double>& step,
                 std::uintptr_t weight_sq_norm) {
    auto args = layer_args<svag::WeightGradArgs>(operands, inputs, output_grads);
    args.weights = reinterpret_cast<const double*>(weights);
    args.order = reinterpret_cast<const int64_t*>(order);
    args.segment_ends = segment_ends.data();
    args.segments = static_cast<int64_t>(segment_ends.size());
    args.grad = reinterpret_cast<void*>(grad);
    std::copy(grad_strides.begin(), grad_strides.end(), args.grad_strides);
    args.segment_stride = segment_stride;
    args.sq_norms = reinterpret_cast<double*>(sq_norms);
    args.segment_gram = reinterpret_cast<double*>(segment_gram);
    args.loop_order = static_cast<svag::LoopOrder>(loop_order);
    args.threads = threads;
    svag::WeightStep weight_step{};
    if (!step.empty()) {
        weight_step = {step[0], step[1], step[2], step[3], reinterpret_cast<double*>(weight_sq_norm)};
        args.step = &weight_step;
    }
    py::gil_scoped_release unlocked;
    raise_for(SVAG_KERNEL(svag_weight_grad)(args));
}

void weight_gram(const svag::LayerOperands& operands, std::uintptr_t inputs, std::uintptr_t output_grads,
                 std::uintptr_t sq_norms, int threads) {
    auto args = layer_args<svag::WeightGramArgs>(operands, inputs, output_grads);
    args.sq_norms = reinterpret_cast<double*>(sq_norms);
    args.threads = threads;
    py::gil_scoped_release unlocked;
    raise_for(SVAG_KERNEL(svag_weight_gram)(args));
}

using Key = std::array<uint32_t, 2>;

void philox_normal(std::uintptr_t out, bool is_double, int64_t size, int64_t first, const Key& key, uint64_t draw) {
    const svag::NormalStream stream{{key[0], key[1]}, draw};
    py::gil_scoped_release unlocked;
    raise_for(SVAG_KERNEL(svag_philox_normal)(reinterpret_cast<void*>(out), is_double, size, first, stream));
}

void affine_walk(std::uintptr_t x, bool is_double, int64_t size, int64_t steps, double keep, double shift, double slope,
                 double spread, const std::vector<double>& weights, const Key& key, uint64_t draw, int threads) {
    const svag::AffineWalk walk{reinterpret_cast<void*>(x), is_double, size, steps, keep, shift, slope, spread,
                                weights.data(), static_cast<int64_t>(weights.size()), {{key[0], key[1]}, draw},
                                threads};
    py::gil_scoped_release unlocked;
    raise_for(SVAG_KERNEL(svag_affine_walk)(walk));
}

// Samples, channels, pixels, groups, segments.
using NormSizes = std::array<int64_t, 5>;

svag::NormShape norm_shape(const NormSizes& sizes, bool channels_last, bool is_double, bool relu, double eps,
                           int threads) {
    return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], channels_last, is_double, relu, eps, threads};
}

// Addresses in the order of svag::NormForward, 0 for what is absent.
void norm_relu(const svag::NormShape& shape, const std::array<std::uintptr_t, 7>& at) {
    const auto array = [&at](int k) { return reinterpret_cast<void*>(at[static_cast<std::size_t>(k)]); };
    const svag::NormForward arrays{array(0), array(1), array(2), array(3), array(4),
                                   static_cast<double*>(array(5)), static_cast<double*>(array(6))};
    py::gil_scoped_release unlocked;
    raise_for(SVAG_KERNEL(svag_norm_relu)(shape, arrays));
}

// Addresses in the order of svag::NormBackward.
void norm_relu_grad(const svag::NormShape& shape, const std::array<std::uintptr_t, 11>& at) {
    const auto array = [&at](int k) { return reinterpret_cast<void*>(at[static_cast<std::size_t>(k)]); };
    const auto doubles = [&array](int k) { return static_cast<double*>(array(k)); };
    const svag::NormBackward arrays{array(0), array(1), array(2), doubles(3), doubles(4), array(5),
                                    array(6), array(7), array(8), doubles(9), doubles(10)};
    py::gil_scoped_release unlocked;
    raise_for(SVAG_KERNEL(svag_norm_relu_grad)(shape, arrays));
}

// In the order of svag::LayerSpec, from `kind` to `bias_trained`.
using LayerFields = std::array<int64_t, 18>;

svag::Net replica_net(const std::vector<LayerFields>& layers, const std::vector<double>& eps, bool squared_error) {
    std::vector<svag::LayerSpec> specs(layers.size());
    for (std::size_t k = 0; k < layers.size(); ++k) {
        static_assert(sizeof(svag::LayerSpec) == sizeof(LayerFields) + sizeof(double), "");
        std::memcpy(static_cast<void*>(&specs[k]), layers[k].data(), sizeof(LayerFields));
        specs[k].eps = eps[k];
    }
    return svag::Net(specs, squared_error);
}

// Replicas of one net in memory: weights [count, parameters], frozen ones [count, frozen] or, with a stride of 0, shared.
struct Replicas {
    const svag::Net* net;
    std::uintptr_t weights;
    int64_t parameters;
    std::uintptr_t frozen;
    int64_t frozen_stride;
    std::vector<int64_t> order;  // the replicas that a call serves
    int threads;
    std::uintptr_t scratch, slots;
};

// Inputs, labels or else values, and how many.
using SampleAddresses = std::array<std::uintptr_t, 3>;

svag::Walk replica_walk(const Replicas& replicas, std::vector<svag::Run>& runs, const SampleAddresses& data,
                        int64_t count) {
    for (std::size_t i = 0; i < runs.size(); ++i) {
        const auto place = static_cast<int64_t>(i);
        runs[i].weights = reinterpret_cast<float*>(replicas.weights) + place * replicas.parameters;
        runs[i].frozen = reinterpret_cast<const float*>(replicas.frozen) + place * replicas.frozen_stride;
    }
    svag::Walk walk{};
    walk.net = &replicas.net->view();
    walk.data = {reinterpret_cast<const float*>(data[0]), reinterpret_cast<const int64_t*>(data[1]),
                 reinterpret_cast<const float*>(data[2]), count};
    walk.runs = runs.data();
    walk.order = replicas.order.data();
    walk.count = static_cast<int64_t>(replicas.order.size());
    walk.threads = replicas.threads;
    walk.scratch = reinterpret_cast<float*>(replicas.scratch);
    walk.slots = reinterpret_cast<char*>(replicas.slots);
    return walk;
}

// A replica's seed, batch size, l, c1, c2, weight decay, learning rates with the steps they hold from,
// step, the step to go to in this call, and the last one.
using RunFields = std::tuple<uint64_t, int64_t, double, double, double, double, std::vector<int64_t>,
                             std::vector<double>, int64_t, int64_t, int64_t>;

// Each replica's step and whether it has diverged are written before a signal's handler may run.
void replicas_advance(const Replicas& replicas, const std::vector<RunFields>& fields, const SampleAddresses& data,
                      int64_t count, int64_t measure_every, std::uintptr_t sums, std::uintptr_t steps,
                      std::uintptr_t diverged) {
    std::vector<svag::Run> runs(fields.size());
    for (std::size_t i = 0; i < runs.size(); ++i) {
        const auto& [seed, batch_size, l, c1, c2, weight_decay, rate_from, rates, step, to_step,
                     last_step] = fields[i];
        runs[i] = {nullptr, nullptr, seed, batch_size, l, c1, c2, weight_decay, rate_from.data(), rates.data(),
                   static_cast<int64_t>(rates.size()), step, to_step, last_step,
                   reinterpret_cast<double*>(sums) + static_cast<int64_t>(i) * svag::kRunSums, false};
    }
    svag::Walk walk = replica_walk(replicas, runs, data, count);
    walk.measure_every = measure_every;
    py::gil_scoped_release unlocked;
    raise_for(SVAG_KERNEL(svag_replicas_advance)(walk));
    for (const int64_t i : replicas.order) {
        reinterpret_cast<int64_t*>(steps)[i] = runs[static_cast<std::size_t>(i)].step;
        reinterpret_cast<bool*>(diverged)[i] = runs[static_cast<std::size_t>(i)].diverged;
    }
}

void replicas_evaluate(const Replicas& replicas, int64_t runs_count, const SampleAddresses& data, int64_t count,
                       std::uintptr_t losses, std::uintptr_t right) {
    std::vector<svag::Run> runs(static_cast<std::size_t>(runs_count));
    const svag::Walk walk = replica_walk(replicas, runs, data, count);
    py::gil_scoped_release unlocked;
    raise_for(SVAG_KERNEL(svag_replicas_evaluate)(walk, reinterpret_cast<double*>(losses),
                                                  reinterpret_cast<int64_t*>(right)));
}

void replicas_gradient(const Replicas& replicas, int64_t runs_count, const SampleAddresses& data, int64_t count,
                       const std::vector<int64_t>& indices, std::uintptr_t grads) {
    std::vector<svag::Run> runs(static_cast<std::size_t>(runs_count));
    const svag::Walk walk = replica_walk(replicas, runs, data, count);
    py::gil_scoped_release unlocked;
    raise_for(SVAG_KERNEL(svag_replicas_gradient)(walk, indices.data(), static_cast<int64_t>(indices.size()),
                                                  reinterpret_cast<float*>(grads), replicas.parameters));
}

#ifdef SVAG_WITH_CUDA
// An empty list stands for "none": no second gradients, no compensation, no momentum.
std::vector<svag::StepTensor> step_tensors(const Addresses& params, const Addresses& grads1, const Addresses& grads2,
                                           const Addresses& compensation, const Addresses& momentum_buffers,
                                           const std::vector<int64_t>& sizes, const std::vector<int>& param_dtypes,
                                           const std::vector<int>& grad_dtypes) {
    std::vector<svag::StepTensor> tensors(params.size());
    for (std::size_t i = 0; i < params.size(); ++i) {
        tensors[i] = {reinterpret_cast<void*>(params[i]),
                      reinterpret_cast<const void*>(grads1[i]),
                      reinterpret_cast<const void*>(grads2.empty() ? 0 : grads2[i]),
                      reinterpret_cast<void*>(compensation.empty() ? 0 : compensation[i]),
                      reinterpret_cast<void*>(momentum_buffers.empty() ? 0 : momentum_buffers[i]),
                      sizes[i],
                      static_cast<svag::DType>(param_dtypes[i]),
                      static_cast<svag::DType>(grad_dtypes[i])};
    }
    return tensors;
}

void cuda_step(const Addresses& params, const Addresses& grads1, const Addresses& grads2, const Addresses& compensation,
               const Addresses& momentum_buffers, const std::vector<int64_t>& sizes,
               const std::vector<int>& param_dtypes, const std::vector<int>& grad_dtypes, double rate, double c1,
               double c2, double weight_decay, double momentum64, double momentum32,
               std::uintptr_t device_coefficients, bool skip_nonfinite, std::uintptr_t scale, std::uintptr_t found_inf,
               int device, std::uintptr_t stream, std::uintptr_t workspace, std::uintptr_t stats) {
    const auto tensors =
        step_tensors(params, grads1, grads2, compensation, momentum_buffers, sizes, param_dtypes, grad_dtypes);
    const svag::CudaStepOptions options{{rate, c1, c2, weight_decay},
                                        {momentum64, momentum32},
                                        reinterpret_cast<const double*>(device_coefficients),
                                        skip_nonfinite,
                                        reinterpret_cast<const float*>(scale),
                                        reinterpret_cast<const float*>(found_inf),
                                        device,
                                        reinterpret_cast<void*>(stream),
                                        reinterpret_cast<double*>(workspace),
                                        reinterpret_cast<double*>(stats)};
    py::gil_scoped_release unlocked;
    raise_for(svag_step_cuda(tensors.data(), static_cast<int64_t>(tensors.size()), options));
}

void cuda_step_per_sample(const Addresses& params, const Addresses& grads1, const Addresses& grads2,
                          const std::vector<int64_t>& sizes, const std::vector<int>& dtypes, int64_t samples1,
                          int64_t samples2, double rate, double c1, double c2, double weight_decay, int device,
                          std::uintptr_t stream, std::uintptr_t workspace, std::uintptr_t sq_norms,
                          std::uintptr_t stats) {
    const auto tensors = step_tensors(params, grads1, grads2, {}, {}, sizes, dtypes, dtypes);
    const svag::CudaPerSampleOptions options{{rate, c1, c2, weight_decay},
                                             samples1,
                                             samples2,
                                             device,
                                             reinterpret_cast<void*>(stream),
                                             reinterpret_cast<double*>(workspace),
                                             reinterpret_cast<double*>(sq_norms),
                                             reinterpret_cast<double*>(stats)};
    py::gil_scoped_release unlocked;
    raise_for(svag_step_per_sample_cuda(tensors.data(), static_cast<int64_t>(tensors.size()), options));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "svag_fast's compiled kernels. Addresses are unchecked here: svag_fast.ops checks them first.";
    svag::select_simd_level_from_environment();
    m.def("simd_level", [] { return std::string(svag::simd_level_name(svag::simd_level())); });
    m.def("best_simd_level", [] { return std::string(svag::simd_level_name(svag::best_simd_level())); });
    m.def("select_simd_level", [](const std::string& name) { return svag::select_simd_level(name.c_str()); });
    using Numbers = std::vector<int>;
    py::class_<StepTensors>(m, "StepTensors")
        .def(py::init<const Addresses&, const Addresses&, const Addresses&, const Addresses&, const Addresses&,
                      const std::vector<int64_t>&, const Numbers&, const Numbers&>())
        .def_property_readonly("all_float64", &StepTensors::all_float64)
        .def_static("apart", &StepTensors::apart)
        .def("columns", &StepTensors::columns)
        .def("step", &StepTensors::step)
        .def("replicas_step", &StepTensors::replicas_step)
        .def("adaptive_step", &StepTensors::adaptive_step);
    py::class_<svag::TensorReader>(m, "TensorReader")
        .def_static("of", &svag::TensorReader::of)
        .def("read", &StepTensors::read);
    m.def("step_per_sample", &step_per_sample);
    py::class_<svag::LayerOperands>(m, "LayerOperands")
        .def(py::init(&layer_operands))
        .def("weight_grad", &weight_grad, py::arg("inputs"), py::arg("output_grads"), py::arg("segment_ends"),
             py::arg("grad"), py::arg("grad_strides"), py::arg("sq_norms"), py::arg("loop_order"), py::arg("threads"),
             py::arg("segment_stride") = 0, py::arg("weights") = 0, py::arg("order") = 0, py::arg("segment_gram") = 0,
             py::arg("step") = std::vector<double>(), py::arg("weight_sq_norm") = 0)
        .def("weight_gram", &weight_gram);
    m.def("philox_normal", &philox_normal);
    m.def("affine_walk", &affine_walk);
    py::class_<svag::NormShape>(m, "NormShape").def(py::init(&norm_shape));
    m.def("norm_relu", &norm_relu);
    m.def("norm_relu_grad", &norm_relu_grad);
    py::class_<svag::Net>(m, "ReplicaNet")
        .def(py::init(&replica_net))
        .def_property_readonly("scratch", [](const svag::Net& net) { return net.view().scratch; })
        .def_property_readonly("samples", [](const svag::Net& net) { return net.view().samples; });
    py::class_<Replicas>(m, "Replicas")
        .def(py::init([](const svag::Net& net, std::uintptr_t weights, int64_t parameters, std::uintptr_t frozen,
                         int64_t frozen_stride, std::vector<int64_t> order, int threads, std::uintptr_t scratch,
                         std::uintptr_t slots) {
                 return Replicas{&net, weights, parameters, frozen, frozen_stride, std::move(order),
                                 threads, scratch, slots};
             }),
             py::keep_alive<1, 2>())
        .def("advance", &replicas_advance)
        .def("evaluate", &replicas_evaluate)
        .def("gradient", &replicas_gradient);
#ifdef SVAG_WITH_CUDA
    m.def("cuda_step", &cuda_step);
    m.def("cuda_step_workspace", [](const std::vector<int64_t>& sizes) {
        return svag_step_cuda_workspace(sizes.data(), static_cast<int64_t>(sizes.size()));
    });
    m.def("cuda_step_per_sample", &cuda_step_per_sample);
    m.def("cuda_step_per_sample_workspace",
          [](const std::vector<int64_t>& sizes, const std::vector<int>& dtypes, int64_t samples) {
              return svag_step_per_sample_cuda_workspace(sizes.data(), dtypes.data(),
                                                         static_cast<int64_t>(sizes.size()), samples);
          });
#endif
}
