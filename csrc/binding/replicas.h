// Replicas of one net in memory, trained by the fused kernel.
#pragma once

#include <pybind11/stl.h>

#include <array>
#include <cstddef>
#include <cstring>
#include <tuple>
#include <vector>

#include "binding/status.h"
#include "cpu/replicas/net.h"
#include "cpu/replicas/runs.h"

namespace {

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

}  // namespace
