// The samples are cut into blocks of consecutive pixels, one block a sample or, where a channel's statistics are of
// many samples and channels are innermost, as many pixels as fill a cache. A block gives each of its channels two sums;
// those are added up in the order of the blocks. So results depend on neither the threads nor the SIMD level.
#include "cpu/norm_relu.h"

#include <cmath>

#include "cpu/scratch_memory.h"
#include "cpu/simd.h"
#include "cpu/thread_pool.h"
#include "tensor_list.h"

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

// Calls f(the strip's kind, first channel, first element, rows, stride): channels innermost, strips are columns.
template <class T, class F>
SVAG_INLINE void for_columns(const Block& block, int64_t channels, const F& f) {
    using V = typename Simd<T>::V;
    int64_t c = 0;
    for (; c + kWideLanes<T> <= channels; c += kWideLanes<T>) f.template strip<V, kWide>(c, block.begin + c);
    for (; c < channels; ++c) f.template strip<T, 1>(c, block.begin + c);
}

// ---- forward

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

template <class T, class V, int U, bool kEach, bool kResidual>
SVAG_INLINE void apply_strip(const NormShape& shape, const NormForward& f, const Lines<T>& lines, int64_t c,
                             int64_t from, int64_t rows, int64_t stride) {
    const Line<T, V, U, kEach> centre(lines.centre + c), scale(lines.scale + c), shift(lines.shift + c);
    const T *x = static_cast<const T*>(f.x) + from, *residual = static_cast<const T*>(f.residual);
    if constexpr (kResidual) residual += from;
    T* out = static_cast<T*>(f.y) + from;
    const bool relu = shape.relu;
    walk<T, V, U>(rows, stride, [&](int64_t i, int u) {
        V v = (load_raw<V>(x + i) - centre.at[u]) * scale.at[u] + shift.at[u];
        if constexpr (kResidual) v += load_raw<V>(residual + i);
        v = passed<T>(v, v, relu);
        std::memcpy(out + i, &v, sizeof v);
    });
}

template <class T, bool kResidual>
struct ApplyColumns {
    const Call<T>& call;
    const Block& block;
    const Lines<T>& lines;
    template <class V, int U>
    SVAG_INLINE void strip(int64_t c, int64_t from) const {
        apply_strip<T, V, U, true, kResidual>(call.shape, *call.forward, lines, c, from, block.rows,
                                              call.shape.channels);
    }
};

template <class T, bool kResidual>
void block_apply(const Call<T>& call, int64_t i) {
    const int64_t C = call.shape.channels;
    const Block block = call.blocks.at(i, C);
    const Lines<T> lines = call.lines_of(block.line);
    if (call.shape.channels_last) {
        for_columns<T>(block, C, ApplyColumns<T, kResidual>{call, block, lines});
    } else {
        using V = typename Simd<T>::V;
        const int64_t wide = block.rows / kWideLanes<T>, rest = block.rows % kWideLanes<T>;
        for (int64_t c = 0; c < C; ++c) {
            const int64_t from = block.begin + c * block.rows;
            apply_strip<T, V, kWide, false, kResidual>(call.shape, *call.forward, lines, c, from, wide,
                                                          kWideLanes<T>);
            apply_strip<T, T, 1, false, kResidual>(call.shape, *call.forward, lines, c, from + block.rows - rest, rest,
                                                   1);
        }
    }
}

// ---- backward

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

