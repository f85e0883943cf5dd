// Tiles outside, samples inside: for wide layers, of whose dW only a tile stays in the first-level cache.
#pragma once

#include "cpu/kernels/weight_grad/layout.h"
#include "cpu/scratch_slots.h"
#include "cpu/thread_pool.h"

namespace svag {
namespace SVAG_SIMD {
namespace {

// Where no norms are asked for, a tile's sum runs over samples until it has met this many positions: what adding it to
// dW costs is then small, and a sum is still short enough to round little.
constexpr int64_t kRunPositions = 64;

template <class T>
class TilesOutside {
    template <class E>
    using Piece = ScratchMemory::Piece<E>;

  public:
    explicit TilesOutside(const WeightGradArgs& args)
        : args_(args),
          product_(args, memory_),
          threads_(product_.threads_for(args)),
          norms_(args.sq_norms != nullptr),
          x_size_(ScratchMemory::padded<T>(product_.x.size + kOverread / int64_t(sizeof(T)))),
          dy_size_(ScratchMemory::padded<T>(product_.dy.size + kOverread / int64_t(sizeof(T)))),
          dw_size_(ScratchMemory::padded<T>(args.segments * product_.tile_size)),
          sums_size_(ScratchMemory::padded<T*>(args.segments)),
          x_(memory_.reserve<T>(args.groups * x_size_)),
          dy_(memory_.reserve<T>(args.groups * dy_size_)),
          dw_(memory_.reserve<T>(threads_ * dw_size_)),
          sums_(memory_.reserve<T*>(threads_ * sums_size_)),
          busy_bytes_(memory_.reserve<char>(threads_)),
          squares_(memory_.reserve<double>(norms_ ? product_.tiles * args.batch : 0)) {}

    int run() {
        if (!memory_.allocate()) return kOutOfMemory;
        product_.prepare();
        busy_ = ScratchSlots(memory_.at(busy_bytes_), threads_);
        parallel_chunks(
            args_.batch, threads_,
            [](void* self, int64_t j) { static_cast<const TilesOutside*>(self)->pack_sample(j); }, this);
        parallel_chunks(
            product_.tiles, threads_, [](void* self, int64_t i) { static_cast<TilesOutside*>(self)->sum_tile(i); },
            this);
        if (norms_) sum_squares();
        product_.sum_grams();
        return kOk;
    }

  private:
    // Samples follow each other in args.order's order.
    T* packed_inputs(int64_t group, int64_t j) const {
        return memory_.at(x_) + group * x_size_ + j * product_.x.sample;
    }
    T* packed_output_grads(int64_t group, int64_t j) const {
        return memory_.at(dy_) + group * dy_size_ + j * product_.dy.sample;
    }

    void pack_sample(int64_t j) const {
        const int64_t sample = product_.sample_at(j);
        for (int64_t g = 0; g < args_.groups; ++g) {
            T* dy = packed_output_grads(g, j);
            product_.pack_inputs(sample, g, packed_inputs(g, j));
            product_.pack_output_grads(sample, g, dy);
            // A sample that is not squared by itself takes its weight here: its sum is shared with others.
            if (!norms_ && product_.weight_of(sample) != 1) scale(dy, product_.weight_of(sample));
        }
    }

    void scale(T* packed_dy, T weight) const {
        const Layout& dy = product_.dy;
        const int64_t used = args_.out_height * dy.row;
        for (int64_t block = 0; block < dy.blocks; ++block)
            for (int64_t k = 0; k < used; ++k) packed_dy[block * dy.tile + k] *= weight;
    }

    // One tile of all samples' sum.
    void sum_tile(int64_t i) {
        const auto [group, row_tile, vector_tile] = product_.place_of(i);
        const int64_t S = args_.segments, slot = busy_.take();
        T* dw = memory_.at(dw_) + slot * dw_size_;
        T** sums = memory_.at(sums_) + slot * sums_size_;
        std::memset(dw, 0, static_cast<size_t>(S * product_.tile_size) * sizeof(T));
        // Behind a sample's block is the next sample's.
        const int64_t x_begin = product_.x_begin(row_tile, vector_tile);
        const int64_t dy_begin = product_.dy_begin(row_tile, vector_tile);
        const int64_t x_step = ceil_div(product_.x.block * int64_t(sizeof(T)), product_.pixels());
        const int64_t dy_step = ceil_div(product_.dy.block * int64_t(sizeof(T)), product_.pixels());
        const int64_t run = norms_ ? 1 : ceil_div(kRunPositions, args_.out_height * args_.out_width);
        for (int64_t s = 0, j = 0; s < S; ++s) {
            sums[s] = dw + s * product_.tile_size;
            for (int64_t samples; j < args_.segment_ends[s]; j += samples) {
                samples = args_.segment_ends[s] - j < run ? args_.segment_ends[s] - j : run;
                const T weight = norms_ ? product_.weight_of(product_.sample_at(j)) : T(1);
                const T* x = packed_inputs(group, j);
                const T* dy = packed_output_grads(group, j);
                Prefetch next{reinterpret_cast<const char*>(x + x_begin + samples * product_.x.sample),
                              reinterpret_cast<const char*>(dy + dy_begin + samples * product_.dy.sample), x_step,
                              dy_step};
                const double squares = product_.add_tile(x, dy, weight, row_tile, vector_tile, sums[s], next, samples);
                if (norms_) memory_.at(squares_)[i * args_.batch + j] = squares;
            }
        }
        product_.finish_tile(i, sums);
        busy_.free(slot);
    }

    // Each sample's squares, tile by tile in their order: the same for any number of threads.
    void sum_squares() const {
        for (int64_t j = 0; j < args_.batch; ++j) {
            double sum = 0;
            for (int64_t i = 0; i < product_.tiles; ++i) sum += memory_.at(squares_)[i * args_.batch + j];
            args_.sq_norms[product_.sample_at(j)] = sum;
        }
    }

    const WeightGradArgs& args_;
    ScratchMemory memory_;
    TiledProduct<T> product_;
    const int threads_;
    const bool norms_;
    const int64_t x_size_, dy_size_;     // elements of one group's operands, all samples
    const int64_t dw_size_, sums_size_;  // of a slot's tiles, one a segment, and of its pointers to them
    const Piece<T> x_, dy_, dw_;
    const Piece<T*> sums_;
    const Piece<char> busy_bytes_;
    const Piece<double> squares_;
    ScratchSlots busy_;
};

}  // namespace
}  // namespace SVAG_SIMD
}  // namespace svag
