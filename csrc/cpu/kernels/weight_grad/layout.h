// Where everything of a weight gradient is kept, whichever loop is outside: both operands as packed blocks, the taps of
// a tile in them, and a finished tile's elements in dW. And what is done to one tile.
#pragma once

#include "cpu/kernels/weight_grad/pack.h"
#include "cpu/kernels/weight_grad/plan.h"
#include "cpu/kernels/weight_grad/tile.h"
#include "cpu/scratch_memory.h"

namespace svag {
namespace SVAG_SIMD {
namespace {

// Fewer multiply-adds (some 50 us) stay on one thread: a second one that has to wait for a core costs more.
constexpr int64_t kSerial = 1 << 20;

// A packed operand: elements from a pixel to the next, from a row to the next, from one tile's channels to the next
// tile's, and from a sample to the next. A block holds one tile's channels of one sample, or, where kernel rows are
// merged, all channels: then a tile is a place in the window.
struct Layout {
    int64_t pixel, row, tile, sample;
    int64_t block, blocks;  // elements of one block with its spill; blocks of a sample and group
    int64_t size;           // elements of one group: of one sample, or of all with tiles outside

    template <class T>
    static Layout of_inputs(const WeightGradArgs& args, const Plan& plan) {
        const int64_t lanes = plan.vectors * Simd<T>::width;
        Layout x{};
        x.pixel = plan.merged ? args.channels : plan.swapped ? plan.rows : lanes;
        x.row = (args.width + plan.left + plan.right) * x.pixel;
        x.tile = plan.swapped ? plan.rows : lanes;
        x.blocks = plan.merged ? 1 : plan.swapped ? plan.row_tiles : plan.vector_tiles;
        x.put_blocks<T>(args.height, plan.merged, args);
        return x;
    }

    template <class T>
    static Layout of_output_grads(const WeightGradArgs& args, const Plan& plan) {
        Layout dy{};
        dy.pixel = plan.swapped ? plan.vectors * Simd<T>::width : plan.rows;
        dy.row = args.out_width * dy.pixel;
        dy.blocks = plan.swapped ? plan.vector_tiles : plan.row_tiles;
        dy.put_blocks<T>(args.out_height, false, args);
        return dy;
    }

  private:
    template <class T>
    void put_blocks(int64_t height, bool merged, const WeightGradArgs& args) {
        constexpr int64_t spill = kSpill / static_cast<int64_t>(sizeof(T));
        block = ceil_div(height * row, spill) * spill + spill;
        // What the inner loop reads is side by side: one sample's blocks, or all samples' blocks of one tile.
        const bool samples_outside = args.loop_order == LoopOrder::samples_outside;
        const int64_t samples = samples_outside ? 1 : args.batch;
        sample = samples_outside ? block * blocks : block;
        if (!merged) tile = block * samples;
        size = block * blocks * samples;
    }
};

template <class T>
class TiledProduct {
    using V = typename Simd<T>::V;
    static constexpr int64_t W = Simd<T>::width;

  public:
    // Reserves its pieces of `memory`; to be used after prepare().
    TiledProduct(const WeightGradArgs& args, ScratchMemory& memory)
        : plan(make_plan<T>(args)),
          x(Layout::of_inputs<T>(args, plan)),
          dy(Layout::of_output_grads<T>(args, plan)),
          tiles(args.groups * plan.tiles()),
          tile_size(plan.taps * plan.template tile_size<T>()),
          args_(args),
          memory_(memory),
          taps_(memory.reserve<Tap>(plan.taps)),
          row_offsets_(memory.reserve<int64_t>(plan.row_count)),
          lane_offsets_(memory.reserve<int64_t>(plan.lane_count)),
          tap_offsets_(memory.reserve<int64_t>(plan.taps)),
          grams_(memory.reserve<double>(tiles * gram_part())) {
        set_products();
    }

    // Once the memory is allocated.
    void prepare() {
        set_taps();
        set_offsets();
    }

    static int threads_for(const WeightGradArgs& args) {
        const int64_t products = args.kernel_h * args.kernel_w * args.channels * args.outputs * args.groups;
        const int64_t operations = args.batch * args.out_height * args.out_width * products;
        return operations < kSerial || args.threads < 1 ? 1 : args.threads;
    }

