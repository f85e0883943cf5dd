#include "cpu/weight_grad.h"

#include <cstdlib>

#include "cpu/scratch_slots.h"
#include "cpu/thread_pool.h"
#include "cpu/weight_grad_pack.h"
#include "cpu/weight_grad_plan.h"
#include "cpu/weight_grad_tile.h"
#include "svag_math.h"

namespace svag {
namespace SVAG_SIMD {
namespace {

// Samples are cut into so many chunks at most, whatever the number of threads: so the order of the sums never depends
// on it. A chunk has so many positions at least: clearing its dW and adding it up costs as much as some 8 of them.
constexpr int64_t kSampleChunks = 16;
constexpr int64_t kChunkPositions = 128;
// Fewer multiply-adds (some 50 us) stay on one thread: a second one that has to wait for a core costs more.
constexpr int64_t kSerial = 1 << 20;
// Where no norms are asked for, a tile's sum runs over samples until it has met this many positions: what adding it to
// dW costs is then small, and a sum is still short enough to round little.
constexpr int64_t kRunPositions = 64;
// Bytes of scratch memory are handed out in multiples of this.
constexpr int64_t kAlign = 64;

SVAG_INLINE int64_t aligned(int64_t bytes) { return ceil_div(bytes, kAlign) * kAlign; }

// A packed operand: elements from a pixel to the next, from a row to the next, from one tile's channels to the next
// tile's, and from a sample to the next. A block holds one tile's channels of one sample, or, where kernel rows are
// merged, all channels: then a tile is a place in the window.
struct Layout {
    int64_t pixel, row, tile, sample;
    int64_t block, blocks;  // elements of one block with its spill; blocks of a sample and group

    // One sample's blocks side by side.
    void put_samples_outside(bool merged) {
        sample = block * blocks;
        if (!merged) tile = block;
    }
    // A tile's blocks of all samples side by side.
    void put_tiles_outside(bool merged, int64_t samples) {
        sample = block;
        if (!merged) tile = block * samples;
    }
};

struct SampleChunk {
    int64_t segment, begin, end;  // of args.order
};

template <class T>
class WeightGrad {
    using V = typename Simd<T>::V;
    static constexpr int64_t W = Simd<T>::width;

  public:
    explicit WeightGrad(const WeightGradArgs& args) : args_(args), plan_(make_plan<T>(args)) {
        const int64_t lanes = plan_.vectors * W, spill = kSpill / static_cast<int64_t>(sizeof(T));
        x_.pixel = plan_.merged ? args.channels : plan_.swapped ? plan_.rows : lanes;
        x_.row = (args.width + plan_.left + plan_.right) * x_.pixel;
        x_.block = ceil_div(args.height * x_.row, spill) * spill + spill;
        x_.blocks = plan_.merged ? 1 : plan_.swapped ? plan_.row_tiles : plan_.vector_tiles;
        x_.tile = plan_.swapped ? plan_.rows : lanes;
        dy_.pixel = plan_.swapped ? lanes : plan_.rows;
        dy_.row = args.out_width * dy_.pixel;
        dy_.block = ceil_div(args.out_height * dy_.row, spill) * spill + spill;
        dy_.blocks = plan_.swapped ? plan_.vector_tiles : plan_.row_tiles;
        tile_ = plan_.taps * plan_.tile_size<T>();
        set_products();
    }

    int run() {
        const int64_t products = plan_.taps * plan_.tap_channels * args_.outputs * args_.groups;
        const int64_t operations = args_.batch * args_.out_height * args_.out_width * products;
        threads_ = operations < kSerial || args_.threads < 1 ? 1 : args_.threads;
        const int64_t grad_bytes = args_.groups * plan_.tiles() * tile_ * static_cast<int64_t>(sizeof(T));
        return args_.loop_order == LoopOrder::samples_outside ? samples_outside(grad_bytes) : tiles_outside();
    }

  private:
    // ---- memory: one block for the call, freed at its end

