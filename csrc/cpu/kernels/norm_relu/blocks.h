// The samples are cut into blocks of consecutive pixels, one block a sample or, where a channel's statistics are of
// many samples and channels are innermost, as many pixels as fill a cache. A block gives each of its channels two sums;
// those are added up in the order of the blocks. So results depend on neither the threads nor the SIMD level.
// Included by norm_relu.cpp alone, which is compiled once a SIMD level.
#pragma once

#include "cpu/norm_relu.h"
#include "cpu/simd.h"

namespace svag {
namespace SVAG_SIMD {
namespace {

// Elements that a thread takes at a time, and that stay in its second-level cache from one walk to the next.
constexpr int64_t kChunk = 16384;
// Below this many elements waking a second thread costs more than it saves.
constexpr int64_t kSerial = 32768;
// Rows of vectors over which sums run in the elements' own precision; above, in float64.
constexpr int64_t kRun = 64;

template <class T>
struct BitsOf {
    using type = VBits;
};
template <>
struct BitsOf<double> {
    using type = VWord;
};

// V is a SIMD vector, or T itself for what fills none.
template <class T, class V>
constexpr int64_t kLanes = static_cast<int64_t>(sizeof(V) / sizeof(T));
// Vectors side by side: 64 bytes at every level, so that sums over one channel are of the same terms everywhere.
constexpr int kWide = 64 / kVectorBytes;
template <class T>
constexpr int64_t kWideLanes = static_cast<int64_t>(64 / sizeof(T));

template <class T, class V>
SVAG_INLINE V spread(T value) {
    if constexpr (sizeof(V) == sizeof(T))
        return value;
    else
        return V{} + value;
}

// v where y passes a ReLU, else 0. A nan passes, as in PyTorch.
template <class T, class V>
SVAG_INLINE V passed(V v, V y, bool relu) {
    if constexpr (sizeof(V) == sizeof(T)) {
        return relu && y <= 0 ? T(0) : v;
    } else {
        using B = typename BitsOf<T>::type;
        const B on = relu ? ~B{} : B{};
        return (V)((B)v & ~((B)(y <= V{}) & on));
    }
}

// What turns a unit's values into outputs, (x - centre) scale + shift, and into gradients,
// scale y' + slope (x - centre) + offset: [channels] each.
template <class T>
struct Lines {
    T *centre, *scale, *shift, *slope, *offset;
};

// Of U vectors side by side: kEach: every lane has its own channel, else all have one.
template <class T, class V, int U, bool kEach>
struct Line {
    V at[U];
    SVAG_INLINE explicit Line(const T* p) {
        for (int u = 0; u < U; ++u) {
            if constexpr (kEach)
                at[u] = load_raw<V>(p + u * kLanes<T, V>);
            else
                at[u] = spread<T, V>(*p);
        }
    }
};

// One walk over `rows` rows of U vectors, `stride` elements apart.
template <class T, class V, int U, class Step>
SVAG_INLINE void walk(int64_t rows, int64_t stride, const Step& step) {
    for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) step(r * stride + u * kLanes<T, V>, u);
}

// Sums over a strip of columns, of two terms an element.
template <class T, class V, int U, class Terms>
SVAG_INLINE void sum_strip(const Terms& terms, int64_t from, int64_t rows, int64_t stride, T* first, T* second) {
    V a[U] = {}, b[U] = {};
    walk<T, V, U>(rows, stride, [&](int64_t i, int u) { terms.add(from + i, u, a[u], b[u]); });
    std::memcpy(first, a, sizeof a);
    std::memcpy(second, b, sizeof b);
}

// x alone: for a first mean.
template <class T, class V>
struct Plain {
    const T* x;
    SVAG_INLINE void add(int64_t i, int, V& a, V&) const {
        a += load_raw<V>(x + i);
    }
};

// x - centre and its square: exact even where a mean is large beside the spread.
template <class T, class V, int U, bool kEach>
struct Centred {
    const T* x;
    Line<T, V, U, kEach> centre;
    SVAG_INLINE void add(int64_t i, int u, V& a, V& b) const {
        const V d = load_raw<V>(x + i) - centre.at[u];
        a += d;
        b += d * d;
    }
};

// The gradient behind the ReLU, and its product with x - centre. kKept: the output was kept, else it is made again.
template <class T, class V, int U, bool kEach, bool kKept>
struct Behind {
    const T *x, *y, *y_grad;
    bool relu;
    Line<T, V, U, kEach> centre, scale, shift;

    SVAG_INLINE Behind(const NormShape& shape, const NormBackward& arrays, const Lines<T>& lines, int64_t c)
        : x(static_cast<const T*>(arrays.x)),
          y(static_cast<const T*>(arrays.y)),
          y_grad(static_cast<const T*>(arrays.y_grad)),
          relu(shape.relu),
          centre(lines.centre + c),
          scale(lines.scale + c),
          shift(lines.shift + c) {}