    // The j-th sample, segment by segment.
    int64_t sample_at(int64_t j) const { return args_.order == nullptr ? j : args_.order[j]; }
    T weight_of(int64_t sample) const {
        return args_.weights == nullptr ? T(1) : static_cast<T>(args_.weights[sample]);
    }

    // Of all taps of a tile, and one, so that it divides.
    int64_t pixels() const { return pixels_; }

    // ---- one group of one sample, packed

    void pack_inputs(int64_t sample, int64_t group, T* target) const {
        pack_operand(args_.inputs, args_.input_strides, sample, group, args_.channels, args_.height, args_.width,
                     plan.left, plan.right, x, target);
    }

    void pack_output_grads(int64_t sample, int64_t group, T* target) const {
        pack_operand(args_.output_grads, args_.output_strides, sample, group, args_.outputs, args_.out_height,
                     args_.out_width, 0, 0, dy, target);
    }

    // ---- one tile

    struct Place {
        int64_t group, row_tile, vector_tile;
    };
    Place place_of(int64_t tile) const {
        const int64_t inner = tile % plan.tiles();
        return {tile / plan.tiles(), inner % plan.row_tiles, inner / plan.row_tiles};
    }

    // Elements before a tile's channels in a packed operand.
    int64_t x_begin(int64_t row_tile, int64_t vector_tile) const {
        return (plan.swapped ? row_tile : vector_tile) * x.tile;
    }
    int64_t dy_begin(int64_t row_tile, int64_t vector_tile) const {
        return (plan.swapped ? vector_tile : row_tile) * dy.tile;
    }

    // packed_x and packed_dy: one group of a sample, or of several, which are then summed before they are squared.
    // Returns the squares in this tile.
    double add_tile(const T* packed_x, const T* packed_dy, T weight, int64_t row_tile, int64_t vector_tile, T* dw,
                    Prefetch& next, int64_t samples = 1) const {
        const bool last_row = row_tile + 1 == plan.row_tiles, last_vector = vector_tile + 1 == plan.vector_tiles;
        const TileProduct<T> product = products_[last_row][last_vector];
        const VectorBits<T>& mask = last_vector ? last_lanes_ : all_lanes_;
        const T* a = packed_x + x_begin(row_tile, vector_tile);
        const T* b = packed_dy + dy_begin(row_tile, vector_tile);
        const int64_t x_row = args_.stride_h * x.row, x_pixel = args_.stride_w * x.pixel;
        const TileOperands<T> operands =
            plan.swapped ? TileOperands<T>{a, b, x_row, x_pixel, dy.row, dy.pixel, weight, samples, x.sample, dy.sample}
                         : TileOperands<T>{b, a, dy.row, dy.pixel, x_row, x_pixel, weight, samples, dy.sample, x.sample};
        const Tap* taps = memory_.at(taps_);
        V squares{};
        for (int64_t tap = 0; tap < plan.taps; ++tap)
            product(operands, taps[tap], mask, dw + tap * plan.template tile_size<T>(), squares, next);
        return fold_lanes<T>(squares);
    }

    // A finished tile, out of its order into dW's. sums[s]: its gradient of segment s; the first segment's ends up
    // with the sum over all segments, unless each is wanted.
    void finish_tile(int64_t tile, T* const* sums) const {
        const int64_t S = args_.segments;
        double* gram = args_.segment_gram == nullptr ? nullptr : memory_.at(grams_) + tile * gram_part();
        if (gram != nullptr)
            for (int64_t s = 0; s < S; ++s)
                for (int64_t t = 0; t <= s; ++t) gram[s * S + t] = inner_product(sums[s], sums[t], tile_size);
        const bool apart = args_.segment_stride != 0;
        if (args_.step == nullptr && !apart)
            for (int64_t s = 1; s < S; ++s)
                for (int64_t k = 0; k < tile_size; ++k) sums[0][k] += sums[s][k];
        double weight_sq_norm = 0;
        const Place place = place_of(tile);
        const int64_t rows = plan.rows_of(place.row_tile), lanes = plan.template lanes_of<T>(place.vector_tile);
        const int64_t pitch = ceil_div(lanes, W) * W, tap_size = plan.template tile_size<T>();
        const int64_t* to_row = memory_.at(row_offsets_) + place.row_tile * plan.rows;
        const int64_t* to_lane = memory_.at(lane_offsets_) + place.vector_tile * plan.vectors * W;
        const int64_t* to_tap = memory_.at(tap_offsets_);
        T* grad = static_cast<T*>(args_.grad) + place.group * args_.outputs * args_.grad_strides[0];
        for (int64_t m = 0; m < rows; ++m)
            for (int64_t tap = 0; tap < plan.taps; ++tap) {
                const int64_t from = tap * tap_size + m * pitch;
                T* to = grad + to_row[m] + to_tap[tap];
                if (args_.step == nullptr)
                    for (int64_t s = 0; s < (apart ? S : 1); ++s, to += args_.segment_stride)
                        for (int64_t i = 0; i < lanes; ++i) to[to_lane[i]] = sums[s][from + i];
                else
                    weight_sq_norm +=
                        take_step(sums[0] + from, S > 1 ? sums[1] + from : nullptr, to, to_lane, lanes);
            }
        if (args_.step != nullptr) gram[S * S] = weight_sq_norm;
    }

