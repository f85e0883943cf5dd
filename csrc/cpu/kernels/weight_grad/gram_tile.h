// Inner products of rows, a few of each side at a time, and a row's squared norm.
#pragma once

#include "cpu/simd.h"

namespace svag {
namespace SVAG_SIMD {
namespace {

// The sums of 4 by 3 products, 3 rows and one more stay in 16 registers.
constexpr int kDotRows = 4, kDotColumns = 3;

// Float32 sums run over this many elements, then continue in float64.
constexpr int64_t kDotRun = 1024;

// The sum of all lanes in float64; float32 lanes are folded once before.
SVAG_INLINE double dot_lanes(VDouble v) { return lane_sum(v); }
SVAG_INLINE double dot_lanes(VFloat v) {
    constexpr int half = Simd<float>::width / 2;
    float lanes[2 * half];
    std::memcpy(lanes, &v, sizeof v);
    double sum = 0;
    for (int i = 0; i < half; ++i) sum += static_cast<double>(lanes[i] + lanes[i + half]);
    return sum;
}

// Rows of `length` elements, a multiple of the vector's width; `pitch` from a row to the next.
template <class E>
struct Rows {
    const E* first;
    int64_t pitch, length;
    Rows from(int64_t row) const { return {first + row * pitch, pitch, length}; }
};

// out[m * out_pitch + n] = a_m . b_n; b's rows have a's pitch and length.
template <class E, int M, int N>
void dot_tile(const Rows<E>& a, const E* b, double* out, int64_t out_pitch) {
    using V = typename Simd<E>::V;
    constexpr int W = Simd<E>::width;
    for (int64_t begin = 0; begin < a.length; begin += kDotRun) {
        const int64_t end = a.length - begin < kDotRun ? a.length : begin + kDotRun;
        V sums[M][N];
        // Unrolled, or the sums would be an array in memory rather than registers.
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) sums[m][n] = V{};
        for (int64_t k = begin; k < end; k += W) {
            V y[N];
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) y[n] = load_raw<V>(b + n * a.pitch + k);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                const V x = load_raw<V>(a.first + m * a.pitch + k);
#pragma GCC unroll 8
                for (int n = 0; n < N; ++n) sums[m][n] += x * y[n];
            }
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
                double& to = out[m * out_pitch + n];
                const double sum = dot_lanes(sums[m][n]);
                to = begin == 0 ? sum : to + sum;
            }
    }
}

template <class E>
using DotTile = void (*)(const Rows<E>&, const E*, double*, int64_t);

template <class E>
DotTile<E> find_dot_tile(int64_t rows, int64_t columns) {
    static constexpr DotTile<E> tiles[kDotRows][kDotColumns] = {
        {&dot_tile<E, 1, 1>, &dot_tile<E, 1, 2>, &dot_tile<E, 1, 3>},
        {&dot_tile<E, 2, 1>, &dot_tile<E, 2, 2>, &dot_tile<E, 2, 3>},
        {&dot_tile<E, 3, 1>, &dot_tile<E, 3, 2>, &dot_tile<E, 3, 3>},
        {&dot_tile<E, 4, 1>, &dot_tile<E, 4, 2>, &dot_tile<E, 4, 3>},
    };
    return tiles[rows - 1][columns - 1];
}

// out[m * columns + n] = a_m . b_n, all of them.
inline void dot_block(const Rows<double>& a, int64_t rows, const Rows<double>& b, int64_t columns, double* out) {
    for (int64_t n = 0; n < columns; n += kDotColumns)
        for (int64_t m = 0; m < rows; m += kDotRows) {
            const int64_t count = rows - m < kDotRows ? rows - m : kDotRows;
            const int64_t width = columns - n < kDotColumns ? columns - n : kDotColumns;
            find_dot_tile<double>(count, width)(a.from(m), b.from(n).first, out + m * columns + n, columns);
        }
}

// The squared norm of n elements side by side.
template <class T>
double sq_norm(const T* row, int64_t n) {
    constexpr int W = Simd<double>::width;
    VDouble sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W)
        for (int k = 0; k < 4; ++k) {
            const VDouble v = Io<T, double>::load(row + i + k * W);
            sums[k] += v * v;
        }
    double sum = lane_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < n; ++i) sum += static_cast<double>(row[i]) * static_cast<double>(row[i]);
    return sum;
}

}  // namespace
}  // namespace SVAG_SIMD
}  // namespace svag
