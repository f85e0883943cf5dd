#include "cpu/kernels/weight_grad/weight_gram.h"

#include "cpu/kernels/weight_grad/gram_tile.h"
#include "cpu/kernels/weight_grad/pack.h"
#include "cpu/kernels/weight_grad/plan.h"
#include "cpu/scratch_memory.h"
#include "cpu/scratch_slots.h"
#include "cpu/thread_pool.h"

namespace svag {
namespace SVAG_SIMD {
namespace {

// Fewer multiply-adds stay on one thread: a second one that has to wait for a core costs more.
constexpr double kSerial = 1 << 20;
// Up to this many positions rows are multiplied in float64 at once: it costs next to nothing.
constexpr int64_t kFewPositions = 4;
// Float32 products are kept where their sizes add up to at most this many times their sum.
constexpr double kMostCancelled = 8;

// |b^T a|^2 = sum over output positions t, s of (a_t . a_s)(b_t . b_s), each pair once: those with t != s count twice.
// A window a_t is made of pixels, so a_t . a_s is a sum of products of pixels over the taps, and windows never exist.
//
// Where a gradient cancels over its positions this sum does too, and in float32 little would be left of it. So sums are
// float64, in which a float32 product is exact and no square overflows; but for rows of many positions float32 is tried
// first, and kept where nothing cancels.
template <class T>
class WeightGram {
    static constexpr int64_t W = Simd<double>::width;

  public:
    explicit WeightGram(const WeightGramArgs& args)
        : a_(args),
          positions_(args.out_height * args.out_width),
          rows_apart_(args.kernel_h == 1 && args.kernel_w == 1 && args.pad_h == 0 && args.pad_w == 0) {}

    int run() {
        // Without overlap of windows only the pixels that are read are kept.
        const int64_t pixels = rows_apart_ ? positions_ : a_.height * a_.width;
        const int64_t x = pixels * row_pitch<double>(a_.channels), dy = positions_ * row_pitch<double>(a_.outputs);
        const int64_t products = rows_apart_ ? 0 : a_.width * a_.width + positions_ * a_.out_width;
        x_bytes_ = aligned(x * sizeof(double));
        dy_bytes_ = aligned(dy * sizeof(double));
        products_bytes_ = aligned(products * sizeof(double));
        slot_bytes_ = x_bytes_ + dy_bytes_ + products_bytes_ + aligned((x > dy ? x : dy) * sizeof(T) + kSpill);
        const double work = static_cast<double>(a_.batch * a_.groups) * static_cast<double>(positions_ * (x + dy)) / 2;
        const int64_t threads = a_.threads > 1 && work >= kSerial ? a_.threads : 1;
        ScratchMemory memory;
        const auto slots = memory.reserve<char>(threads * slot_bytes_), busy = memory.reserve<char>(threads);
        if (!memory.allocate()) return kOutOfMemory;
        memory_ = memory.at(slots);
        slots_ = ScratchSlots(memory.at(busy), threads);
        parallel_chunks(
            a_.batch, static_cast<int>(threads),
            [](void* self, int64_t i) { static_cast<WeightGram*>(self)->sum_sample(i); }, this);
        return kOk;
    }

  private:
    static int64_t aligned(int64_t bytes) { return ScratchMemory::padded<char>(bytes); }

    template <class E>
    static int64_t row_pitch(int64_t channels) {
        return ceil_div(channels, Simd<E>::width) * Simd<E>::width;
    }

    void sum_sample(int64_t sample) {
        const int64_t slot = slots_.take();
        char* memory = memory_ + slot * slot_bytes_;
        double sum = 0;
        for (int64_t g = 0; g < a_.groups; ++g)
            sum += rows_apart_ ? sum_row_group(sample, g, memory) : sum_window_group(sample, g, memory);
        a_.sq_norms[sample] = sum < 0 ? 0 : sum;  // rounding alone takes it below 0
        slots_.free(slot);
    }