    // ---- after the last tile

    void sum_grams() const {
        if (args_.segment_gram == nullptr) return;
        const int64_t S = args_.segments;
        for (int64_t s = 0; s < S; ++s)
            for (int64_t t = 0; t <= s; ++t)
                args_.segment_gram[s * S + t] = args_.segment_gram[t * S + s] = sum_of_parts(s * S + t);
        if (args_.step != nullptr) *args_.step->weight_sq_norm = sum_of_parts(S * S);
    }

    const Plan plan;
    const Layout x, dy;
    const int64_t tiles;      // of all groups
    const int64_t tile_size;  // elements of one tile of dW, all taps

  private:
    // `channels` are a group's.
    void pack_operand(const void* tensor, const int64_t* strides, int64_t sample, int64_t group, int64_t channels,
                      int64_t height, int64_t width, int64_t left, int64_t right, const Layout& layout,
                      T* target) const {
        const T* base = static_cast<const T*>(tensor);
        PackBlock<T> block{};
        block.channel_stride = strides[1];
        block.row_stride = strides[2];
        block.column_stride = strides[3];
        block.source_end = base + (args_.batch - 1) * strides[0] + (args_.groups * channels - 1) * strides[1] +
                           (height - 1) * strides[2] + (width - 1) * strides[3] + 1;
        block.pitch = layout.pixel;
        block.height = height;
        block.width = width;
        block.left = left;
        block.right = right;
        for (int64_t first = 0; first < channels; first += layout.pixel, target += layout.tile) {
            block.source = base + sample * strides[0] + (group * channels + first) * strides[1];
            block.channels = channels - first < layout.pixel ? channels - first : layout.pixel;
            block.target = target;
            pack(block);
        }
    }

    // The last tiles may be smaller: they have products of their own, and a last vector that is not full.
    void set_products() {
        for (int row = 0; row < 2; ++row)
            for (int vector = 0; vector < 2; ++vector) {
                const int64_t lanes = plan.template lanes_of<T>(vector ? plan.vector_tiles - 1 : 0);
                const int64_t rows = plan.rows_of(row ? plan.row_tiles - 1 : 0);
                products_[row][vector] = find_tile_product<T>(rows, ceil_div(lanes, W));
            }

        const int64_t valid = plan.lane_count - (plan.lane_count - 1) / W * W;
        V lane{}, limit{};
        for (int i = 0; i < W; ++i) {
            lane[i] = static_cast<T>(i);
            limit[i] = static_cast<T>(valid);
        }
        last_lanes_ = lane < limit;
        all_lanes_ = lane == lane;
    }