template <class T, class V, int U, bool kEach, bool kKept>
SVAG_INLINE void grad_strip(const NormShape& shape, const NormBackward& g, const Lines<T>& lines, int64_t c,
                            int64_t from, int64_t rows, int64_t stride) {
    const Behind<T, V, U, kEach, kKept> behind(shape, g, lines, c);
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

template <class T, bool kKept>
struct GradColumns {
    const Call<T>& call;
    const Block& block;
    const Lines<T>& lines;
    template <class V, int U>
    SVAG_INLINE void strip(int64_t c, int64_t from) const {
        grad_strip<T, V, U, true, kKept>(call.shape, *call.backward, lines, c, from, block.rows, call.shape.channels);
    }
};

template <class T, bool kKept>
void block_grads(const Call<T>& call, int64_t i) {
    const int64_t C = call.shape.channels;
    const Block block = call.blocks.at(i, C);
    const Lines<T> lines = call.lines_of(block.line);
    if (call.shape.channels_last) {
        for_columns<T>(block, C, GradColumns<T, kKept>{call, block, lines});
    } else {
        using V = typename Simd<T>::V;
        const int64_t wide = block.rows / kWideLanes<T>, rest = block.rows % kWideLanes<T>;
        for (int64_t c = 0; c < C; ++c) {
            const int64_t from = block.begin + c * block.rows;
            grad_strip<T, V, kWide, false, kKept>(call.shape, *call.backward, lines, c, from, wide, kWideLanes<T>);
            grad_strip<T, T, 1, false, kKept>(call.shape, *call.backward, lines, c, from + block.rows - rest, rest, 1);
        }
    }
}

// ---- a call

// Calls f(call, i) for every block, `per_chunk` of them at a time.
template <class T, void (*f)(const Call<T>&, int64_t)>
void for_blocks(void* context, int64_t chunk) {
    const Call<T>& call = *static_cast<const Call<T>*>(context);
    const int64_t end = (chunk + 1) * call.per_chunk;
    for (int64_t i = chunk * call.per_chunk; i < end && i < call.blocks.count; ++i) f(call, i);
}

template <class T, void (*f)(const Call<T>&, int64_t)>
void run(Call<T>& call) {
    const NormShape& s = call.shape;
    const int threads = s.samples * s.channels * s.pixels < kSerial ? 1 : s.threads;
    parallel_chunks((call.blocks.count + call.per_chunk - 1) / call.per_chunk, threads, for_blocks<T, f>, &call);
}

// GroupNorm's block is a whole sample, whose values are still in the cache for the second walk.
template <class T, bool kResidual>
void sample_forward(const Call<T>& call, int64_t i) {
    block_moments<T>(call, i);
    line_moments<T>(call, i);
    block_apply<T, kResidual>(call, i);
}

template <class T, bool kKept>
void sample_backward(const Call<T>& call, int64_t i) {
    set_lines<T>(call, i, call.backward->mean, call.backward->var, call.backward->weight, call.backward->bias);
    block_grad_sums<T, kKept>(call, i);
    line_grads<T>(call, i);
    block_grads<T, kKept>(call, i);
}

template <class T, bool kResidual>
void forward(Call<T>& call) {
    if (call.shape.groups > 0) return run<T, sample_forward<T, kResidual>>(call);
    run<T, block_moments<T>>(call);
    for (int64_t line = 0; line < call.shape.segments; ++line) line_moments<T>(call, line);
    run<T, block_apply<T, kResidual>>(call);
}

template <class T, bool kKept>
void backward(Call<T>& call) {
    const NormBackward& g = *call.backward;
    if (call.shape.groups > 0) {
        run<T, sample_backward<T, kKept>>(call);
    } else {
        const int64_t lines = call.shape.segments;
        for (int64_t line = 0; line < lines; ++line) set_lines<T>(call, line, g.mean, g.var, g.weight, g.bias);
        run<T, block_grad_sums<T, kKept>>(call);
        for (int64_t line = 0; line < lines; ++line) line_grads<T>(call, line);
        run<T, block_grads<T, kKept>>(call);
    }
    const int64_t C = call.shape.channels;
    const double* cells[] = {call.second, call.first};
    double* sums[] = {g.weight_grad, g.bias_grad};
    for (int k = 0; k < 2; ++k) {
        if (sums[k] == nullptr) continue;
        for (int64_t c = 0; c < C; ++c) sums[k][c] = 0;
        for (int64_t i = 0; i < call.blocks.count; ++i)
            for (int64_t c = 0; c < C; ++c) sums[k][c] += cells[k][i * C + c];
    }
}

template <class T>
int serve(const NormShape& shape, const NormForward* f, const NormBackward* g) {
    Call<T> call{shape, Blocks(shape), f, g, nullptr, nullptr, nullptr, 1};
    const int64_t C = shape.channels, cells = call.blocks.count * C;
    ScratchMemory memory;
    const auto first = memory.reserve<double>(cells), second = memory.reserve<double>(cells);
    const auto lines = memory.reserve<T>((shape.groups > 0 ? shape.samples : shape.segments) * 5 * C);
    if (!memory.allocate()) return kOutOfMemory;
    call.first = memory.at(first);
    call.second = memory.at(second);
    call.lines = memory.at(lines);
    const int64_t block = call.blocks.rows * C;
    if (block < kChunk) call.per_chunk = kChunk / block;
    if (f != nullptr)
        f->residual == nullptr ? forward<T, false>(call) : forward<T, true>(call);
    else
        g->y == nullptr ? backward<T, false>(call) : backward<T, true>(call);
    return kOk;
}

}  // namespace
}  // namespace SVAG_SIMD
}  // namespace svag

extern "C" int SVAG_ENTRY(svag_norm_relu)(const svag::NormShape& shape, const svag::NormForward& arrays) {
    using namespace svag::SVAG_SIMD;
    return shape.is_double ? serve<double>(shape, &arrays, nullptr) : serve<float>(shape, &arrays, nullptr);
}

extern "C" int SVAG_ENTRY(svag_norm_relu_grad)(const svag::NormShape& shape, const svag::NormBackward& arrays) {
    using namespace svag::SVAG_SIMD;
    return shape.is_double ? serve<double>(shape, nullptr, &arrays) : serve<float>(shape, nullptr, &arrays);
}
