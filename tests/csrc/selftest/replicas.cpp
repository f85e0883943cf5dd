#include "cpu/replicas/runs.h"

#include <cmath>
#include <vector>

#include "selftest.h"
#include "tensor_list.h"

namespace {

using svag::LayerKind;
using svag::LayerSpec;

LayerSpec layer(LayerKind kind, int64_t in, int64_t in_h, int64_t in_w, int64_t out, int64_t out_h, int64_t out_w) {
    LayerSpec spec{};
    spec.kind = kind;
    spec.in_channels = in, spec.in_height = in_h, spec.in_width = in_w;
    spec.out_channels = out, spec.out_height = out_h, spec.out_width = out_w;
    spec.kernel_h = spec.kernel_w = spec.stride_h = spec.stride_w = spec.groups = 1;
    spec.weight = spec.bias = -1;
    return spec;
}

// Convolution 3x3 of stride 2 with bias, group normalisation with ReLU, linear; 5x7 images, no size a whole vector.
constexpr int64_t kConvolution = 5 * 2 * 9, kTrained = kConvolution + 5 + 3 * 5 * 3 * 4;

std::vector<LayerSpec> chain() {
    LayerSpec conv = layer(LayerKind::affine, 2, 5, 7, 5, 3, 4);
    conv.kernel_h = conv.kernel_w = 3, conv.stride_h = conv.stride_w = 2;
    conv.weight = 0, conv.bias = kConvolution, conv.weight_trained = conv.bias_trained = 1;
    LayerSpec norm = layer(LayerKind::norm, 5, 3, 4, 5, 3, 4);
    norm.relu = 1, norm.eps = 1e-5;
    LayerSpec flatten = layer(LayerKind::flatten, 5, 3, 4, 60, 1, 1);
    LayerSpec linear = layer(LayerKind::affine, 60, 1, 1, 3, 1, 1);
    linear.weight = kConvolution + 5, linear.weight_trained = 1;
    return {conv, norm, flatten, linear};
}

std::vector<float> uniform(size_t n, uint64_t seed) {
    selftest::Random random(seed);
    std::vector<float> x(n);
    for (float& value : x) value = static_cast<float>(random.uniform());
    return x;
}

// A net with data and one run, and what a call needs beside them.
struct Trial {
    explicit Trial(int64_t samples) : net(chain(), false), inputs(uniform(static_cast<size_t>(samples * 70), 1)) {
        for (int64_t i = 0; i < samples; ++i) labels.push_back(i % 3), indices.push_back(i);
        run.weights = weights.data();
        run.seed = 7, run.batch_size = 4;
        run.l = run.c1 = 1, run.weight_decay = 0.25;
        run.rate_from = &from, run.rates = &rate, run.rate_count = 1;
        run.sums = sums;
        scratch.assign(static_cast<size_t>(net.view().scratch), 0.0f);
        walk = {&net.view(), {inputs.data(), labels.data(), nullptr, samples}, &run, &order, 1, 0, 1, scratch.data(), &slot};
    }

    double loss() {
        double found = 0;
        int64_t right = 0;
        EXPECT(SVAG_KERNEL(svag_replicas_evaluate)(walk, &found, &right) == svag::kOk);
        return found;
    }

    std::vector<float> gradient() {
        std::vector<float> g(static_cast<size_t>(kTrained));
        const auto size = static_cast<int64_t>(indices.size());
        EXPECT(SVAG_KERNEL(svag_replicas_gradient)(walk, indices.data(), size, g.data(), kTrained) == svag::kOk);
        return g;
    }

    svag::Net net;
    std::vector<float> inputs, weights = uniform(static_cast<size_t>(kTrained), 2), scratch;
    std::vector<int64_t> labels, indices;
    int64_t from = 0, order = 0;
    double rate = 0.5, sums[svag::kRunSums] = {};
    char slot = 0;
    svag::Run run{};
    svag::Walk walk{};
};

}  // namespace

SVAG_CHECK(replicas_gradient_is_the_slope_of_the_loss) {
    for (const int64_t samples : {1, 3, 37}) {
        Trial trial(samples);
        const std::vector<float> start = trial.weights, gradient = trial.gradient();
        for (const uint64_t seed : {3, 4, 5}) {
            const std::vector<float> way = uniform(start.size(), seed);
            const float h = 0x1p-12f;  // small: a ReLU bends in between
            double losses[2], slope = 0, size = 0;
            for (int side = 0; side < 2; ++side) {
                for (size_t i = 0; i < way.size(); ++i) trial.weights[i] = start[i] + (side ? h : -h) * way[i];
                losses[side] = trial.loss();
            }
            for (size_t i = 0; i < way.size(); ++i) {
                slope += static_cast<double>(gradient[i]) * static_cast<double>(way[i]);
                size += static_cast<double>(gradient[i]) * static_cast<double>(gradient[i]);
            }
            EXPECT(size > 1e-4);
            EXPECT_NEAR((losses[1] - losses[0]) / (2 * static_cast<double>(h)), slope, 0.01 * (std::sqrt(size) + 0.1));
        }
    }
}

SVAG_CHECK(replicas_step_follows_the_formula) {
    Trial trial(1);  // one sample: every batch is that one
    const std::vector<float> start = trial.weights, gradient = trial.gradient();
    trial.run.to_step = trial.run.last_step = 1;
    EXPECT(SVAG_KERNEL(svag_replicas_advance)(trial.walk) == svag::kOk);
    EXPECT(trial.run.step == 1 && !trial.run.diverged);
    for (size_t i = 0; i < start.size(); ++i) {
        const double x = static_cast<double>(start[i]), g = static_cast<double>(gradient[i]);
        EXPECT_NEAR(trial.weights[i], x - 0.5 * (g + 0.25 * x), 1e-6);
    }
}
