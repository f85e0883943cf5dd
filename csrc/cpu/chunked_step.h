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
// What is handed to a thread at once holds at least this many elements where chunks are short, as of small tensors.
constexpr int64_t kHandedOut = 2 * kBlock;

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

// One walk over a list of tensors. Tensor has a `size`; Options has `threads` and `skip_nonfinite`. Each tensor is cut into
// `segments` of equal length, each with options and statistics of its own: chunks begin again in every segment, so that
// its bits depend neither on how many there are nor on the others.
template <class Tensor, class Options>
struct Pass {
    struct Chunk {
        const Tensor* tensor;
        int64_t segment, begin, end;
        double stats[kStatCount];
    };
    using ChunkStep = void (*)(const Pass&, Chunk&);

    const Options* options;  // of each segment
    Chunk* chunks;
    const int64_t* firsts;  // the first chunk of each part that is handed out, and behind them how many chunks there are
    bool update;            // false: statistics alone
    const double* skip;     // the segments' statistics; what isn't finite by them is left as it is. Null: nothing is

    // Steps through every chunk, and sums each segment's statistics in order. With skip_nonfinite nothing is updated until
    // a first walk has found every gradient of its segment finite. Of the first options `threads` and `skip_nonfinite`
    // hold for all.
    template <ChunkStep kStep>
    static int run(const Tensor* tensors, int64_t count, const Options* options, int64_t segments, double* stats) {
        int64_t chunk_count = 0, elements = 0;
        for (int64_t t = 0; t < count; ++t) {
            chunk_count += segments * ((tensors[t].size / segments + kChunk - 1) / kChunk);
            elements += tensors[t].size;
        }
        const auto bytes = static_cast<size_t>(chunk_count + 1) * (sizeof(Chunk) + sizeof(int64_t));
        auto* chunks = static_cast<Chunk*>(std::malloc(bytes));
        if (chunks == nullptr) return kOutOfMemory;
        auto* firsts = reinterpret_cast<int64_t*>(chunks + chunk_count + 1);
        int64_t c = 0, parts = 0, in_part = kHandedOut;
        for (int64_t t = 0; t < count; ++t) {
            const int64_t size = tensors[t].size / segments;
            for (int64_t s = 0; s < segments; ++s)
                for (int64_t i = 0; i < size; i += kChunk, ++c) {
                    const int64_t n = size - i < kChunk ? size - i : kChunk;
                    if (in_part >= kHandedOut || n >= kHandedOut) {
                        firsts[parts++] = c;
                        in_part = 0;
                    }
                    in_part += n;
                    chunks[c].tensor = &tensors[t];
                    chunks[c].segment = s;
                    chunks[c].begin = s * size + i;
                    chunks[c].end = s * size + i + n;
                }
        }
        firsts[parts] = chunk_count;

        Pass pass{options, chunks, firsts, !options->skip_nonfinite, nullptr};
        const int threads = elements < kSerial ? 1 : options->threads;
        parallel_chunks(parts, threads, step_part<kStep>, &pass);
        for (int64_t s = 0; s < segments; ++s)
            for (int k = 0; k < kStatCount; ++k) stats[s * kStatCount + k] = k == kFinite;
        for (c = 0; c < chunk_count; ++c) {
            double* own = stats + chunks[c].segment * kStatCount;
            for (int k = 0; k < kFinite; ++k) own[k] += chunks[c].stats[k];
            if (chunks[c].stats[kFinite] == 0) own[kFinite] = 0;
        }
        if (options->skip_nonfinite) {
            pass.update = true;
            pass.skip = stats;
            parallel_chunks(parts, threads, step_part<kStep>, &pass);
        }
        std::free(chunks);
        return kOk;
    }

  private:
    template <ChunkStep kStep>
    static void step_part(void* context, int64_t part) {
        const Pass& pass = *static_cast<const Pass*>(context);
        for (int64_t c = pass.firsts[part]; c < pass.firsts[part + 1]; ++c) {
            Chunk& chunk = pass.chunks[c];
            if (pass.skip != nullptr && pass.skip[chunk.segment * kStatCount + kFinite] == 0) continue;
            for (double& s : chunk.stats) s = 0;
            chunk.stats[kFinite] = 1;
            kStep(pass, chunk);
        }
    }
};

}  // namespace
}  // namespace SVAG_SIMD
}  // namespace svag
