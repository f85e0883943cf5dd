// A step over lists of tensors, on the CPU.
#pragma once

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <optional>
#include <utility>
#include <vector>

#include "binding/status.h"
#include "cpu/adaptive_step.h"
#include "cpu/step.h"
#include "tensor_reader.h"

namespace {

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

    // An empty list means "none": no second gradients, nothing kept.
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

    // As the kernels take them, which add kept[0] to the params and have their momentum in kept[1].
    std::vector<svag::StepTensor> plain() const {
        std::vector<svag::StepTensor> tensors(read_.tensors.size());
        std::transform(read_.tensors.begin(), read_.tensors.end(), tensors.begin(), plain_one);
        return tensors;
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
            tensors[i] = {plain_one(t), t.kept[0], t.kept[1], step_sizes[i], bias_corrections2_sqrt[i]};
        }
        const svag::AdaptiveOptions options{c1,  c2,  weight_decay,   one_minus_beta1, beta2, one_minus_beta2,
                                            eps, skip_nonfinite, threads};
        py::gil_scoped_release unlocked;
        raise_for(SVAG_KERNEL(svag_adaptive_step)(tensors.data(), static_cast<int64_t>(tensors.size()), options,
                                                  reinterpret_cast<double*>(stats)));
    }

  private:
    StepTensors() = default;

    static svag::StepTensor plain_one(const svag::ReadTensor& t) {
        return {t.param, t.grad1, t.grad2, t.kept[0], t.kept[1], t.size, t.param_dtype, t.grad_dtype};
    }

    void step_segments(const svag::StepOptions* options, int64_t segments, std::uintptr_t stats) const {
        const auto tensors = plain();
        py::gil_scoped_release unlocked;
        raise_for(SVAG_KERNEL(svag_step)(tensors.data(), static_cast<int64_t>(tensors.size()), options, segments,
                                         reinterpret_cast<double*>(stats)));
    }

    bool has_grads2() const { return read_.has_grads2; }

    svag::ReadTensors read_{};
    py::object lists_;
};

}  // namespace
