// Losses of a chunk of samples, and what they send back.
// Included by cpu/kernels/replicas.cpp alone, which is compiled once a SIMD level.
#pragma once

#include "cpu/replicas/layers.h"
#include "cpu/replicas/runs.h"

namespace svag {
namespace SVAG_SIMD {
namespace {

// exp(x) for x <= 0, to about an ulp; below -87 it is exp(-87); nan stays nan.
SVAG_INLINE VFloat exponential(VFloat x) {
    x = choose((VIntLanes)(x < -87.0f), VFloat{} - 87.0f, x);
    const float round = 0x1.8p23f;
    const VFloat n = (x * 1.44269504088896341f + round) - round;
    // log 2 in two parts, of which the first times n is exact.
    const VFloat r = (x - n * 0.693359375f) - n * -2.12194440054690583e-4f;
    // Taylor's series: |r| <= log(2)/2, so the next term is below 6e-9.
    VFloat p = VFloat{} + 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const VIntLanes power = (__builtin_convertvector(n, VIntLanes) + 127) << 23;
    return p * (VFloat)power;
}

// Cross-entropy of one sample; `grad`, if not null, gets its gradient times `weight`.
SVAG_INLINE double cross_entropy(const float* logits, float* grad, int64_t classes, int64_t pitch, int64_t label,
                                 float weight) {
    const float lowest = -3.402823466e38f;
    VFloat most = VFloat{} + lowest;
    for (int64_t c = 0; c < pitch; c += W) {
        const VFloat v = choose(channel_mask(c, classes), load(logits + c), VFloat{} + lowest);
        most = choose((VIntLanes)(v > most), v, most);
    }
    float largest = most[0];
    for (int i = 1; i < W; ++i) largest = most[i] > largest ? most[i] : largest;
    VFloat sums{};
    for (int64_t c = 0; c < pitch; c += W) {
        const VFloat e = choose(channel_mask(c, classes), exponential(load(logits + c) - largest), VFloat{});
        sums += e;
        if (grad != nullptr) store(grad + c, e);
    }
    const float sum = fold(sums);
    if (grad != nullptr) {
        const float scale = weight / sum;
        for (int64_t c = 0; c < pitch; c += W) store(grad + c, load(grad + c) * scale);
        grad[label] -= weight;
    }
    return static_cast<double>(__builtin_logf(sum)) + static_cast<double>(largest - logits[label]);
}

// The mean over the outputs of the squared error of one sample.
SVAG_INLINE double squared_error(const float* outputs, float* grad, int64_t count, int64_t pitch, const float* target,
                                 float weight) {
    const float scale = 2 * weight / static_cast<float>(count);
    double sum = 0;
    for (int64_t c = 0; c < count; ++c) {
        const float d = outputs[c] - target[c];
        sum += static_cast<double>(d) * static_cast<double>(d);
        if (grad != nullptr) grad[c] = d * scale;
    }
    if (grad != nullptr)
        for (int64_t c = count; c < pitch; ++c) grad[c] = 0;
    return sum / static_cast<double>(count);
}

// Whether the largest output is the label's, the first of equal ones.
SVAG_INLINE bool is_right(const float* outputs, int64_t count, int64_t label) {
    for (int64_t c = 0; c < count; ++c)
        if (c < label ? !(outputs[c] < outputs[label]) : !(outputs[c] <= outputs[label])) return false;
    return true;
}

// The loss of sample i of the chunk, whose index in `data` is `index`.
SVAG_INLINE double sample_loss(const NetView& net, const Samples& data, const float* s, float* grads, int64_t i,
                               int64_t index, float weight) {
    const float* outputs = s + net.output_at + i * net.output.sample();
    float* grad = grads == nullptr ? nullptr : grads + i * net.output.pitch;
    const int64_t count = net.output.channels, pitch = net.output.pitch;
    if (net.squared_error)
        return squared_error(outputs, grad, count, pitch, data.values + index * count, weight);
    return cross_entropy(outputs, grad, count, pitch, data.labels[index], weight);
}

// Put sample `index` in place i of the chunk.
SVAG_INLINE void fetch(const NetView& net, const Samples& data, float* s, int64_t i, int64_t index) {
    const Layout& in = net.input;
    float* to = s + net.input_at + i * in.sample();
    const float* from = data.inputs + index * in.pixels() * in.channels;
    for (int64_t y = 0; y < in.height; ++y) {
        float* row = to + in.at(y, 0);
        if (in.pitch == in.channels) {
            std::memcpy(row, from, static_cast<size_t>(in.width * in.channels) * sizeof(float));
            from += in.width * in.channels;
        } else {
            for (int64_t x = 0; x < in.width; ++x, from += in.channels)
                std::memcpy(row + x * in.pitch, from, static_cast<size_t>(in.channels) * sizeof(float));
        }
    }
}

}  // namespace
}  // namespace SVAG_SIMD
}  // namespace svag
