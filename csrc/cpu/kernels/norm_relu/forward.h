// From inputs to moments, and from those to outputs.
// Included by norm_relu.cpp alone, which is compiled once a SIMD level.
#pragma once

#include <cmath>

#include "cpu/kernels/norm_relu/blocks.h"

namespace svag {
namespace SVAG_SIMD {
namespace {

template <class T>
struct ColumnMoments {
    const T* x;
    const Block& block;
    int64_t channels;
    double *means, *squares;

    template <class V, int U>
    SVAG_INLINE void strip(int64_t c, int64_t from) const {
        constexpr int64_t n = U * kLanes<T, V>;
        const auto rows = static_cast<double>(block.rows);
        double* mean = means + c;
        double* square = squares + c;
        T centre[n];
        sum_columns<T, V, U>(Plain<T, V>{x}, from, block.rows, channels, mean, square);
        for (int64_t j = 0; j < n; ++j) centre[j] = static_cast<T>(mean[j] / rows);
        const Centred<T, V, U, true> centred{x, Line<T, V, U, true>(centre)};
        sum_columns<T, V, U>(centred, from, block.rows, channels, mean, square);
        for (int64_t j = 0; j < n; ++j) {
            const double off = mean[j] / rows;
            square[j] -= off * mean[j];
            mean[j] = static_cast<double>(centre[j]) + off;
        }
    }
};

// Each channel's mean over a block, and its sum of squares about that.
template <class T>
void block_moments(const Call<T>& call, int64_t i) {
    const int64_t C = call.shape.channels;
    const Block block = call.blocks.at(i, C);
    const T* x = static_cast<const T*>(call.forward->x);
    double *means = call.first + i * C, *squares = call.second + i * C;
    if (call.shape.channels_last) {
        for_columns<T>(block, C, ColumnMoments<T>{x, block, C, means, squares});
    } else {
        using V = typename Simd<T>::V;
        for (int64_t c = 0; c < C; ++c) {
            const int64_t from = block.begin + c * block.rows;
            const auto rows = static_cast<double>(block.rows);
            sum_row<T>(Plain<T, V>{x}, Plain<T, T>{x}, from, block.rows, means + c, squares + c);
            const T centre = static_cast<T>(means[c] / rows);
            sum_row<T>(Centred<T, V, kWide, false>{x, Line<T, V, kWide, false>(&centre)},
                       Centred<T, T, 1, false>{x, Line<T, T, 1, false>(&centre)}, from, block.rows, means + c,
                       squares + c);
            const double off = means[c] / rows;
            squares[c] -= off * means[c];
            means[c] = static_cast<double>(centre) + off;
        }
    }
}

// A unit's mean and variance out of its cells, `step` apart, of `rows` values each, the last of `last_rows`.
void unit_moments(const double* means, const double* squares, int64_t cells, int64_t step, int64_t rows,
                  int64_t last_rows, double* mean, double* var) {
    const auto weight = [=](int64_t k) { return static_cast<double>(k + 1 < cells ? rows : last_rows); };
    double total = 0, sum = 0, square = 0;
    for (int64_t k = 0; k < cells; ++k) {
        total += weight(k);
        sum += weight(k) * means[k * step];
    }
    *mean = sum / total;
    for (int64_t k = 0; k < cells; ++k) {
        const double off = means[k * step] - *mean;
        square += squares[k * step] + weight(k) * off * off;
    }
    *var = square < 0 ? 0 : square / total;  // nan stays
}

double inverse_spread(double var, double eps) { return var + eps == 0 ? 0 : 1 / std::sqrt(var + eps); }

// The lines of a sample or a segment, out of its units' moments.
template <class T>
void set_lines(const Call<T>& call, int64_t line, const double* means, const double* vars, const void* weight,
               const void* bias) {
    const NormShape& s = call.shape;
    const int64_t units = s.groups > 0 ? s.groups : s.channels, width = s.channels / units;
    const Lines<T> lines = call.lines_of(line);
    const T *weights = static_cast<const T*>(weight), *biases = static_cast<const T*>(bias);
    for (int64_t unit = 0; unit < units; ++unit) {
        const double mean = means[line * units + unit], inverse = inverse_spread(vars[line * units + unit], s.eps);
        const T centre = static_cast<T>(mean);
        const double off = static_cast<double>(centre) - mean;  // the mean's part that T can't hold
        for (int64_t c = unit * width; c < (unit + 1) * width; ++c) {
            const double scale = weights == nullptr ? inverse : inverse * static_cast<double>(weights[c]);
            lines.centre[c] = centre;
            lines.scale[c] = static_cast<T>(scale);
            lines.shift[c] = static_cast<T>(off * scale + (biases == nullptr ? 0 : static_cast<double>(biases[c])));
        }
    }
}

// The moments of a sample's or a segment's units out of its blocks' cells: neighbouring channels', or every block's.
template <class T>
void line_moments(const Call<T>& call, int64_t line) {
    const NormShape& s = call.shape;
    const Blocks& blocks = call.blocks;
    const NormForward& f = *call.forward;
    const int64_t C = s.channels, units = s.groups > 0 ? s.groups : C, width = C / units;
    const int64_t cells = s.groups > 0 ? width : blocks.per_line, step = s.groups > 0 ? 1 : C;
    const int64_t last = blocks.pixels - (blocks.per_line - 1) * blocks.rows, begin = line * blocks.per_line * C;
    for (int64_t unit = 0; unit < units; ++unit) {
        const int64_t cell = begin + unit * width;
        unit_moments(call.first + cell, call.second + cell, cells, step, blocks.rows, last,
                     f.mean + line * units + unit, f.var + line * units + unit);
    }
    set_lines(call, line, f.mean, f.var, f.weight, f.bias);
}

template <class T, bool kResidual>
struct Apply {
    const Call<T>& call;
    const Lines<T> lines;
    template <class V, int U, bool kEach>
    SVAG_INLINE void strip(int64_t c, int64_t from, int64_t rows, int64_t stride) const {
        const NormForward& f = *call.forward;
        const Line<T, V, U, kEach> centre(lines.centre + c), scale(lines.scale + c), shift(lines.shift + c);
        const T *x = static_cast<const T*>(f.x) + from, *residual = static_cast<const T*>(f.residual);
        if constexpr (kResidual) residual += from;
        T* out = static_cast<T*>(f.y) + from;
        const bool relu = call.shape.relu;
        walk<T, V, U>(rows, stride, [&](int64_t i, int u) {
            V v = (load_raw<V>(x + i) - centre.at[u]) * scale.at[u] + shift.at[u];
            if constexpr (kResidual) v += load_raw<V>(residual + i);
            v = passed<T>(v, v, relu);
            std::memcpy(out + i, &v, sizeof v);
        });
    }
};

template <class T, bool kResidual>
void block_apply(const Call<T>& call, int64_t i) {
    const Block block = call.blocks.at(i, call.shape.channels);
    for_strips<T>(call.shape, block, Apply<T, kResidual>{call, call.lines_of(block.line)});
}

}  // namespace
}  // namespace SVAG_SIMD
}  // namespace svag