    // Where each tap's pixels begin; a tap that never meets the image has no rows.
    void set_taps() {
        for (int64_t tap = 0; tap < plan.taps; ++tap) {
            const int64_t ky = plan.merged ? tap : tap / args_.kernel_w;
            const int64_t kx = plan.merged ? 0 : tap % args_.kernel_w;
            const TapRange ys =
                tap_range(ky, args_.height, args_.out_height, args_.stride_h, args_.pad_h, args_.dilation_h);
            const TapRange xs = plan.merged ? TapRange{0, args_.out_width}
                                            : tap_range(kx, args_.width, args_.out_width, args_.stride_w, args_.pad_w,
                                                        args_.dilation_w);
            const int64_t y = ys.begin * args_.stride_h - args_.pad_h + ky * args_.dilation_h;
            const int64_t column = xs.begin * args_.stride_w - args_.pad_w + kx * args_.dilation_w + plan.left;
            const int64_t in_x = y * x.row + column * x.pixel;
            const int64_t in_dy = ys.begin * dy.row + xs.begin * dy.pixel;
            Tap& t = memory_.at(taps_)[tap];
            t = {0, 0, 0, 0};
            if (ys.size() <= 0 || xs.size() <= 0) continue;
            t = {plan.swapped ? in_x : in_dy, plan.swapped ? in_dy : in_x, ys.size(), xs.size()};
            // Rows without a gap in either operand are one long row: the inner loop is entered once.
            if (args_.stride_h * x.row == t.columns * args_.stride_w * x.pixel && dy.row == t.columns * dy.pixel) {
                t.columns *= t.rows;
                t.rows = 1;
            }
            pixels_ += t.rows * t.columns;
        }
    }

    // dW's element is at to_row[row] + to_lane[lane] + to_tap[tap].
    void set_offsets() const {
        const int64_t* g = args_.grad_strides;
        int64_t *to_row = memory_.at(row_offsets_), *to_lane = memory_.at(lane_offsets_);
        int64_t* outputs = plan.swapped ? to_lane : to_row;
        int64_t* channels = plan.swapped ? to_row : to_lane;
        for (int64_t o = 0; o < args_.outputs; ++o) outputs[o] = o * g[0];
        for (int64_t c = 0; c < plan.tap_channels; ++c)
            channels[c] = c / args_.channels * g[3] + c % args_.channels * g[1];
        int64_t* to_tap = memory_.at(tap_offsets_);
        for (int64_t tap = 0; tap < plan.taps; ++tap)
            to_tap[tap] = plan.merged ? tap * g[2] : tap / args_.kernel_w * g[2] + tap % args_.kernel_w * g[3];
    }

    // Returns the squared norm of these elements of the weight, before the step.
    double take_step(const T* g1, const T* g2, T* weight, const int64_t* at, int64_t lanes) const {
        const WeightStep& step = *args_.step;
        const StepCoefficients<T> c{T(step.rate), T(step.c1), T(step.c2), T(step.weight_decay)};
        double sq_norm = 0;
        for (int64_t i = 0; i < lanes; ++i) {
            T& w = weight[at[i]];
            sq_norm += static_cast<double>(w) * static_cast<double>(w);
            // At l = 1 the second gradient has no weight: an inf in it must not reach the weight.
            w -= g2 != nullptr && step.c2 != 0 ? decrement(w, g1[i], g2[i], c) : decrement(w, g1[i], c);
        }
        return sq_norm;
    }

    // Float32 products are exact in float64. The tiles' unused elements are zeros.
    static double inner_product(const T* a, const T* b, int64_t n) {
        // Eight sums, or each addition would wait for the one before.
        double sums[8] = {};
        for (int64_t k = 0; k < n; k += 8)
            for (int64_t i = 0; i < 8; ++i)
                if (k + i < n) sums[i] += static_cast<double>(a[k + i]) * static_cast<double>(b[k + i]);
        return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    }

    // A tile's part of the segments' inner products and, behind them, of the weight's squared norm.
    int64_t gram_part() const { return args_.segment_gram == nullptr ? 0 : args_.segments * args_.segments + 1; }

    // In the tiles' order, whichever thread finished them: so the sum is the same for any number of threads.
    double sum_of_parts(int64_t at) const {
        double sum = 0;
        for (int64_t i = 0; i < tiles; ++i) sum += memory_.at(grams_)[i * gram_part() + at];
        return sum;
    }

    const WeightGradArgs& args_;
    const ScratchMemory& memory_;
    TileProduct<T> products_[2][2]{};  // [last row tile][last vector tile]
    VectorBits<T> last_lanes_{}, all_lanes_{};
    const ScratchMemory::Piece<Tap> taps_;
    const ScratchMemory::Piece<int64_t> row_offsets_, lane_offsets_, tap_offsets_;
    const ScratchMemory::Piece<double> grams_;
    int64_t pixels_ = 1;
};

}  // namespace
}  // namespace SVAG_SIMD
}  // namespace svag
