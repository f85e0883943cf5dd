// Samples outside, tiles inside: for narrow layers, whose whole dW stays in a core's cache from sample to sample.
#pragma once

#include "cpu/kernels/weight_grad/layout.h"
#include "cpu/scratch_slots.h"
#include "cpu/thread_pool.h"

namespace svag {
namespace SVAG_SIMD {
namespace {

// Samples are cut into so many chunks at most, whatever the number of threads: so the order of the sums never depends
// on it. A chunk has so many positions at least: clearing its dW and adding it up costs as much as some 8 of them.
constexpr int64_t kSampleChunks = 16;
constexpr int64_t kChunkPositions = 128;

struct SampleChunk {
    int64_t segment, begin, end;  // of args.order
};

template <class T>
class SamplesOutside {
    template <class E>
    using Piece = ScratchMemory::Piece<E>;

  public:
    explicit SamplesOutside(const WeightGradArgs& args)
        : args_(args),
          product_(args, memory_),
          threads_(product_.threads_for(args)),
          chunk_length_(length_of(args)),
          chunk_count_(count_chunks()),
          grad_size_(ScratchMemory::padded<T>(product_.tiles * product_.tile_size)),
          x_size_(ScratchMemory::padded<T>(product_.x.size + kOverread / int64_t(sizeof(T)))),
          dy_size_(ScratchMemory::padded<T>(product_.dy.size + kOverread / int64_t(sizeof(T)))),
          chunks_(memory_.reserve<SampleChunk>(chunk_count_)),
          grads_(memory_.reserve<T>(chunk_count_ * grad_size_)),
          packed_(memory_.reserve<T>(threads_ * (x_size_ + dy_size_))),
          busy_bytes_(memory_.reserve<char>(threads_)),
          tile_sums_(memory_.reserve<T*>(product_.tiles * args.segments)) {}

    int run() {
        if (!memory_.allocate()) return kOutOfMemory;
        product_.prepare();
        busy_ = ScratchSlots(memory_.at(busy_bytes_), threads_);
        set_chunks();
        parallel_chunks(
            chunk_count_, threads_, [](void* self, int64_t i) { static_cast<SamplesOutside*>(self)->add_chunk(i); },
            this);
        parallel_chunks(
            product_.tiles, threads_,
            [](void* self, int64_t i) { static_cast<const SamplesOutside*>(self)->join_chunks(i); }, this);
        product_.sum_grams();
        return kOk;
    }

  private:
    static int64_t length_of(const WeightGradArgs& args) {
        const int64_t fair = ceil_div(args.batch, kSampleChunks);
        const int64_t least = ceil_div(kChunkPositions, args.out_height * args.out_width);
        return fair > least ? fair : least;
    }

    // A segment without samples has one chunk too: its sum is 0.
    int64_t chunks_of(int64_t samples) const { return samples == 0 ? 1 : ceil_div(samples, chunk_length_); }

    int64_t count_chunks() const {
        int64_t count = 0, begin = 0;
        for (int64_t s = 0; s < args_.segments; begin = args_.segment_ends[s++])
            count += chunks_of(args_.segment_ends[s] - begin);
        return count;
    }

    void set_chunks() const {
        SampleChunk* chunk = memory_.at(chunks_);
        int64_t begin = 0;
        for (int64_t s = 0; s < args_.segments; begin = args_.segment_ends[s++])
            for (int64_t c = 0; c < chunks_of(args_.segment_ends[s] - begin); ++c) {
                const int64_t from = begin + c * chunk_length_, to = from + chunk_length_;
                *chunk++ = {s, from, to < args_.segment_ends[s] ? to : args_.segment_ends[s]};
            }
    }

    T* grad_of(int64_t chunk) const { return memory_.at(grads_) + chunk * grad_size_; }

    // One chunk's samples into a dW of its own.
    void add_chunk(int64_t i) {
        const SampleChunk& chunk = memory_.at(chunks_)[i];
        T* grad = grad_of(i);
        std::memset(grad, 0, static_cast<size_t>(grad_size_) * sizeof(T));
        const int64_t slot = busy_.take();
        T* x = memory_.at(packed_) + slot * (x_size_ + dy_size_);
        T* dy = x + x_size_;
        for (int64_t j = chunk.begin; j < chunk.end; ++j) {
            const int64_t sample = product_.sample_at(j);
            const T weight = product_.weight_of(sample);
            double squares = 0;
            T* dw = grad;
            Prefetch next = prefetch_sample(product_.sample_at(j + 1 < args_.batch ? j + 1 : j));
            for (int64_t g = 0; g < args_.groups; ++g) {
                product_.pack_inputs(sample, g, x);
                product_.pack_output_grads(sample, g, dy);
                for (int64_t vt = 0; vt < product_.plan.vector_tiles; ++vt)
                    for (int64_t rt = 0; rt < product_.plan.row_tiles; ++rt, dw += product_.tile_size)
                        squares += product_.add_tile(x, dy, weight, rt, vt, dw, next);
            }
            args_.sq_norms[sample] = squares;
        }
        busy_.free(slot);
    }

    // The next sample's memory, spread over all pixels of this one's tiles; what is not dense is left alone.
    Prefetch prefetch_sample(int64_t sample) const {
        constexpr int64_t bytes = sizeof(T);
        const int64_t pixels = product_.pixels() * product_.tiles;
        return {static_cast<const char*>(args_.inputs) + sample * args_.input_strides[0] * bytes,
                static_cast<const char*>(args_.output_grads) + sample * args_.output_strides[0] * bytes,
                ceil_div(args_.groups * args_.channels * args_.height * args_.width * bytes, pixels),
                ceil_div(args_.groups * args_.outputs * args_.out_height * args_.out_width * bytes, pixels)};
    }

    // One tile of every chunk, added in the chunks' order into the first chunk of each segment.
    void join_chunks(int64_t tile) const {
        T** sums = memory_.at(tile_sums_) + tile * args_.segments;
        const SampleChunk* chunks = memory_.at(chunks_);
        int64_t c = 0;
        for (int64_t s = 0; s < args_.segments; ++s) {
            T* first = nullptr;
            for (; c < chunk_count_ && chunks[c].segment == s; ++c) {
                T* part = grad_of(c) + tile * product_.tile_size;
                if (first == nullptr)
                    first = part;
                else
                    for (int64_t k = 0; k < product_.tile_size; ++k) first[k] += part[k];
            }
            sums[s] = first;
        }
        product_.finish_tile(tile, sums);
    }

    const WeightGradArgs& args_;
    ScratchMemory memory_;
    TiledProduct<T> product_;
    const int threads_;
    const int64_t chunk_length_, chunk_count_;      // a chunk's most samples; all segments' chunks
    const int64_t grad_size_, x_size_, dy_size_;    // elements of a chunk's dW, and of a slot's operands
    const Piece<SampleChunk> chunks_;
    const Piece<T> grads_, packed_;
    const Piece<char> busy_bytes_;
    const Piece<T*> tile_sums_;
    ScratchSlots busy_;
};

}  // namespace
}  // namespace SVAG_SIMD
}  // namespace svag