    int allocate(int64_t bytes) {
        const int64_t tap_bytes = aligned(plan_.taps * static_cast<int64_t>(sizeof(Tap)));
        const int64_t offsets = plan_.row_count + plan_.lane_count + plan_.taps;
        const int64_t offset_bytes = aligned(offsets * static_cast<int64_t>(sizeof(int64_t)));
        memory_ = static_cast<char*>(std::aligned_alloc(kAlign, tap_bytes + offset_bytes + aligned(bytes)));
        if (memory_ == nullptr) return kOutOfMemory;
        taps_ = reinterpret_cast<Tap*>(take(tap_bytes));
        row_offsets_ = reinterpret_cast<int64_t*>(take(offset_bytes));
        lane_offsets_ = row_offsets_ + plan_.row_count;
        tap_offsets_ = lane_offsets_ + plan_.lane_count;
        set_taps();
        set_offsets();
        return kOk;
    }

    char* take(int64_t bytes) {
        char* taken = memory_ + used_;
        used_ += aligned(bytes);
        return taken;
    }

    int64_t sample_at(int64_t j) const { return args_.order == nullptr ? j : args_.order[j]; }
    T weight_of(int64_t sample) const {
        return args_.weights == nullptr ? T(1) : static_cast<T>(args_.weights[sample]);
    }

    // ---- packing

