// How the product is cut into register tiles for one shape.
#pragma once

#include "cpu/kernels/weight_grad/tile.h"
#include "cpu/kernels/weight_grad/weight_grad.h"

namespace svag {
namespace SVAG_SIMD {
namespace {

SVAG_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The output positions [begin, end) at which tap k of one axis meets the image rather than its padding.
struct TapRange {
    int64_t begin, end;
    SVAG_INLINE int64_t size() const { return end - begin; }
};

SVAG_INLINE TapRange tap_range(int64_t k, int64_t size, int64_t out, int64_t stride, int64_t pad, int64_t dilation) {
    const int64_t shift = pad - k * dilation;  // position o reads the image at o * stride - shift
    const int64_t begin = shift > 0 ? ceil_div(shift, stride) : 0;
    const int64_t last = size - 1 + shift;
    int64_t end = last < 0 ? 0 : last / stride + 1;
    if (end > out) end = out;
    return {begin, begin < end ? end : begin};
}

// One operand's channels are read a scalar at a time (rows of a tile), the other's a vector at a time. Usually the
// vectors run over the input channels; `swapped`: over the outputs (few input channels: an image's three).
// `merged`: the taps of one kernel row are one tap of kernel_w * channels, side by side in memory, at the price of
// columns of zeros; else each tap has its own range of columns and the zeros are never multiplied.
struct Plan {
    bool swapped, merged;
    int64_t tap_channels;           // channels, or kernel_w * channels where merged
    int64_t taps;                   // kernel_h * kernel_w, or kernel_h where merged
    int64_t rows, row_tiles;        // a tile's largest M, and how many tiles cover all rows
    int64_t vectors, vector_tiles;  // the same for N
    int64_t row_count, lane_count;  // all rows; all lanes (elements along the vectors)
    int64_t left, right;            // columns of zeros where merged

    int64_t rows_of(int64_t tile) const { return tile + 1 < row_tiles ? rows : row_count - tile * rows; }
    template <class T>
    int64_t lanes_of(int64_t tile) const {
        const int64_t pitch = vectors * Simd<T>::width;
        return tile + 1 < vector_tiles ? pitch : lane_count - tile * pitch;
    }
    template <class T>
    int64_t tile_size() const {  // elements of one tap of one tile of dW
        return rows * vectors * Simd<T>::width;
    }
    int64_t tiles() const { return row_tiles * vector_tiles; }
};

// An estimate of the cycles of one sample and group: two multiply-adds or two loads a cycle, a latency of four.
template <class T>
double cost(const Plan& plan, const WeightGradArgs& a, int64_t last_vectors) {
    double tile_cycles = 0, tile_ends = 0;
    for (int part = 0; part < 4; ++part) {
        const bool last_row = part & 1, last_vector = part & 2;
        const int64_t m = last_row ? plan.rows_of(plan.row_tiles - 1) : plan.rows;
        const int64_t n = last_vector ? last_vectors : plan.vectors;
        const int64_t count =
            (last_row ? 1 : plan.row_tiles - 1) * (last_vector ? 1 : plan.vector_tiles - 1);
        const double arithmetic = m * n / 2.0, loads = (m + n) / 2.0;
        const double most = arithmetic > loads ? arithmetic : loads;
        tile_cycles += count * (most > 4 ? most : 4);
        tile_ends += count * (2 * m * n + 30);
    }
    double image_rows = 0, image_columns = 0;
    for (int64_t k = 0; k < a.kernel_h; ++k)
        image_rows += tap_range(k, a.height, a.out_height, a.stride_h, a.pad_h, a.dilation_h).size();
    for (int64_t k = 0; k < a.kernel_w; ++k)
        image_columns += tap_range(k, a.width, a.out_width, a.stride_w, a.pad_w, a.dilation_w).size();
    const double pixels = image_rows * (plan.merged ? a.out_width : image_columns);
    return pixels * tile_cycles + plan.taps * tile_ends;
}

template <class T>
Plan make_plan(const WeightGradArgs& a) {
    constexpr int64_t W = Simd<T>::width;
    Plan best{};
    double best_cost = -1;
    for (int option = 0; option < 4; ++option) {
        Plan plan{};
        plan.swapped = option & 1;
        plan.merged = option & 2;
        if (plan.merged && (a.kernel_w == 1 || a.dilation_w != 1)) continue;
        plan.tap_channels = plan.merged ? a.kernel_w * a.channels : a.channels;
        plan.taps = plan.merged ? a.kernel_h : a.kernel_h * a.kernel_w;
        plan.row_count = plan.swapped ? plan.tap_channels : a.outputs;
        plan.lane_count = plan.swapped ? a.outputs : plan.tap_channels;
        if (plan.merged) {
            const int64_t needed = (a.out_width - 1) * a.stride_w + a.kernel_w - a.pad_w - a.width;
            plan.left = a.pad_w;
            plan.right = needed > 0 ? needed : 0;
            // Padding of any size costs nothing where each tap has its own columns; here it would be memory.
            if (plan.left + plan.right > a.width + 64) continue;
        }
        const int64_t all_vectors = ceil_div(plan.lane_count, W);
        for (plan.vectors = 1; plan.vectors <= kMaxVectors && plan.vectors <= all_vectors; ++plan.vectors) {
            plan.vector_tiles = ceil_div(all_vectors, plan.vectors);
            plan.row_tiles = ceil_div(plan.row_count, kMaxRows[plan.vectors]);
            plan.rows = ceil_div(plan.row_count, plan.row_tiles);
            plan.row_tiles = ceil_div(plan.row_count, plan.rows);
            const double c = cost<T>(plan, a, all_vectors - (plan.vector_tiles - 1) * plan.vectors);
            if (best_cost < 0 || c < best_cost) {
                best = plan;
                best_cost = c;
            }
        }
    }
    return best;
}

}  // namespace
}  // namespace SVAG_SIMD
}  // namespace svag