    SVAG_INLINE V grad(int64_t i, int u, V d) const {
        const V out = kKept ? load_raw<V>(y + i) : d * scale.at[u] + shift.at[u];
        return passed<T>(load_raw<V>(y_grad + i), out, relu);
    }
    SVAG_INLINE void add(int64_t i, int u, V& a, V& b) const {
        const V d = load_raw<V>(x + i) - centre.at[u];
        const V g = grad(i, u, d);
        a += g;
        b += g * d;
    }
};

// The sum of a strip's lanes, by halves: the same at every level.
template <class T>
SVAG_INLINE double fold(T (&lanes)[kWideLanes<T>]) {
#pragma GCC unroll 8
    for (int64_t half = kWideLanes<T> / 2; half > 0; half /= 2)
        for (int64_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    return static_cast<double>(lanes[0]);
}

// One channel's two sums over `size` neighbours, with terms for full strips and for the rest.
template <class T, class WideTerms, class RestTerms>
SVAG_INLINE void sum_row(const WideTerms& wide, const RestTerms& rest, int64_t from, int64_t size, double* first,
                         double* second) {
    using V = typename Simd<T>::V;
    constexpr int64_t L = kWideLanes<T>;
    *first = *second = 0;
    int64_t i = 0;
    for (int64_t rows; (rows = (size - i) / L < kRun ? (size - i) / L : kRun) > 0; i += rows * L) {
        T a[L], b[L];
        sum_strip<T, V, kWide>(wide, from + i, rows, L, a, b);
        *first += fold<T>(a);
        *second += fold<T>(b);
    }
    if (i < size) {
        T a, b;
        sum_strip<T, T, 1>(rest, from + i, size - i, 1, &a, &b);
        *first += static_cast<double>(a);
        *second += static_cast<double>(b);
    }
}

// The two sums of each of a strip's channels over all rows.
template <class T, class V, int U, class Terms>
SVAG_INLINE void sum_columns(const Terms& terms, int64_t from, int64_t rows, int64_t stride, double* first,
                             double* second) {
    constexpr int64_t n = U * kLanes<T, V>;
    for (int64_t j = 0; j < n; ++j) first[j] = second[j] = 0;
    for (int64_t r = 0; r < rows; r += kRun) {
        T a[n], b[n];
        sum_strip<T, V, U>(terms, from + r * stride, rows - r < kRun ? rows - r : kRun, stride, a, b);
        for (int64_t j = 0; j < n; ++j) {
            first[j] += static_cast<double>(a[j]);
            second[j] += static_cast<double>(b[j]);
        }
    }
}

// Pixels of the same unit or units, all channels.
struct Block {
    int64_t begin;  // element
    int64_t rows;   // pixels
    int64_t line;   // which lines it has: of its sample, or of its segment
};

struct Blocks {
    int64_t count, per_line, rows, pixels, size;  // of one line: `per_line` blocks, `pixels` pixels, `size` elements

    explicit Blocks(const NormShape& s) {
        const int64_t samples = s.groups > 0 ? 1 : s.samples / s.segments;
        pixels = samples * s.pixels;
        size = pixels * s.channels;
        const bool split = s.groups == 0 && s.channels_last;
        rows = s.pixels;
        if (split) rows = kChunk / s.channels > 0 ? kChunk / s.channels : 1;
        per_line = split ? (pixels + rows - 1) / rows : samples;
        count = per_line * (s.groups > 0 ? s.samples : s.segments);
    }
    Block at(int64_t i, int64_t channels) const {
        const int64_t line = i / per_line, first = i % per_line * rows;
        return {line * size + first * channels, pixels - first < rows ? pixels - first : rows, line};
    }
};

// What a call has in memory. Cells: two values for each channel of each block.
template <class T>
struct Call {
    const NormShape& shape;
    const Blocks blocks;
    const NormForward* forward = nullptr;
    const NormBackward* backward = nullptr;
    double *first = nullptr, *second = nullptr;  // cells
    T* lines = nullptr;
    int64_t per_chunk = 1;

    Lines<T> lines_of(int64_t line) const {
        const int64_t C = shape.channels;
        T* p = lines + line * 5 * C;
        return {p, p + C, p + 2 * C, p + 3 * C, p + 4 * C};
    }
};

// Calls f(the strip's kind, first channel, first element): channels innermost, strips are columns.
template <class T, class F>
SVAG_INLINE void for_columns(const Block& block, int64_t channels, const F& f) {
    using V = typename Simd<T>::V;
    int64_t c = 0;
    for (; c + kWideLanes<T> <= channels; c += kWideLanes<T>) f.template strip<V, kWide>(c, block.begin + c);
    for (; c < channels; ++c) f.template strip<T, 1>(c, block.begin + c);
}

template <class T, class F>
struct Columns {
    const F& f;
    int64_t rows, channels;
    template <class V, int U>
    SVAG_INLINE void strip(int64_t c, int64_t from) const {
        f.template strip<V, U, true>(c, from, rows, channels);
    }
};

// Calls f(the strip's kind, first channel, first element, rows, stride) for all of a block, in either memory order.
template <class T, class F>
SVAG_INLINE void for_strips(const NormShape& shape, const Block& block, const F& f) {
    if (shape.channels_last) {
        for_columns<T>(block, shape.channels, Columns<T, F>{f, block.rows, shape.channels});
    } else {
        const int64_t wide = block.rows / kWideLanes<T>, rest = block.rows % kWideLanes<T>;
        for (int64_t c = 0; c < shape.channels; ++c) {
            const int64_t from = block.begin + c * block.rows;
            f.template strip<typename Simd<T>::V, kWide, false>(c, from, wide, kWideLanes<T>);
            f.template strip<T, 1, false>(c, from + block.rows - rest, rest, 1);
        }
    }
}

}  // namespace
}  // namespace SVAG_SIMD
}  // namespace svag
