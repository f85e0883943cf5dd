// Products of matrices whose rows and depth are looked up in tables of offsets, a few rows and vectors at a time.
// Included by cpu/kernels/replicas.cpp alone, which is compiled once a SIMD level.
#pragma once

#include "cpu/simd.h"

namespace svag {
namespace SVAG_SIMD {
namespace {

constexpr int W = Simd<float>::width;

typedef float Quad __attribute__((vector_size(16)));

SVAG_INLINE VFloat load(const float* p) { return load_raw<VFloat>(p); }
SVAG_INLINE void store(float* p, VFloat v) { std::memcpy(p, &v, sizeof v); }

// What becomes of a finished sum: it is written, added, or is a gradient g in x -= rate (g + weight_decay x).
enum class Finish { write, add, step };

struct Epilogue {
    Finish finish;
    float rate, weight_decay;
    const float* bias;  // added to what is written; or null
};

SVAG_INLINE VFloat stepped(VFloat x, VFloat g, const Epilogue& e) { return x - e.rate * (g + e.weight_decay * x); }

SVAG_INLINE void finish(float* to, VFloat sum, const Epilogue& e) {
    if (e.finish == Finish::write)
        store(to, sum);
    else if (e.finish == Finish::add)
        store(to, load(to) + sum);
    else
        store(to, stepped(load(to), sum, e));
}

// c[c_rows[i] + j] = sum_k a[rows[i] + a_depth[k]] b[b_depth[k] + j] for i < row_count, j < columns.
struct Product {
    const float* a;
    const int32_t *rows, *a_depth;
    int64_t depth;
    const float* b;
    const int32_t* b_depth;
    float* c;
    const int32_t* c_rows;
    int64_t row_count, columns;  // whole vectors
    Epilogue epilogue;
};

template <int R, int N>
void tile(const Product& p, int64_t row, int64_t column) {
    const float* a[R];
    VFloat sums[R][N];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        a[r] = p.a + p.rows[row + r];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sums[r][n] = VFloat{};
    }
    const float* b = p.b + column;
    for (int64_t k = 0; k < p.depth; ++k) {
        const int64_t at = p.a_depth[k];
        VFloat vectors[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) vectors[n] = load(b + p.b_depth[k] + n * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const VFloat value = VFloat{} + a[r][at];
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) sums[r][n] += value * vectors[n];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            if (p.epilogue.bias != nullptr) sums[r][n] += load(p.epilogue.bias + column + n * W);
            finish(p.c + p.c_rows[row + r] + column + n * W, sums[r][n], p.epilogue);
        }
}

constexpr int kTileRows = 6;
#if SVAG_LEVEL == SVAG_LEVEL_avx512
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif

template <int N>
void rows_of_tiles(const Product& p, int64_t column) {
    using Tile = void (*)(const Product&, int64_t, int64_t);
    static constexpr Tile tiles[kTileRows] = {tile<1, N>, tile<2, N>, tile<3, N>, tile<4, N>, tile<5, N>, tile<6, N>};
    // As even as they can be: six rows and one are slower than four and three.
    const int64_t count = (p.row_count + kTileRows - 1) / kTileRows;
    for (int64_t i = 0, row = 0; i < count; ++i) {
        const int64_t rows = (p.row_count - row + (count - i) - 1) / (count - i);
        tiles[rows - 1](p, row, column);
        row += rows;
    }
}

void multiply(const Product& p) {
    int64_t column = 0;
    if constexpr (kTileVectors == 4)
        for (; column + 4 * W <= p.columns; column += 4 * W) rows_of_tiles<4>(p, column);
    for (; column + 2 * W <= p.columns; column += 2 * W) rows_of_tiles<2>(p, column);
    for (; column < p.columns; column += W) rows_of_tiles<1>(p, column);
}

// to[j * to_pitch + i] = from[i * from_pitch + j] for i < rows, j < columns, both multiples of 4.
void transpose(const float* from, int64_t from_pitch, int64_t rows, int64_t columns, float* to, int64_t to_pitch) {
    const auto quad = [](const float* p) {
        Quad q;
        std::memcpy(&q, p, sizeof q);
        return q;
    };
    const auto put = [](float* p, Quad q) { std::memcpy(p, &q, sizeof q); };
#if defined(__clang__)
#define SVAG_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
    typedef int32_t Places __attribute__((vector_size(16)));
#define SVAG_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, Places{i, j, k, l})
#endif
    for (int64_t i = 0; i < rows; i += 4)
        for (int64_t j = 0; j < columns; j += 4) {
            const float* f = from + i * from_pitch + j;
            float* t = to + j * to_pitch + i;
            const Quad a = quad(f), b = quad(f + from_pitch), c = quad(f + 2 * from_pitch), d = quad(f + 3 * from_pitch);
            const Quad ab0 = SVAG_SHUFFLE(a, b, 0, 4, 1, 5), ab1 = SVAG_SHUFFLE(a, b, 2, 6, 3, 7);
            const Quad cd0 = SVAG_SHUFFLE(c, d, 0, 4, 1, 5), cd1 = SVAG_SHUFFLE(c, d, 2, 6, 3, 7);
            put(t, SVAG_SHUFFLE(ab0, cd0, 0, 1, 4, 5));
            put(t + to_pitch, SVAG_SHUFFLE(ab0, cd0, 2, 3, 6, 7));
            put(t + 2 * to_pitch, SVAG_SHUFFLE(ab1, cd1, 0, 1, 4, 5));
            put(t + 3 * to_pitch, SVAG_SHUFFLE(ab1, cd1, 2, 3, 6, 7));
        }
#undef SVAG_SHUFFLE
}

}  // namespace
}  // namespace SVAG_SIMD
}  // namespace svag
