// Forward and backward of every kind of layer, a chunk of samples at a time.
// Included by cpu/kernels/replicas.cpp alone, which is compiled once a SIMD level.
#pragma once

#include "cpu/replicas/net.h"
#include "cpu/replicas/product.h"

namespace svag {
namespace SVAG_SIMD {
namespace {

typedef int32_t VIntLanes __attribute__((vector_size(kVectorBytes)));

// The lanes' sum, by halves.
SVAG_INLINE float fold(VFloat v) {
#if SVAG_LEVEL == SVAG_LEVEL_avx512
    const __m256 half = _mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, (__m512)v, 0),
                                      _mm512_maskz_extractf32x8_ps(0xff, (__m512)v, 1));
    const Quad q = (Quad)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif SVAG_LEVEL == SVAG_LEVEL_avx2
    const Quad q = (Quad)_mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
#else
    const Quad q = v;
#endif
    return (q[0] + q[2]) + (q[1] + q[3]);
}

SVAG_INLINE VFloat choose(VIntLanes mask, VFloat a, VFloat b) { return (VFloat)select((VBits)mask, (VBits)a, (VBits)b); }

// All ones for the lanes of real channels.
SVAG_INLINE VIntLanes channel_mask(int64_t first, int64_t channels) {
    VIntLanes lane{};
    for (int i = 0; i < W; ++i) lane[i] = i;
    return (VIntLanes)(lane < static_cast<int32_t>(channels - first < W ? channels - first : W));
}

// Not max: nan stays nan.
SVAG_INLINE VFloat rectified(VFloat v) { return choose((VIntLanes)(v < 0.0f), VFloat{}, v); }

// Where the gradient of a weight goes: into the gradient, or as a step into the weight.
struct Target {
    float* base;  // the packed weights or gradients
    Epilogue epilogue;
};

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

// ---- norms

// Call body(pixel, y, x) for every pixel.
template <class Body>
SVAG_INLINE void each_pixel(const Layout& layout, const Body& body) {
    int64_t pixel = 0;
    for (int64_t y = 0; y < layout.height; ++y)
        for (int64_t x = 0; x < layout.width; ++x) body(pixel++, y, x);
}

// The sum of f(pixel, y, x) over the pixels, in two sums that don't wait for each other.
template <class F>
SVAG_INLINE VFloat pixel_sum(const Layout& layout, const F& f) {
    VFloat sums[2] = {};
    int64_t pixel = 0;
    for (int64_t y = 0; y < layout.height; ++y) {
        int64_t x = 0;
        for (; x + 2 <= layout.width; x += 2, pixel += 2) {
            sums[0] += f(pixel, y, x);
            sums[1] += f(pixel + 1, y, x + 1);
        }
        if (x < layout.width) sums[0] += f(pixel++, y, x);
    }
    return sums[0] + sums[1];
}

// One sum a channel becomes its group's, in every channel of the group; the padding becomes 0.
SVAG_INLINE void share_in_groups(float* sums, int64_t channels, int64_t groups, int64_t pitch, float factor) {
    const int64_t size = channels / groups;
    if (groups == 1) {
        VFloat sum{};
        for (int64_t c = 0; c < pitch; c += W) sum += choose(channel_mask(c, channels), load(sums + c), VFloat{});
        const VFloat all = VFloat{} + fold(sum) * factor;
        for (int64_t c = 0; c < pitch; c += W) store(sums + c, choose(channel_mask(c, channels), all, VFloat{}));
        return;
    }
    for (int64_t first = 0; first < channels; first += size) {
        float sum = 0;
        for (int64_t c = 0; c < size; ++c) sum += sums[first + c];
        for (int64_t c = 0; c < size; ++c) sums[first + c] = sum * factor;
    }
    for (int64_t c = channels; c < pitch; ++c) sums[c] = 0;
}

// A norm of one group over one pixel, as a LayerNorm of a vector is.
SVAG_INLINE bool is_row_norm(const Layer& l) { return l.spec.groups == 1 && l.in.pixels() == 1; }

void row_norm_forward(const Layer& l, float* s, const float* w, int64_t n) {
    const int64_t pitch = l.in.pitch, C = l.in.channels;
    const float part = 1.0f / static_cast<float>(C), eps = static_cast<float>(l.spec.eps);
    for (int64_t i = 0; i < n; ++i) {
        const float* in = s + l.in_at + i * l.in.sample();
        float* normalised = s + l.normalised_at + i * l.in.sample();
        float* out = s + l.out_at + i * l.out.sample() + l.out.at(0, 0);
        VFloat sum{}, squares{};
        for (int64_t c = 0; c < pitch; c += W) sum += load(in + c);  // the padding is 0
        const float mean = fold(sum) * part;
        for (int64_t c = 0; c < pitch; c += W) {
            VFloat d = load(in + c) - mean;
            if (c + W > C) d = choose(channel_mask(c, C), d, VFloat{});
            squares += d * d;
            store(normalised + c, d);
        }
        const float rstd = 1.0f / __builtin_sqrtf(fold(squares) * part + eps);
        s[l.rstd_at + i * pitch] = rstd;
        for (int64_t c = 0; c < pitch; c += W) {
            VFloat v = load(normalised + c) * rstd;
            if (c + W > C) v = choose(channel_mask(c, C), v, VFloat{});
            store(normalised + c, v);
            if (l.weight_at >= 0) v *= load(w + l.weight_at + c);
            if (l.bias_at >= 0) v += load(w + l.bias_at + c);
            store(out + c, l.spec.relu ? rectified(v) : v);
        }
    }
}

void norm_forward(const Layer& l, float* s, float* channels, const float* w, int64_t n) {
    if (is_row_norm(l)) return row_norm_forward(l, s, w, n);
    const int64_t pitch = l.in.pitch, C = l.in.channels, P = l.in.pixels();
    const float per_group = 1.0f / static_cast<float>(C / l.spec.groups * P), eps = static_cast<float>(l.spec.eps);
    const float* gamma = l.weight_at < 0 ? nullptr : w + l.weight_at;
    const float* beta = l.bias_at < 0 ? nullptr : w + l.bias_at;
    const int64_t step = l.spec.per_element ? pitch : 0;
    const bool copies = l.normalised_at != l.out_at;
    float* mean = channels;
    for (int64_t i = 0; i < n; ++i) {
        const float* in = s + l.in_at + i * l.in.sample();
        float* normalised = s + l.normalised_at + i * l.in.sample();
        float* out = s + l.out_at + i * l.out.sample();
        float* rstd = s + l.rstd_at + i * pitch;
        for (int64_t c = 0; c < pitch; c += W)
            store(mean + c, pixel_sum(l.in, [&](int64_t, int64_t y, int64_t x) { return load(in + l.in.at(y, x) + c); }));
        share_in_groups(mean, C, l.spec.groups, pitch, per_group);
        for (int64_t c = 0; c < pitch; c += W) {
            const VFloat m = load(mean + c);
            store(rstd + c, pixel_sum(l.in, [&](int64_t, int64_t y, int64_t x) {
                      const VFloat d = load(in + l.in.at(y, x) + c) - m;
                      return d * d;
                  }));
        }
        share_in_groups(rstd, C, l.spec.groups, pitch, per_group);
        for (int64_t c = 0; c < pitch; c += W) {
            const VFloat variance = load(rstd + c);
            store(rstd + c, choose(channel_mask(c, C), 1.0f / square_root(variance + eps), VFloat{}));
        }
        for (int64_t c = 0; c < pitch; c += W) {
            const VFloat m = load(mean + c), r = load(rstd + c);
            each_pixel(l.in, [&](int64_t pixel, int64_t y, int64_t x) {
                VFloat v = (load(in + l.in.at(y, x) + c) - m) * r;
                if (copies) store(normalised + l.in.at(y, x) + c, v);
                if (gamma != nullptr) v *= load(gamma + pixel * step + c);
                if (beta != nullptr) v += load(beta + pixel * step + c);
                store(out + l.out.at(y, x) + c, l.spec.relu ? rectified(v) : v);
            });
        }
    }
}

// The gradient of the input of a row norm, where its own weight isn't trained; `g` has gone through the ReLU.
void row_norm_backward(const Layer& l, float* s, const float* w, int64_t n) {
    const int64_t pitch = l.in.pitch, C = l.in.channels;
    const float part = 1.0f / static_cast<float>(C);
    for (int64_t i = 0; i < n; ++i) {
        float* g = s + l.out_grad_at + i * l.out_grad.sample() + l.out_grad.at(0, 0);
        const float* out = s + l.out_at + i * l.out.sample() + l.out.at(0, 0);
        const float* normalised = s + l.normalised_at + i * l.in.sample();
        float* dx = s + l.in_grad_at + i * l.in_grad.sample() + l.in_grad.at(0, 0);
        VFloat sum{}, products{};
        for (int64_t c = 0; c < pitch; c += W) {
            VFloat v = load(g + c);
            if (l.spec.relu) v = choose((VIntLanes)(load(out + c) > 0.0f), v, VFloat{});
            if (l.weight_at >= 0) v *= load(w + l.weight_at + c);
            store(g + c, v);
            sum += v;
            products += v * load(normalised + c);
        }
        const float m = fold(sum) * part, q = fold(products) * part, rstd = s[l.rstd_at + i * pitch];
        for (int64_t c = 0; c < pitch; c += W) {
            const VFloat v = (load(g + c) - m - load(normalised + c) * q) * rstd;
            store(dx + c, c + W <= C ? v : choose(channel_mask(c, C), v, VFloat{}));
        }
    }
}

void norm_backward(const Layer& l, float* s, float* channels, float* norm_grad, const float* w, int64_t n,
                   bool input_grad, const Target& target) {
    const int64_t pitch = l.in.pitch, C = l.in.channels, P = l.in.pixels();
    const float per_group = 1.0f / static_cast<float>(C / l.spec.groups * P);
    const float* gamma = l.weight_at < 0 ? nullptr : w + l.weight_at;
    const int64_t step = l.spec.per_element ? pitch : 0, size = l.spec.per_element ? P * pitch : pitch;
    const bool to_gamma = gamma != nullptr && l.spec.weight_trained;
    const bool to_beta = l.bias_at >= 0 && l.spec.bias_trained;
    if (is_row_norm(l) && !to_gamma && !to_beta) return row_norm_backward(l, s, w, n);
    float *gamma_grad = norm_grad, *beta_grad = norm_grad + size;
    if (to_gamma || to_beta) std::memset(norm_grad, 0, static_cast<size_t>(2 * size) * sizeof(float));
    float *sums = channels, *products = channels + pitch;
    for (int64_t i = 0; i < n; ++i) {
        float* g = s + l.out_grad_at + i * l.out_grad.sample();
        const float* out = s + l.out_at + i * l.out.sample();
        const float* normalised = s + l.normalised_at + i * l.in.sample();
        const float* rstd = s + l.rstd_at + i * pitch;
        const bool one_rstd = is_row_norm(l);
        float* dx = s + l.in_grad_at + i * l.in_grad.sample();
        if (l.spec.relu)
            for (int64_t y = 0; y < l.out.height; ++y)
                for (int64_t c = 0; c < l.out.width * pitch; c += W) {
                    float* at = g + l.out_grad.at(y, 0) + c;
                    store(at, choose((VIntLanes)(load(out + l.out.at(y, 0) + c) > 0.0f), load(at), VFloat{}));
                }
        if (to_gamma || to_beta)
            each_pixel(l.in, [&](int64_t pixel, int64_t y, int64_t x) {
                for (int64_t c = 0; c < pitch; c += W) {
                    const VFloat v = load(g + l.out_grad.at(y, x) + c);
                    float *dg = gamma_grad + pixel * step + c, *db = beta_grad + pixel * step + c;
                    store(dg, load(dg) + v * load(normalised + l.in.at(y, x) + c));
                    store(db, load(db) + v);
                }
            });
        if (!input_grad) continue;
        const auto grad_at = [&](int64_t pixel, int64_t y, int64_t x, int64_t c) {
            const VFloat v = load(g + l.out_grad.at(y, x) + c);
            return gamma == nullptr ? v : v * load(gamma + pixel * step + c);
        };
        for (int64_t c = 0; c < pitch; c += W) {
            store(sums + c, pixel_sum(l.in, [&](int64_t p, int64_t y, int64_t x) { return grad_at(p, y, x, c); }));
            store(products + c, pixel_sum(l.in, [&](int64_t p, int64_t y, int64_t x) {
                      return grad_at(p, y, x, c) * load(normalised + l.in.at(y, x) + c);
                  }));
        }
        share_in_groups(sums, C, l.spec.groups, pitch, per_group);
        share_in_groups(products, C, l.spec.groups, pitch, per_group);
        for (int64_t c = 0; c < pitch; c += W) {
            const VFloat m = load(sums + c), q = load(products + c), r = one_rstd ? VFloat{} + rstd[0] : load(rstd + c);
            each_pixel(l.in, [&](int64_t p, int64_t y, int64_t x) {
                const VFloat v = grad_at(p, y, x, c) - m - load(normalised + l.in.at(y, x) + c) * q;
                store(dx + l.in_grad.at(y, x) + c, v * r);
            });
        }
    }
    for (int64_t c = 0; c < size; c += W) {
        if (to_gamma) finish(target.base + l.weight_at + c, load(gamma_grad + c), target.epilogue);
        if (to_beta) finish(target.base + l.bias_at + c, load(beta_grad + c), target.epilogue);
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
