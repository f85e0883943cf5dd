// Forward and backward of a norm with the ReLU behind it, a chunk of samples at a time.
// Included by cpu/kernels/replicas.cpp alone, which is compiled once a SIMD level.
#pragma once

#include "cpu/replicas/lanes.h"

namespace svag {
namespace SVAG_SIMD {
namespace {

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

}  // namespace
}  // namespace SVAG_SIMD
}  // namespace svag