    // One group of one sample; `channels` are a group's.
    void pack_operand(const void* tensor, const int64_t* strides, int64_t sample, int64_t group, int64_t channels,
                      int64_t height, int64_t width, int64_t left, int64_t right, const Layout& layout, T* target) {
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

    void pack_inputs(int64_t sample, int64_t group, T* target) {
        pack_operand(args_.inputs, args_.input_strides, sample, group, args_.channels, args_.height, args_.width,
                     plan_.left, plan_.right, x_, target);
    }

    void pack_output_grads(int64_t sample, int64_t group, T* target) {
        pack_operand(args_.output_grads, args_.output_strides, sample, group, args_.outputs, args_.out_height,
                     args_.out_width, 0, 0, dy_, target);
    }

    // ---- one tile of one sample: all taps

    void set_products() {
        for (int row = 0; row < 2; ++row)
            for (int vector = 0; vector < 2; ++vector) {
                const int64_t lanes = plan_.template lanes_of<T>(vector ? plan_.vector_tiles - 1 : 0);
                const int64_t rows = plan_.rows_of(row ? plan_.row_tiles - 1 : 0);
                products_[row][vector] = find_tile_product<T>(rows, ceil_div(lanes, W));
            }

        const int64_t valid = plan_.lane_count - (plan_.lane_count - 1) / W * W;
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
        for (int64_t tap = 0; tap < plan_.taps; ++tap) {
            const int64_t ky = plan_.merged ? tap : tap / args_.kernel_w;
            const int64_t kx = plan_.merged ? 0 : tap % args_.kernel_w;
            const TapRange ys =
                tap_range(ky, args_.height, args_.out_height, args_.stride_h, args_.pad_h, args_.dilation_h);
            const TapRange xs = plan_.merged ? TapRange{0, args_.out_width}
                                             : tap_range(kx, args_.width, args_.out_width, args_.stride_w,
                                                         args_.pad_w, args_.dilation_w);
            const int64_t y = ys.begin * args_.stride_h - args_.pad_h + ky * args_.dilation_h;
            const int64_t column = xs.begin * args_.stride_w - args_.pad_w + kx * args_.dilation_w + plan_.left;
            const int64_t in_x = y * x_.row + column * x_.pixel;
            const int64_t in_dy = ys.begin * dy_.row + xs.begin * dy_.pixel;
            Tap& t = taps_[tap];
            t = {0, 0, 0, 0};
            if (ys.size() <= 0 || xs.size() <= 0) continue;
            t = {plan_.swapped ? in_x : in_dy, plan_.swapped ? in_dy : in_x, ys.size(), xs.size()};
            if (args_.stride_h * x_.row == t.columns * args_.stride_w * x_.pixel && dy_.row == t.columns * dy_.pixel) {
                t.columns *= t.rows;
                t.rows = 1;
            }
            pixels_ += t.rows * t.columns;
        }
    }

    // x and dy: the packed operands of one group of a sample, or of several, which are then summed before they are
    // squared. Returns the squares in this tile.
    double add_tile(const T* x, const T* dy, T weight, int64_t row_tile, int64_t vector_tile, T* dw, Prefetch& next,
                    int64_t samples = 1) const {
        const bool last_row = row_tile + 1 == plan_.row_tiles, last_vector = vector_tile + 1 == plan_.vector_tiles;
        const TileProduct<T> product = products_[last_row][last_vector];
        const VectorBits<T>& mask = last_vector ? last_lanes_ : all_lanes_;
        x += (plan_.swapped ? row_tile : vector_tile) * x_.tile;
        dy += (plan_.swapped ? vector_tile : row_tile) * dy_.tile;
        const int64_t x_row = args_.stride_h * x_.row, x_pixel = args_.stride_w * x_.pixel;
        const TileOperands<T> operands =
            plan_.swapped
                ? TileOperands<T>{x, dy, x_row, x_pixel, dy_.row, dy_.pixel, weight, samples, x_.sample, dy_.sample}
                : TileOperands<T>{dy, x, dy_.row, dy_.pixel, x_row, x_pixel, weight, samples, dy_.sample, x_.sample};
        V squares{};
        for (int64_t tap = 0; tap < plan_.taps; ++tap)
            product(operands, taps_[tap], mask, dw + tap * plan_.template tile_size<T>(), squares, next);
        return fold_lanes<T>(squares);
    }

    // ---- a finished tile: out of its order into dW's

    // dW's element lies at row_offsets_[row] + lane_offsets_[lane] + tap_offsets_[tap].
    void set_offsets() {
        const int64_t* g = args_.grad_strides;
        int64_t* outputs = plan_.swapped ? lane_offsets_ : row_offsets_;
        int64_t* channels = plan_.swapped ? row_offsets_ : lane_offsets_;
        for (int64_t o = 0; o < args_.outputs; ++o) outputs[o] = o * g[0];
        for (int64_t c = 0; c < plan_.tap_channels; ++c)
            channels[c] = c / args_.channels * g[3] + c % args_.channels * g[1];
        for (int64_t tap = 0; tap < plan_.taps; ++tap)
            tap_offsets_[tap] =
                plan_.merged ? tap * g[2] : tap / args_.kernel_w * g[2] + tap % args_.kernel_w * g[3];
    }

    // sums[s]: the tile's gradient of segment s; gram: this tile's part of the segments' inner products and, behind
    // them, of the weight's squared norm.
    // The first segment's tile ends up with the sum over all segments, unless each is wanted.
    void finish_tile(int64_t group, int64_t row_tile, int64_t vector_tile, T* const* sums, double* gram) const {
        const int64_t S = args_.segments;
        if (gram != nullptr)
            for (int64_t s = 0; s < S; ++s)
                for (int64_t t = 0; t <= s; ++t) gram[s * S + t] = inner_product(sums[s], sums[t], tile_);
        const bool apart = args_.segment_stride != 0;
        if (args_.step == nullptr && !apart)
            for (int64_t s = 1; s < S; ++s)
                for (int64_t k = 0; k < tile_; ++k) sums[0][k] += sums[s][k];
        double weight_sq_norm = 0;
        const int64_t rows = plan_.rows_of(row_tile), lanes = plan_.template lanes_of<T>(vector_tile);
        const int64_t pitch = ceil_div(lanes, W) * W, tile = plan_.template tile_size<T>();
        const int64_t* to_lane = lane_offsets_ + vector_tile * plan_.vectors * W;
        T* grad = static_cast<T*>(args_.grad) + group * args_.outputs * args_.grad_strides[0];
        for (int64_t m = 0; m < rows; ++m)
            for (int64_t tap = 0; tap < plan_.taps; ++tap) {
                const int64_t from = tap * tile + m * pitch;
                T* to = grad + row_offsets_[row_tile * plan_.rows + m] + tap_offsets_[tap];
                if (args_.step == nullptr)
                    for (int64_t s = 0; s < (apart ? S : 1); ++s, to += args_.segment_stride)
                        for (int64_t i = 0; i < lanes; ++i) to[to_lane[i]] = sums[s][from + i];
                else
                    weight_sq_norm +=
                        take_step(sums[0] + from, S > 1 ? sums[1] + from : nullptr, to, to_lane, lanes);
            }
        if (args_.step != nullptr) gram[S * S] = weight_sq_norm;
    }

    // Returns the squared norm of these elements of the weight, before the step.
    double take_step(const T* g1, const T* g2, T* weight, const int64_t* at, int64_t lanes) const {
        const WeightStep& step = *args_.step;
        const StepCoefficients<T> c{T(step.rate), T(step.c1), T(step.c2), T(step.weight_decay)};
        double sq_norm = 0;
        for (int64_t i = 0; i < lanes; ++i) {
            T& x = weight[at[i]];
            sq_norm += static_cast<double>(x) * static_cast<double>(x);
            // At l = 1 the second gradient has no weight: an inf in it must not reach the weight.
            x -= g2 != nullptr && step.c2 != 0 ? decrement(x, g1[i], g2[i], c) : decrement(x, g1[i], c);
        }
        return sq_norm;
    }

    // Float32 products are exact in float64. The tiles' unused elements are zeros.
    static double inner_product(const T* a, const T* b, int64_t n) {
        double sums[8] = {};
        for (int64_t k = 0; k < n; k += 8)
            for (int64_t i = 0; i < 8; ++i)
                if (k + i < n) sums[i] += static_cast<double>(a[k + i]) * static_cast<double>(b[k + i]);
        return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    }

    // Each tile's part of the segments' inner products and of the weight's squared norm.
    int64_t gram_part() const { return args_.segment_gram == nullptr ? 0 : args_.segments * args_.segments + 1; }

    void add_grams(int64_t count) {
        if (args_.segment_gram == nullptr) return;
        const int64_t S = args_.segments;
        for (int64_t s = 0; s < S; ++s)
            for (int64_t t = 0; t <= s; ++t)
                args_.segment_gram[s * S + t] = args_.segment_gram[t * S + s] = sum_of_parts(s * S + t, count);
        if (args_.step != nullptr) *args_.step->weight_sq_norm = sum_of_parts(S * S, count);
    }

    double sum_of_parts(int64_t at, int64_t count) const {
        double sum = 0;
        for (int64_t i = 0; i < count; ++i) sum += grams_[i * gram_part() + at];
        return sum;
    }

    // ---- samples outside, tiles inside: narrow layers, whose dW stays in cache

    // A segment without samples has one chunk too: its sum is 0.
    static int64_t chunks_of(int64_t samples, int64_t length) { return samples == 0 ? 1 : ceil_div(samples, length); }

    int samples_outside(int64_t grad_bytes) {
        const int64_t S = args_.segments, tiles = args_.groups * plan_.tiles();
        const int64_t fair = ceil_div(args_.batch, kSampleChunks);
        const int64_t least = ceil_div(kChunkPositions, args_.out_height * args_.out_width);
        const int64_t length = fair > least ? fair : least;
        int64_t count = 0, begin = 0;
        for (int64_t s = 0; s < S; begin = args_.segment_ends[s++])
            count += chunks_of(args_.segment_ends[s] - begin, length);
        slots_ = threads_;
        x_.put_samples_outside(plan_.merged);
        dy_.put_samples_outside(false);
        x_slot_ = aligned(x_.sample * sizeof(T) + kOverread);
        dy_slot_ = aligned(dy_.sample * sizeof(T) + kOverread);
        const int64_t gram_bytes = tiles * gram_part() * static_cast<int64_t>(sizeof(double));
        if (int status = allocate(aligned(count * sizeof(SampleChunk)) + count * aligned(grad_bytes) +
                                  slots_ * (x_slot_ + dy_slot_) + aligned(slots_) + aligned(gram_bytes) +
                                  aligned(tiles * S * sizeof(T*))))
            return status;
        chunks_ = reinterpret_cast<SampleChunk*>(take(count * sizeof(SampleChunk)));
        chunk_count_ = count;
        chunk_grad_ = aligned(grad_bytes);
        grads_ = take(count * chunk_grad_);
        slot_memory_ = take(slots_ * (x_slot_ + dy_slot_));
        busy_ = ScratchSlots(take(slots_), slots_);
        grams_ = gram_bytes == 0 ? nullptr : reinterpret_cast<double*>(take(gram_bytes));
        segment_tiles_ = reinterpret_cast<T**>(take(tiles * S * sizeof(T*)));
        SampleChunk* chunk = chunks_;
        begin = 0;
        for (int64_t s = 0; s < S; begin = args_.segment_ends[s++])
            for (int64_t c = 0; c < chunks_of(args_.segment_ends[s] - begin, length); ++c) {
                const int64_t from = begin + c * length, to = from + length;
                *chunk++ = {s, from, to < args_.segment_ends[s] ? to : args_.segment_ends[s]};
            }
        parallel_chunks(count, threads_, [](void* self, int64_t i) { static_cast<WeightGrad*>(self)->add_chunk(i); },
                        this);
        parallel_chunks(tiles, threads_,
                        [](void* self, int64_t i) { static_cast<WeightGrad*>(self)->join_chunks(i); }, this);
        add_grams(tiles);
        std::free(memory_);
        return kOk;
    }

    void add_chunk(int64_t i) {
        const SampleChunk& chunk = chunks_[i];
        T* grad = reinterpret_cast<T*>(grads_ + i * chunk_grad_);
        std::memset(grad, 0, chunk_grad_);
        const int64_t slot = busy_.take();
        T* x = reinterpret_cast<T*>(slot_memory_ + slot * (x_slot_ + dy_slot_));
        T* dy = reinterpret_cast<T*>(slot_memory_ + slot * (x_slot_ + dy_slot_) + x_slot_);
        for (int64_t j = chunk.begin; j < chunk.end; ++j) {
            const int64_t sample = sample_at(j);
            const T weight = weight_of(sample);
            double squares = 0;
            T* dw = grad;
            Prefetch next = prefetch_sample(sample_at(j + 1 < args_.batch ? j + 1 : j));
            for (int64_t g = 0; g < args_.groups; ++g) {
                pack_inputs(sample, g, x);
                pack_output_grads(sample, g, dy);
                for (int64_t vt = 0; vt < plan_.vector_tiles; ++vt)
                    for (int64_t rt = 0; rt < plan_.row_tiles; ++rt, dw += tile_)
                        squares += add_tile(x, dy, weight, rt, vt, dw, next);
            }
            args_.sq_norms[sample] = squares;
        }
        busy_.free(slot);
    }

    // The next sample's memory, spread over all pixels of this one's tiles; what is not dense is left alone.
    Prefetch prefetch_sample(int64_t sample) const {
        const int64_t pixels = pixels_ * plan_.tiles() * args_.groups;
        return {static_cast<const char*>(args_.inputs) + sample * args_.input_strides[0] * int64_t(sizeof(T)),
                static_cast<const char*>(args_.output_grads) + sample * args_.output_strides[0] * int64_t(sizeof(T)),
                ceil_div(args_.groups * args_.channels * args_.height * args_.width * int64_t(sizeof(T)), pixels),
                ceil_div(args_.groups * args_.outputs * args_.out_height * args_.out_width * int64_t(sizeof(T)), pixels)};
    }

    // Tile i of every chunk, added in the chunks' order into the first chunk of each segment.
    void join_chunks(int64_t i) {
        const int64_t S = args_.segments;
        T** sums = segment_tiles_ + i * S;
        T* first = nullptr;
        int64_t c = 0;
        for (int64_t s = 0; s < S; ++s) {
            first = nullptr;
            for (; c < chunk_count_ && chunks_[c].segment == s; ++c) {
                T* part = reinterpret_cast<T*>(grads_ + c * chunk_grad_) + i * tile_;
                if (first == nullptr)
                    first = part;
                else
                    for (int64_t k = 0; k < tile_; ++k) first[k] += part[k];
            }
            sums[s] = first;
        }
        finish_item(i, sums, grams_ == nullptr ? nullptr : grams_ + i * gram_part());
    }

    // ---- tiles outside, samples inside: wide layers; a tile of dW stays in the first-level cache

    int tiles_outside() {
        const int64_t S = args_.segments, tiles = args_.groups * plan_.tiles(), B = args_.batch;
        slots_ = threads_;
        x_.put_tiles_outside(plan_.merged, B);
        dy_.put_tiles_outside(false, B);
        x_slot_ = aligned(x_.block * x_.blocks * B * sizeof(T) + kOverread);
        dy_slot_ = aligned(dy_.block * dy_.blocks * B * sizeof(T) + kOverread);
        const int64_t tile_bytes = aligned(S * tile_ * sizeof(T)) + aligned(S * sizeof(T*));
        const int64_t gram_bytes = tiles * gram_part() * static_cast<int64_t>(sizeof(double));
        if (int status = allocate(args_.groups * (x_slot_ + dy_slot_) + slots_ * tile_bytes + aligned(slots_) +
                                  aligned(gram_bytes) + (norms() ? aligned(tiles * B * sizeof(double)) : 0)))
            return status;
        x_memory_ = take(args_.groups * x_slot_);
        dy_memory_ = take(args_.groups * dy_slot_);
        slot_memory_ = take(slots_ * tile_bytes);
        slot_size_ = tile_bytes;
        busy_ = ScratchSlots(take(slots_), slots_);
        grams_ = gram_bytes == 0 ? nullptr : reinterpret_cast<double*>(take(gram_bytes));
        if (norms()) squares_ = reinterpret_cast<double*>(take(tiles * B * sizeof(double)));
        parallel_chunks(B, threads_, [](void* self, int64_t i) { static_cast<WeightGrad*>(self)->pack_sample(i); },
                        this);
        parallel_chunks(tiles, threads_, [](void* self, int64_t i) { static_cast<WeightGrad*>(self)->sum_tile(i); },
                        this);
        for (int64_t j = 0; norms() && j < B; ++j) {
            double sum = 0;
            for (int64_t i = 0; i < tiles; ++i) sum += squares_[i * B + j];
            args_.sq_norms[sample_at(j)] = sum;
        }
        add_grams(tiles);
        std::free(memory_);
        return kOk;
    }

    bool norms() const { return args_.sq_norms != nullptr; }

    // Samples lie in args.order's order.
    T* packed_inputs(int64_t group, int64_t j) const {
        return reinterpret_cast<T*>(x_memory_ + group * x_slot_) + j * x_.sample;
    }
    T* packed_output_grads(int64_t group, int64_t j) const {
        return reinterpret_cast<T*>(dy_memory_ + group * dy_slot_) + j * dy_.sample;
    }

    void pack_sample(int64_t j) {
        const int64_t sample = sample_at(j);
        for (int64_t g = 0; g < args_.groups; ++g) {
            T* dy = packed_output_grads(g, j);
            pack_inputs(sample, g, packed_inputs(g, j));
            pack_output_grads(sample, g, dy);
            if (!norms() && weight_of(sample) != 1) scale(dy, weight_of(sample));
        }
    }

    // A sample that is not squared by itself takes its weight here.
    void scale(T* dy, T weight) const {
        const int64_t used = args_.out_height * dy_.row;
        for (int64_t block = 0; block < dy_.blocks; ++block)
            for (int64_t k = 0; k < used; ++k) dy[block * dy_.tile + k] *= weight;
    }

    void sum_tile(int64_t i) {
        const int64_t S = args_.segments, group = i / plan_.tiles(), inner = i % plan_.tiles();
        const int64_t vector_tile = inner / plan_.row_tiles, row_tile = inner % plan_.row_tiles;
        const int64_t slot = busy_.take();
        T* dw = reinterpret_cast<T*>(slot_memory_ + slot * slot_size_);
        T** sums = reinterpret_cast<T**>(slot_memory_ + slot * slot_size_ + aligned(S * tile_ * sizeof(T)));
        std::memset(dw, 0, S * tile_ * sizeof(T));
        // Next to a sample's block lies the next sample's.
        const int64_t x_offset = (plan_.swapped ? row_tile : vector_tile) * x_.tile;
        const int64_t dy_offset = (plan_.swapped ? vector_tile : row_tile) * dy_.tile;
        const int64_t x_step = ceil_div(x_.block * int64_t(sizeof(T)), pixels_);
        const int64_t dy_step = ceil_div(dy_.block * int64_t(sizeof(T)), pixels_);
        const int64_t run = norms() ? 1 : ceil_div(kRunPositions, args_.out_height * args_.out_width);
        for (int64_t s = 0, j = 0; s < S; ++s) {
            sums[s] = dw + s * tile_;
            for (int64_t samples; j < args_.segment_ends[s]; j += samples) {
                samples = args_.segment_ends[s] - j < run ? args_.segment_ends[s] - j : run;
                const T weight = norms() ? weight_of(sample_at(j)) : T(1);
                const T* x = packed_inputs(group, j);
                const T* dy = packed_output_grads(group, j);
                Prefetch next{reinterpret_cast<const char*>(x + x_offset + samples * x_.sample),
                              reinterpret_cast<const char*>(dy + dy_offset + samples * dy_.sample), x_step, dy_step};
                const double squares = add_tile(x, dy, weight, row_tile, vector_tile, dw + s * tile_, next, samples);
                if (norms()) squares_[i * args_.batch + j] = squares;
            }
        }
        finish_item(i, sums, grams_ == nullptr ? nullptr : grams_ + i * gram_part());
        busy_.free(slot);
    }

    void finish_item(int64_t i, T* const* sums, double* gram) const {
        const int64_t group = i / plan_.tiles(), inner = i % plan_.tiles();
        finish_tile(group, inner % plan_.row_tiles, inner / plan_.row_tiles, sums, gram);
    }

    const WeightGradArgs& args_;
    const Plan plan_;
    Layout x_{}, dy_{};
    int64_t tile_ = 0;  // elements of one tile of dW, all taps
    TileProduct<T> products_[2][2]{};  // [last row tile][last vector tile]
    VectorBits<T> last_lanes_{}, all_lanes_{};
    Tap* taps_ = nullptr;
    int64_t *row_offsets_ = nullptr, *lane_offsets_ = nullptr, *tap_offsets_ = nullptr;
    int64_t pixels_ = 1;  // of all taps, and one: it divides

    char* memory_ = nullptr;
    int64_t used_ = 0;
    int threads_ = 1;
    int64_t slots_ = 1, slot_size_ = 0, x_slot_ = 0, dy_slot_ = 0;
    char* slot_memory_ = nullptr;
    ScratchSlots busy_;
    SampleChunk* chunks_ = nullptr;
    int64_t chunk_count_ = 0, chunk_grad_ = 0;
    char *grads_ = nullptr, *x_memory_ = nullptr, *dy_memory_ = nullptr;
    double *grams_ = nullptr, *squares_ = nullptr;
    T** segment_tiles_ = nullptr;
};

}  // namespace
}  // namespace SVAG_SIMD
}  // namespace svag

extern "C" int SVAG_ENTRY(svag_weight_grad)(const svag::WeightGradArgs& args) {
    using namespace svag::SVAG_SIMD;
    return args.is_double ? WeightGrad<double>(args).run() : WeightGrad<float>(args).run();
}
