// From the gradients of outputs to those of inputs.
// Included by norm_relu.cpp alone, which is compiled once a SIMD level.
#pragma once

#include "cpu/kernels/norm_relu/forward.h"

namespace svag {
namespace SVAG_SIMD {
namespace {

template <class T, bool kKept>
struct GradSumColumns {
    const Call<T>& call;
    const Block& block;
    const Lines<T>& lines;
    double *first, *second;
    template <class V, int U>
    SVAG_INLINE void strip(int64_t c, int64_t from) const {
        sum_columns<T, V, U>(Behind<T, V, U, true, kKept>(call.shape, *call.backward, lines, c), from, block.rows,
                             call.shape.channels, first + c, second + c);
    }
};

template <class T, bool kKept>
void block_grad_sums(const Call<T>& call, int64_t i) {
    const int64_t C = call.shape.channels;
    const Block block = call.blocks.at(i, C);
    const Lines<T> lines = call.lines_of(block.line);
    double *first = call.first + i * C, *second = call.second + i * C;
    if (call.shape.channels_last) {
        for_columns<T>(block, C, GradSumColumns<T, kKept>{call, block, lines, first, second});
    } else {
        using V = typename Simd<T>::V;
        for (int64_t c = 0; c < C; ++c)
            sum_row<T>(Behind<T, V, kWide, false, kKept>(call.shape, *call.backward, lines, c),
                       Behind<T, T, 1, false, kKept>(call.shape, *call.backward, lines, c),
                       block.begin + c * block.rows, block.rows, first + c, second + c);
    }
}

// With x^ = (x - mean) inverse and M values in the unit, the gradient of x is
// inverse (w y' - sum(w y')/M - x^ sum(w y' x^)/M). Turns the second cells from sums with x - centre into those with x^.
template <class T>
void line_grads(const Call<T>& call, int64_t line) {
    const NormShape& s = call.shape;
    const int64_t C = s.channels, units = s.groups > 0 ? s.groups : C, width = C / units;
    const Lines<T> lines = call.lines_of(line);
    const T* weight = static_cast<const T*>(call.backward->weight);
    const int64_t per_line = call.blocks.per_line;
    double *first = call.first + line * per_line * C, *second = call.second + line * per_line * C;
    const double values = static_cast<double>(call.blocks.pixels) * static_cast<double>(width);
    for (int64_t unit = 0; unit < units; ++unit) {
        const double mean = call.backward->mean[line * units + unit];
        const double inverse = inverse_spread(call.backward->var[line * units + unit], s.eps);
        double sum = 0, product = 0;
        for (int64_t c = unit * width; c < (unit + 1) * width; ++c) {
            const double off = static_cast<double>(lines.centre[c]) - mean;
            const double w = weight == nullptr ? 1 : static_cast<double>(weight[c]);
            for (int64_t b = 0; b < per_line; ++b) {
                double& cell = second[b * C + c];
                cell = (cell + off * first[b * C + c]) * inverse;
                sum += w * first[b * C + c];
                product += w * cell;
            }
        }
        const double slope = -inverse * inverse * product / values;
        for (int64_t c = unit * width; c < (unit + 1) * width; ++c) {
            lines.slope[c] = static_cast<T>(slope);
            lines.offset[c] = static_cast<T>(slope * (static_cast<double>(lines.centre[c]) - mean) -
                                             inverse * sum / values);
        }
    }
}

template <class T, bool kKept>
struct Grads {
    const Call<T>& call;
    const Lines<T> lines;
    template <class V, int U, bool kEach>
    SVAG_INLINE void strip(int64_t c, int64_t from, int64_t rows, int64_t stride) const {
        const NormBackward& g = *call.backward;
        const Behind<T, V, U, kEach, kKept> behind(call.shape, g, lines, c);
        const Line<T, V, U, kEach> slope(lines.slope + c), offset(lines.offset + c);
        T *x_grad = static_cast<T*>(g.x_grad), *residual_grad = static_cast<T*>(g.residual_grad);
        walk<T, V, U>(rows, stride, [&](int64_t j, int u) {
            const int64_t i = from + j;
            const V d = load_raw<V>(behind.x + i) - behind.centre.at[u];
            const V grad = behind.grad(i, u, d);
            const V out = behind.scale.at[u] * grad + slope.at[u] * d + offset.at[u];
            std::memcpy(x_grad + i, &out, sizeof out);
            if constexpr (kKept) std::memcpy(residual_grad + i, &grad, sizeof grad);
        });
    }
};

template <class T, bool kKept>
void block_grads(const Call<T>& call, int64_t i) {
    const Block block = call.blocks.at(i, call.shape.channels);
    for_strips<T>(call.shape, block, Grads<T, kKept>{call, call.lines_of(block.line)});
}

}  // namespace
}  // namespace SVAG_SIMD
}  // namespace svag
