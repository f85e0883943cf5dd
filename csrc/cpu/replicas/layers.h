// Forward and backward of every kind of layer, a chunk of samples at a time.
// Included by cpu/kernels/replicas.cpp alone, which is compiled once a SIMD level.
#pragma once

#include "cpu/replicas/norm_layer.h"

namespace svag {
namespace SVAG_SIMD {
namespace {

// ---- affine: convolution and linear

void affine_forward(const Layer& l, float* s, const float* w, int64_t n) {
    const float* bias = l.bias_at < 0 ? nullptr : w + l.bias_at;
    multiply({s + l.in_at, l.rows_in, l.depth_in, l.depth, w + l.weight_at, l.depth_weight, s + l.out_at, l.rows_out,
              n * l.out.pixels(), l.out.pitch, {Finish::write, 0, 0, bias}});
}

void affine_backward(const Layer& l, float* s, float* transposed, const float* w, int64_t n, bool input_grad,
                     const Target& target) {
    const float* dz = s + l.out_grad_at;
    if (input_grad) {
        const int64_t size = l.in.pitch * l.out.pitch;
        for (int64_t i = 0; i < l.taps; ++i)
            transpose(w + l.weight_at + l.tap_order[i] * size, l.out.pitch, l.in.pitch, l.out.pitch,
                      transposed + i * size, l.in.pitch);
        for (int64_t i = 0; i < l.backward_count; ++i) {
            const BackwardProduct& b = l.backward[i];
            multiply({dz, b.dz, b.dz_depth, b.depth, transposed, b.weight_depth, s + l.in_grad_at, b.dx, n * b.rows,
                      l.in.pitch, {Finish::write, 0, 0, nullptr}});
        }
    }
    const int64_t rows = n * l.out.pixels();
    if (l.spec.weight_trained)
        multiply({s + l.in_at, l.depth_in, l.rows_in, rows, dz, l.rows_grad, target.base + l.weight_at, l.depth_weight,
                  l.depth, l.out.pitch, target.epilogue});
    if (l.bias_at >= 0 && l.spec.bias_trained)
        for (int64_t c = 0; c < l.out.pitch; c += W) {
            VFloat sum{};
            for (int64_t i = 0; i < rows; ++i) sum += load(dz + l.rows_grad[i] + c);
            finish(target.base + l.bias_at + c, sum, target.epilogue);
        }
}

// ---- activations

constexpr float kGeluInner = 0.044715f, kGeluScale = 0.79788456080286536f;  // sqrt(2/pi)

SVAG_INLINE float activation(LayerKind kind, float x) {
    switch (kind) {
        case LayerKind::tanh: return __builtin_tanhf(x);
        case LayerKind::gelu: return 0.5f * x * __builtin_erfcf(-0.70710678118654752f * x);
        case LayerKind::gelu_tanh:
            return 0.5f * x * (1.0f + __builtin_tanhf(kGeluScale * (x + kGeluInner * x * x * x)));
        default: return x < 0.0f ? 0.0f : x;
    }
}

SVAG_INLINE float slope(LayerKind kind, float x, float y) {
    switch (kind) {
        case LayerKind::tanh: return 1.0f - y * y;
        case LayerKind::gelu:
            return 0.5f * __builtin_erfcf(-0.70710678118654752f * x) +
                   x * 0.39894228040143268f * __builtin_expf(-0.5f * x * x);
        case LayerKind::gelu_tanh: {
            const float t = __builtin_tanhf(kGeluScale * (x + kGeluInner * x * x * x));
            return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * kGeluScale * (1.0f + 3.0f * kGeluInner * x * x);
        }
        default: return y > 0.0f ? 1.0f : 0.0f;
    }
}

void activation_forward(const Layer& l, float* s, int64_t n) {
    for (int64_t i = 0; i < n; ++i)
        for (int64_t y = 0; y < l.in.height; ++y) {
            const float* in = s + l.in_at + i * l.in.sample() + l.in.at(y, 0);
            float* out = s + l.out_at + i * l.out.sample() + l.out.at(y, 0);
            if (l.spec.kind == LayerKind::relu)
                for (int64_t c = 0; c < l.in.width * l.in.pitch; c += W) store(out + c, rectified(load(in + c)));
            else
                for (int64_t c = 0; c < l.in.width * l.in.pitch; ++c) out[c] = activation(l.spec.kind, in[c]);
        }
}

void activation_backward(const Layer& l, float* s, int64_t n) {
    for (int64_t i = 0; i < n; ++i)
        for (int64_t y = 0; y < l.in.height; ++y) {
            const float* in = s + l.in_at + i * l.in.sample() + l.in.at(y, 0);
            const float* out = s + l.out_at + i * l.out.sample() + l.out.at(y, 0);
            const float* g = s + l.out_grad_at + i * l.out_grad.sample() + l.out_grad.at(y, 0);
            float* dx = s + l.in_grad_at + i * l.in_grad.sample() + l.in_grad.at(y, 0);
            if (l.spec.kind == LayerKind::relu)
                for (int64_t c = 0; c < l.in.width * l.in.pitch; c += W)
                    store(dx + c, choose((VIntLanes)(load(out + c) > 0.0f), load(g + c), VFloat{}));
            else
                for (int64_t c = 0; c < l.in.width * l.in.pitch; ++c)
                    dx[c] = g[c] * slope(l.spec.kind, in[c], out[c]);
        }
}

// ---- mean over windows, and the order of a flattened image

void pool_forward(const Layer& l, float* s, int64_t n) {
    const LayerSpec& spec = l.spec;
    const float part = 1.0f / static_cast<float>(spec.kernel_h * spec.kernel_w);
    for (int64_t i = 0; i < n; ++i)
        each_pixel(l.out, [&](int64_t, int64_t y, int64_t x) {
            const float* in = s + l.in_at + i * l.in.sample() + l.in.at(y * spec.stride_h, x * spec.stride_w);
            float* out = s + l.out_at + i * l.out.sample() + l.out.at(y, x);
            for (int64_t c = 0; c < l.in.pitch; c += W) {
                VFloat sum{};
                for (int64_t a = 0; a < spec.kernel_h; ++a)
                    for (int64_t b = 0; b < spec.kernel_w; ++b) sum += load(in + a * l.in.row() + b * l.in.pitch + c);
                store(out + c, sum * part);
            }
        });
}

void pool_backward(const Layer& l, float* s, int64_t n) {
    const LayerSpec& spec = l.spec;
    const float part = 1.0f / static_cast<float>(spec.kernel_h * spec.kernel_w);
    for (int64_t i = 0; i < n; ++i) {
        float* all = s + l.in_grad_at + i * l.in_grad.sample();
        std::memset(all, 0, static_cast<size_t>(l.in_grad.sample()) * sizeof(float));
        each_pixel(l.out, [&](int64_t, int64_t y, int64_t x) {
            const float* g = s + l.out_grad_at + i * l.out_grad.sample() + l.out_grad.at(y, x);
            float* dx = all + l.in_grad.at(y * spec.stride_h, x * spec.stride_w);
            for (int64_t c = 0; c < l.in.pitch; c += W) {
                const VFloat v = load(g + c) * part;
                for (int64_t a = 0; a < spec.kernel_h; ++a)
                    for (int64_t b = 0; b < spec.kernel_w; ++b) {
                        float* to = dx + a * l.in_grad.row() + b * l.in_grad.pitch + c;
                        store(to, load(to) + v);
                    }
            }
        });
    }
}

// An image of P pixels becomes a vector whose element c P + p is channel c of pixel p.
void flatten_forward(const Layer& l, float* s, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const float* in = s + l.in_at + i * l.in.sample();
        float* out = s + l.out_at + i * l.out.sample();
        each_pixel(l.in, [&](int64_t pixel, int64_t y, int64_t x) {
            for (int64_t c = 0; c < l.in.channels; ++c) out[c * l.in.pixels() + pixel] = in[l.in.at(y, x) + c];
        });
    }
}

void flatten_backward(const Layer& l, float* s, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        const float* g = s + l.out_grad_at + i * l.out_grad.sample();
        float* dx = s + l.in_grad_at + i * l.in_grad.sample();
        each_pixel(l.in, [&](int64_t pixel, int64_t y, int64_t x) {
            float* to = dx + l.in_grad.at(y, x);
            for (int64_t c = 0; c < l.in.channels; ++c) to[c] = g[c * l.in.pixels() + pixel];
            for (int64_t c = l.in.channels; c < l.in.pitch; ++c) to[c] = 0;
        });
    }
}

// ---- the whole net

void forward(const NetView& net, float* s, int64_t n) {
    const float* w = s + net.weights_at;
    for (int64_t k = 0; k < net.count; ++k) {
        const Layer& l = net.layers[k];
        switch (l.spec.kind) {
            case LayerKind::affine: affine_forward(l, s, w, n); break;
            case LayerKind::norm: norm_forward(l, s, s + net.channels_at, w, n); break;
            case LayerKind::pool: pool_forward(l, s, n); break;
            case LayerKind::flatten: flatten_forward(l, s, n); break;
            default: activation_forward(l, s, n);
        }
    }
}

// A layer's weight may be stepped here: what is below it has been given its gradient by then.
void backward(const NetView& net, float* s, int64_t n, const Target& target) {
    const float* w = s + net.weights_at;
    for (int64_t k = net.count - 1; k >= net.first_trained; --k) {
        const Layer& l = net.layers[k];
        const bool input_grad = k > net.first_trained;
        switch (l.spec.kind) {
            case LayerKind::affine: affine_backward(l, s, s + net.transposed_at, w, n, input_grad, target); break;
            case LayerKind::norm:
                norm_backward(l, s, s + net.channels_at, s + net.norm_grad_at, w, n, input_grad, target);
                break;
            case LayerKind::pool: pool_backward(l, s, n); break;
            case LayerKind::flatten: flatten_backward(l, s, n); break;
            default: activation_backward(l, s, n);
        }
    }
}

}  // namespace
}  // namespace SVAG_SIMD
}  // namespace svag
