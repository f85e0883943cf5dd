// The inner product of the weight gradient: M scalars times N vectors a pixel, summed in registers over one sample's
// pixels, then squared into the sample's norm and added, weighted, to the batch's tile. Without norms one sum may run
// over several samples.
#pragma once

#include "cpu/simd.h"

namespace svag {
namespace SVAG_SIMD {
namespace {

// The largest M for N = 1, 2, 3 whose M*N sums, N vectors and one broadcast stay in registers.
#if SVAG_LEVEL == SVAG_LEVEL_avx512 || defined(__aarch64__)
constexpr int kMaxRows[4] = {0, 24, 14, 9};
#elif SVAG_LEVEL == SVAG_LEVEL_avx2
constexpr int kMaxRows[4] = {0, 12, 6, 4};
#else
constexpr int kMaxRows[4] = {0, 10, 5, 3};
#endif
constexpr int kMaxVectors = 3;

// One tap of one tile: offsets of its first pixel in both operands, and the pixels over which it is summed.
struct Tap {
    int64_t a, v;
    int64_t rows, columns;
};

// `a` is read a scalar, `v` a vector at a time; strides from a sample, a row, a pixel to the next.
template <class T>
struct TileOperands {
    const T* a;
    const T* v;
    int64_t a_row, a_pixel, v_row, v_pixel;
    T weight;
    int64_t samples, a_sample, v_sample;
};

// Memory that will be needed next, fetched into the second-level cache a little at each pixel.
struct Prefetch {
    const char* first;
    const char* second;
    int64_t first_step, second_step;  // bytes a pixel
};

template <class T>
using VectorBits = decltype(typename Simd<T>::V{} < typename Simd<T>::V{});

// The sums over the tap's pixels, M scalars by N vectors: dw += weight * sums, squares += sums².
// `last` keeps the valid lanes of the last vector: the others may hold a neighbour's data.
template <class T, int M, int N>
void tile_product(const TileOperands<T>& o, const Tap& tap, const VectorBits<T>& last, T* dw,
                  typename Simd<T>::V& squares, Prefetch& next) {
    using V = typename Simd<T>::V;
    constexpr int W = Simd<T>::width;
    V sums[M][N];
    // Unrolled, or the sums would be an array in memory rather than registers.
#pragma GCC unroll 32
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 32
        for (int n = 0; n < N; ++n) sums[m][n] = V{};
    const char *first = next.first, *second = next.second;
    for (int64_t sample = 0; sample < o.samples; ++sample)
        for (int64_t row = 0; row < tap.rows; ++row) {
            const T* a = o.a + tap.a + sample * o.a_sample + row * o.a_row;
            const T* v = o.v + tap.v + sample * o.v_sample + row * o.v_row;
            for (int64_t i = 0; i < tap.columns; ++i, a += o.a_pixel, v += o.v_pixel) {
                __builtin_prefetch(first, 0, 2);
                __builtin_prefetch(second, 0, 2);
                first += next.first_step;
                second += next.second_step;
                asm("" : "+r"(first), "+r"(second));  // or the compiler keeps both in one vector register
                V x[N];
#pragma GCC unroll 32
                for (int n = 0; n < N; ++n) x[n] = load_raw<V>(v + n * W);
#pragma GCC unroll 32
                for (int m = 0; m < M; ++m)
#pragma GCC unroll 32
                    for (int n = 0; n < N; ++n) sums[m][n] += a[m] * x[n];
            }
        }
    next.first = first;
    next.second = second;
    V square[4] = {};
    const T weight = o.weight;
#pragma GCC unroll 32
    for (int m = 0; m < M; ++m) {
        sums[m][N - 1] = (V)((VectorBits<T>)sums[m][N - 1] & last);
#pragma GCC unroll 32
        for (int n = 0; n < N; ++n) {
            const int i = m * N + n;
            square[i % 4] += sums[m][n] * sums[m][n];
            const V sum = load_raw<V>(dw + i * W) + weight * sums[m][n];
            std::memcpy(dw + i * W, &sum, sizeof sum);
        }
    }
    squares += (square[0] + square[1]) + (square[2] + square[3]);
}

template <class T>
using TileProduct = void (*)(const TileOperands<T>&, const Tap&, const VectorBits<T>&, T*, typename Simd<T>::V&, Prefetch&);

template <class T, int N, int M = kMaxRows[N]>
TileProduct<T> find_rows(int64_t rows) {
    if constexpr (M == 0)
        return nullptr;
    else
        return rows == M ? &tile_product<T, M, N> : find_rows<T, N, M - 1>(rows);
}

template <class T>
TileProduct<T> find_tile_product(int64_t rows, int64_t vectors) {
    return vectors == 1 ? find_rows<T, 1>(rows) : vectors == 2 ? find_rows<T, 2>(rows) : find_rows<T, 3>(rows);
}

// The sum of all lanes: halves are folded onto each other, the last in float64.
template <class T>
SVAG_INLINE double fold_lanes(typename Simd<T>::V v) {
    constexpr int W = Simd<T>::width;
    T lanes[W];
    std::memcpy(lanes, &v, sizeof v);
    for (int half = W / 2; half >= 1; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return static_cast<double>(lanes[0]);
}

}  // namespace
}  // namespace SVAG_SIMD
}  // namespace svag