    // One group of one sample as rows of E, one a pixel, filled up with zeros; where the tensor holds just that, itself.
    template <class E>
    Rows<E> rows_of(const void* tensor, const int64_t* strides, int64_t sample, int64_t group, int64_t channels,
                    int64_t height, int64_t width, int64_t row_step, int64_t column_step, char* to, char* scratch) const {
        const T* source = static_cast<const T*>(tensor) + sample * strides[0] + group * channels * strides[1];
        const int64_t row_stride = strides[2] * row_step, column_stride = strides[3] * column_step;
        const int64_t pitch = row_pitch<E>(channels);
        if constexpr (sizeof(E) == sizeof(T))
            if (strides[1] == 1 && pitch == channels && (height == 1 || row_stride == width * column_stride))
                return {reinterpret_cast<const E*>(source), column_stride, channels};
        E* rows = reinterpret_cast<E*>(to);
        const Rows<E> result{rows, pitch, pitch};
        if (strides[1] == 1) {
            for (int64_t y = 0; y < height; ++y)
                for (int64_t x = 0; x < width; ++x, rows += pitch)
                    convert_row(source + y * row_stride + x * column_stride, channels, pitch, rows);
            return result;
        }
        PackBlock<T> block{};
        block.source = source;
        block.channel_stride = strides[1];
        block.row_stride = row_stride;
        block.column_stride = column_stride;
        block.source_end =
            source + (channels - 1) * strides[1] + (height - 1) * row_stride + (width - 1) * column_stride + 1;
        block.channels = block.pitch = channels;
        block.height = height;
        block.width = width;
        block.target = reinterpret_cast<T*>(scratch);
        pack(block);
        for (int64_t i = 0; i < height * width; ++i)
            convert_row(block.target + i * channels, channels, pitch, rows + i * pitch);
        return result;
    }

    template <class E>
    static void convert_row(const T* source, int64_t n, int64_t pitch, E* row) {
        constexpr int64_t width = Simd<E>::width;
        int64_t i = 0;
        for (; i + width <= n; i += width) {
            const typename Simd<E>::V v = Io<T, E>::load(source + i);
            std::memcpy(row + i, &v, sizeof v);
        }
        for (; i < n; ++i) row[i] = static_cast<E>(source[i]);
        for (; i < pitch; ++i) row[i] = 0;
    }

    // Windows of one pixel each.
    double sum_row_group(int64_t sample, int64_t group, char* memory) const {
        if (positions_ == 1 && a_.input_strides[1] == 1 && a_.output_strides[1] == 1) {
            const T* x = static_cast<const T*>(a_.inputs) + sample * a_.input_strides[0] + group * a_.channels;
            const T* dy = static_cast<const T*>(a_.output_grads) + sample * a_.output_strides[0] + group * a_.outputs;
            return sq_norm(x, a_.channels) * sq_norm(dy, a_.outputs);
        }
        if constexpr (sizeof(T) == sizeof(float))
            if (positions_ > kFewPositions) {
                const Sum sum = sum_rows<float>(sample, group, memory);
                if (sum.sizes <= kMostCancelled * sum.value) return sum.value;  // false for nan
            }
        return sum_rows<double>(sample, group, memory).value;
    }

    struct Sum {
        double value, sizes;
    };

    // Tile by tile along and below the diagonal: the products of all pairs never exist at once.
    template <class E>
    Sum sum_rows(int64_t sample, int64_t group, char* memory) const {
        char *to_dy = memory + x_bytes_, *scratch = to_dy + dy_bytes_ + products_bytes_;
        const int64_t height = a_.out_height, width = a_.out_width;
        const Rows<E> x = rows_of<E>(a_.inputs, a_.input_strides, sample, group, a_.channels, height, width, a_.stride_h,
                                     a_.stride_w, memory, scratch);
        const Rows<E> dy = rows_of<E>(a_.output_grads, a_.output_strides, sample, group, a_.outputs, height, width, 1, 1,
                                      to_dy, scratch);
        double once = 0, twice = 0, sizes = 0;
        for (int64_t s = 0; s < positions_; s += kDotColumns) {
            const int64_t columns = positions_ - s < kDotColumns ? positions_ - s : kDotColumns;
            for (int64_t t = s; t < positions_; t += kDotRows) {
                const int64_t rows = positions_ - t < kDotRows ? positions_ - t : kDotRows;
                double a[kDotRows * kDotColumns], b[kDotRows * kDotColumns];
                const DotTile<E> tile = find_dot_tile<E>(rows, columns);
                tile(x.from(t), x.from(s).first, a, kDotColumns);
                tile(dy.from(t), dy.from(s).first, b, kDotColumns);
                for (int64_t m = 0; m < rows; ++m)
                    for (int64_t n = 0; n < columns && s + n <= t + m; ++n) {
                        const double product = a[m * kDotColumns + n] * b[m * kDotColumns + n];
                        (s + n == t + m ? once : twice) += product;
                        sizes += 2 * (product < 0 ? -product : product);
                    }
            }
        }
        return {once + 2 * twice, sizes - once};  // no square on the diagonal is negative
    }

