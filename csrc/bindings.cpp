// The pybind11 module svag_fast._C: addresses, sizes and options in, a status out as an exception. No logic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "binding/replicas.h"
#include "binding/status.h"
#include "binding/step_tensors.h"
#include "cpu/affine_walk.h"
#include "cpu/kernels/weight_grad/weight_grad.h"
#include "cpu/kernels/weight_grad/weight_gram.h"
#include "cpu/norm_relu.h"
#include "cpu/philox_normal.h"
#include "cpu/simd_level.h"
#include "cpu/step_per_sample.h"
#ifdef SVAG_WITH_CUDA
#include "cuda/step.h"
#include "cuda/step_per_sample.h"
#endif

namespace {

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

#ifdef SVAG_WITH_CUDA
// The tensors of one of so many replicas, each of which has its elements behind the last one's.
std::vector<svag::StepTensor> of_one(const StepTensors& tensors, int64_t replicas) {
    auto found = tensors.plain();
    if (replicas > 1)
        for (auto& t : found) t.size /= replicas;
    return found;
}

// How many float64 values the step's partial sums take.
int64_t cuda_step_workspace(const StepTensors& tensors, int64_t replicas) {
    std::vector<int64_t> sizes;
    for (const auto& t : of_one(tensors, replicas)) sizes.push_back(t.size);
    return replicas * svag_step_cuda_workspace(sizes.data(), static_cast<int64_t>(sizes.size()));
}

void cuda_step(const StepTensors& step_tensors, double rate, double c1, double c2, double weight_decay,
               double momentum64, double momentum32, std::uintptr_t device_coefficients, bool skip_nonfinite,
               std::uintptr_t scale, std::uintptr_t found_inf, int64_t replicas, int device, std::uintptr_t stream,
               std::uintptr_t workspace, std::uintptr_t stats) {
    const auto tensors = of_one(step_tensors, replicas);
    const svag::CudaStepOptions options{{rate, c1, c2, weight_decay},
                                        {momentum64, momentum32},
                                        reinterpret_cast<const double*>(device_coefficients),
                                        skip_nonfinite,
                                        reinterpret_cast<const float*>(scale),
                                        reinterpret_cast<const float*>(found_inf),
                                        replicas,
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
    const auto tensors = StepTensors(params, grads1, grads2, {}, {}, sizes, dtypes, dtypes).plain();
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
    m.def("cuda_step_workspace", &cuda_step_workspace);
    m.def("cuda_step_per_sample", &cuda_step_per_sample);
    m.def("cuda_step_per_sample_workspace",
          [](const std::vector<int64_t>& sizes, const std::vector<int>& dtypes, int64_t samples) {
              return svag_step_per_sample_cuda_workspace(sizes.data(), dtypes.data(),
                                                         static_cast<int64_t>(sizes.size()), samples);
          });
#endif
}
