// A replica's parameters between PyTorch's order and the order that the products read.
// Included by cpu/kernels/replicas.cpp alone, which is compiled once a SIMD level.
#pragma once

#include "cpu/replicas/net.h"
#include "cpu/replicas/product.h"
#include "cpu/replicas/runs.h"

namespace svag {
namespace SVAG_SIMD {
namespace {

// The weight of a linear layer or a 1x1 convolution is a matrix, which is only transposed.
SVAG_INLINE bool is_matrix(const Layer& l) { return l.spec.kind == LayerKind::affine && l.taps == 1; }

// As `transpose`, for any number of rows and columns.
void transpose_any(const float* from, int64_t from_pitch, int64_t rows, int64_t columns, float* to, int64_t to_pitch) {
    const int64_t whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
    transpose(from, from_pitch, whole_rows, whole_columns, to, to_pitch);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; ++j)
            to[j * to_pitch + i] = from[i * from_pitch + j];
}

// Call move(place in PyTorch's order, place in the packed order, whether trained) for every element of every parameter
// that is no matrix.
template <class Move>
SVAG_INLINE void each_weight(const NetView& net, const Move& move) {
    for (int64_t k = 0; k < net.count; ++k) {
        const Layer& l = net.layers[k];
        const LayerSpec& spec = l.spec;
        if (spec.kind == LayerKind::affine) {
            for (int64_t o = 0; !is_matrix(l) && o < spec.out_channels; ++o)
                for (int64_t c = 0; c < spec.in_channels; ++c)
                    for (int64_t tap = 0; tap < l.taps; ++tap)
                        move(spec.weight + (o * spec.in_channels + c) * l.taps + tap,
                             l.weight_at + (tap * l.in.pitch + c) * l.out.pitch + o, spec.weight_trained != 0);
            for (int64_t o = 0; l.bias_at >= 0 && o < spec.out_channels; ++o)
                move(spec.bias + o, l.bias_at + o, spec.bias_trained != 0);
        } else if (spec.kind == LayerKind::norm) {
            const int64_t pixels = spec.per_element ? l.in.pixels() : 1;
            for (int64_t c = 0; c < spec.in_channels; ++c)
                for (int64_t p = 0; p < pixels; ++p) {
                    const int64_t from = c * pixels + p, to = p * l.in.pitch + c;
                    if (l.weight_at >= 0) move(spec.weight + from, l.weight_at + to, spec.weight_trained != 0);
                    if (l.bias_at >= 0) move(spec.bias + from, l.bias_at + to, spec.bias_trained != 0);
                }
        }
    }
}

void pack(const NetView& net, const Run& run, float* packed) {
    for (int64_t k = 0; k < net.count; ++k) {
        const Layer& l = net.layers[k];
        const float* from = l.spec.weight_trained ? run.weights : run.frozen;
        if (is_matrix(l))
            transpose_any(from + l.spec.weight, l.spec.in_channels, l.spec.out_channels, l.spec.in_channels,
                          packed + l.weight_at, l.out.pitch);
    }
    each_weight(net, [&](int64_t from, int64_t to, bool trained) {
        packed[to] = (trained ? run.weights : run.frozen)[from];
    });
}

void unpack(const NetView& net, const float* packed, float* parameters) {
    for (int64_t k = 0; k < net.count; ++k) {
        const Layer& l = net.layers[k];
        if (is_matrix(l) && l.spec.weight_trained)
            transpose_any(packed + l.weight_at, l.out.pitch, l.spec.in_channels, l.spec.out_channels,
                          parameters + l.spec.weight, l.spec.in_channels);
    }
    each_weight(net, [&](int64_t to, int64_t from, bool trained) {
        if (trained) parameters[to] = packed[from];
    });
}

}  // namespace
}  // namespace SVAG_SIMD
}  // namespace svag
