// What the fused optimizer steps share: tensors cut into chunks for the threads, and the statistics of the same pass.
// Included by files under cpu/kernels/ alone, each compiled once a level.
#pragma once

#include <cmath>
#include <cstdlib>

#include "cpu/simd.h"
#include "cpu/thread_pool.h"

namespace svag {
namespace SVAG_SIMD {
namespace {  // no symbol of a template may leave the object of its level

// Sums run in float32 over a block, in float64 across blocks: float32's rounding stays below 1e-5 of the sum.
constexpr int64_t kBlock = 4096;
// What one thread takes at a time: long enough to hide the hand-over, short enough to share the work evenly.
constexpr int64_t kChunk = 16 * kBlock;
// Below this many elements waking a second thread costs more than it saves.
constexpr int64_t kSerial = 8 * kBlock;

// Gradients above 1e19 are finite, but their squares overflow float32.
template <class G>
void sums_in_float64(const G* g1, const G* g2, int64_t n, double* sums) {
    using V = typename Simd<float>::V;
    constexpr int width = Simd<float>::width;
    sums[kSqNorm1] = sums[kSqNorm2] = sums[kInner] = 0;
    for (int64_t i = 0; i < n; i += width) {
        const int64_t here = n - i < width ? n - i : width;
        G lanes1[width] = {}, lanes2[width] = {};
        std::memcpy(lanes1, g1 + i, here * sizeof(G));
        if (g2 != nullptr) std::memcpy(lanes2, g2 + i, here * sizeof(G));
        const V v1 = Io<G, float>::load(lanes1), v2 = Io<G, float>::load(lanes2);
        for (int j = 0; j < width; ++j) {
            const double a = static_cast<double>(v1[j]), b = static_cast<double>(v2[j]);
            sums[kSqNorm1] += a * a;
            sums[kSqNorm2] += b * b;
            sums[kInner] += a * b;
        }
    }
}

template <class G>
bool all_finite(const G* g, int64_t n) {
    bool finite = true;
    for (int64_t i = 0; g != nullptr && i < n; ++i) finite &= std::isfinite(g[i]);
    return finite;
}

// Adds one block's moments, of n gradient entries, to a chunk's statistics. g2 may be null. An entry that is inf or nan
// leaves no finite sum of squares, so that single entries are looked at only where a sum is not finite.
template <class A, class V, class G>
SVAG_INLINE void add_block(const Moments<V>& m, const G* g1, const G* g2, int64_t n, double* stats) {
    double sums[kStatCount] = {lane_sum(m.sq_norm1), lane_sum(m.sq_norm2), lane_sum(m.inner),
                               lane_sum(m.weight_sq_norm)};
    if (!std::isfinite(sums[kSqNorm1] + sums[kSqNorm2])) {
        if constexpr (sizeof(A) == sizeof(float)) {
            sums_in_float64(g1, g2, n, sums);
            if (!std::isfinite(sums[kSqNorm1] + sums[kSqNorm2])) stats[kFinite] = 0;
        } else if (!(all_finite(g1, n) && all_finite(g2, n))) {
            stats[kFinite] = 0;
        }
    }
    for (int k = 0; k < kFinite; ++k) stats[k] += sums[k];
}

// One walk over a list of tensors. Tensor has a `size`; Options has `threads` and `skip_nonfinite`.
template <class Tensor, class Options>
struct Pass {
    struct Chunk {
        const Tensor* tensor;
        int64_t begin, end;
        double stats[kStatCount];
    };
    using ChunkStep = void (*)(const Pass&, Chunk&);

    const Options* options;
    Chunk* chunks;
    bool update;  // false: statistics alone

    // Steps through every chunk, and sums their statistics in order. With skip_nonfinite nothing is updated until
    // a first walk has found every gradient finite.
    template <ChunkStep kStep>
    static int run(const Tensor* tensors, int64_t count, const Options& options, double* stats) {
        int64_t chunk_count = 0, elements = 0;
        for (int64_t t = 0; t < count; ++t) {
            chunk_count += (tensors[t].size + kChunk - 1) / kChunk;
            elements += tensors[t].size;
        }
        auto* chunks = static_cast<Chunk*>(std::malloc(static_cast<size_t>(chunk_count + 1) * sizeof(Chunk)));
        if (chunks == nullptr) return kOutOfMemory;
        int64_t c = 0;
        for (int64_t t = 0; t < count; ++t)
            for (int64_t i = 0; i < tensors[t].size; i += kChunk, ++c) {
                chunks[c].tensor = &tensors[t];
                chunks[c].begin = i;
                chunks[c].end = tensors[t].size - i < kChunk ? tensors[t].size : i + kChunk;
            }

        Pass pass{&options, chunks, !options.skip_nonfinite};
        const int threads = elements < kSerial ? 1 : options.threads;
        parallel_chunks(chunk_count, threads, step_chunk<kStep>, &pass);
        for (int k = 0; k < kFinite; ++k) stats[k] = 0;
        stats[kFinite] = 1;
        for (c = 0; c < chunk_count; ++c) {
            for (int k = 0; k < kFinite; ++k) stats[k] += chunks[c].stats[k];
            if (chunks[c].stats[kFinite] == 0) stats[kFinite] = 0;
        }
        if (options.skip_nonfinite && stats[kFinite] == 1) {
            pass.update = true;
            parallel_chunks(chunk_count, threads, step_chunk<kStep>, &pass);
        }
        std::free(chunks);
        return kOk;
    }

  private:
    template <ChunkStep kStep>
    static void step_chunk(void* context, int64_t i) {
        const Pass& pass = *static_cast<const Pass*>(context);
        Chunk& chunk = pass.chunks[i];
        for (double& s : chunk.stats) s = 0;
        chunk.stats[kFinite] = 1;
        kStep(pass, chunk);
    }
};

}  // namespace
}  // namespace SVAG_SIMD
}  // namespace svag