    double sum_window_group(int64_t sample, int64_t group, char* memory) const {
        char *to_dy = memory + x_bytes_, *products = to_dy + dy_bytes_, *scratch = products + products_bytes_;
        const Rows<double> x = rows_of<double>(a_.inputs, a_.input_strides, sample, group, a_.channels, a_.height,
                                               a_.width, 1, 1, memory, scratch);
        const Rows<double> dy = rows_of<double>(a_.output_grads, a_.output_strides, sample, group, a_.outputs,
                                                a_.out_height, a_.out_width, 1, 1, to_dy, scratch);
        return sum_windows(x, dy, reinterpret_cast<double*>(products));
    }

    // Products of pixels. Two output rows `apart` read input rows stride_h * apart from each other at every tap, so one
    // such distance is dealt with at a time: of the products of output gradients only a row's with one other are kept.
    double sum_windows(const Rows<double>& x, const Rows<double>& dy, double* products) const {
        double* const pixels = products;                       // [width, width]
        double* const grads = products + a_.width * a_.width;  // [out_height, out_width, out_width]
        const int64_t block = a_.out_width * a_.out_width;
        double once = 0, twice = 0;
        for (int64_t apart = 0; apart < a_.out_height; ++apart) {
            const int64_t pairs = a_.out_height - apart, in_apart = apart * a_.stride_h;
            for (int64_t y = 0; y < pairs; ++y)
                dot_block(dy.from((y + apart) * a_.out_width), a_.out_width, dy.from(y * a_.out_width), a_.out_width,
                          grads + y * block);
            double& sum = apart == 0 ? once : twice;
            for (int64_t r = 0; r + in_apart < a_.height; ++r) {
                bool formed = false;
                for (int64_t ky = 0; ky < a_.kernel_h; ++ky) {
                    const int64_t shifted = r + a_.pad_h - ky * a_.dilation_h, y = shifted / a_.stride_h;
                    if (shifted < 0 || shifted % a_.stride_h != 0 || y >= pairs) continue;
                    if (!formed)
                        dot_block(x.from((r + in_apart) * a_.width), a_.width, x.from(r * a_.width), a_.width, pixels);
                    formed = true;
                    sum += sum_taps(pixels, grads + y * block);
                }
            }
        }
        return once + 2 * twice;
    }

    // One row of the kernel, all pairs of positions of one pair of output rows.
    double sum_taps(const double* pixels, const double* grads) const {
        double sum = 0;
        VDouble sums{};
        for (int64_t kx = 0; kx < a_.kernel_w; ++kx) {
            const TapRange xs = tap_range(kx, a_.width, a_.out_width, a_.stride_w, a_.pad_w, a_.dilation_w);
            const int64_t first = xs.begin * a_.stride_w + kx * a_.dilation_w - a_.pad_w;
            for (int64_t t = 0; t < xs.size(); ++t) {
                const double* p = pixels + (first + t * a_.stride_w) * a_.width + first;
                const double* g = grads + (xs.begin + t) * a_.out_width + xs.begin;
                int64_t s = 0;
                if (a_.stride_w == 1)
                    for (; s + W <= xs.size(); s += W) sums += load_raw<VDouble>(p + s) * load_raw<VDouble>(g + s);
                for (; s < xs.size(); ++s) sum += p[s * a_.stride_w] * g[s];
            }
        }
        return sum + lane_sum(sums);
    }

    const WeightGramArgs& a_;
    const int64_t positions_;
    const bool rows_apart_;
    int64_t x_bytes_ = 0, dy_bytes_ = 0, products_bytes_ = 0, slot_bytes_ = 0;
    char* memory_ = nullptr;
    ScratchSlots slots_;
};

}  // namespace
}  // namespace SVAG_SIMD
}  // namespace svag

extern "C" int SVAG_ENTRY(svag_weight_gram)(const svag::WeightGramArgs& args) {
    using namespace svag::SVAG_SIMD;
    return args.is_double ? WeightGram<double>(args).run() : WeightGram<float>(args).run();
}
