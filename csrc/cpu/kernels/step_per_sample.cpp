#include "cpu/step_per_sample.h"

#include <cmath>
#include <cstdlib>

#include "cpu/simd.h"
#include "cpu/thread_pool.h"
#include "svag_math.h"

namespace svag {
namespace SVAG_SIMD {
namespace {

// Elements whose two sums over the samples stay in the first-level cache while every sample passes by.
constexpr int64_t kBlock = 2048;
// What one thread takes at a time; its parts of the sums are added in order, whatever the number of threads.
constexpr int64_t kChunk = 8 * kBlock;

struct Chunk {
    const PerSampleTensor* tensor;
    int64_t begin, end;
    double* sq_norms;  // [samples1 + samples2]
    double stats[kStatCount];
};

struct Pass {
    Chunk* chunks;
    int64_t samples1, samples2;
    const StepOptions* options;
};

// sum += g, and the squared norm of g: in the lanes' own precision over one block, in float64 where that overflows.
template <class T>
SVAG_INLINE double add_sample(const T* g, T* sum, int64_t n) {
    using V = typename Simd<T>::V;
    constexpr int64_t W = Simd<T>::width;
    V squares[4] = {};
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W)
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            const V v = load_raw<V>(g + i + k * W);
            const V total = load_raw<V>(sum + i + k * W) + v;
            std::memcpy(sum + i + k * W, &total, sizeof total);
            squares[k] += v * v;
        }
    double sq_norm = lane_sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    for (; i < n; ++i) {
        sum[i] += g[i];
        sq_norm += static_cast<double>(g[i]) * static_cast<double>(g[i]);
    }
    if (std::isfinite(sq_norm)) return sq_norm;
    sq_norm = 0;
    for (int64_t j = 0; j < n; ++j) sq_norm += static_cast<double>(g[j]) * static_cast<double>(g[j]);
    return sq_norm;
}

template <class T>
void sum_samples(const void* grads, int64_t samples, int64_t size, int64_t from, int64_t n, T* mean, double* sq_norms) {
    std::memset(mean, 0, n * sizeof(T));
    for (int64_t s = 0; s < samples; ++s)
        sq_norms[s] += add_sample(static_cast<const T*>(grads) + s * size + from, mean, n);
    const T scale = T(1) / static_cast<T>(samples);
    for (int64_t i = 0; i < n; ++i) mean[i] *= scale;
}

template <class T>
void step_block(const Pass& pass, Chunk& chunk, int64_t from, int64_t n) {
    alignas(64) T mean1[kBlock], mean2[kBlock];
    const PerSampleTensor& t = *chunk.tensor;
    const bool second = t.grads2 != nullptr;
    sum_samples(t.grads1, pass.samples1, t.size, from, n, mean1, chunk.sq_norms);
    if (second) sum_samples(t.grads2, pass.samples2, t.size, from, n, mean2, chunk.sq_norms + pass.samples1);
    const StepOptions& o = *pass.options;
    const StepCoefficients<T> c{T(o.rate), T(o.c1), T(o.c2), T(o.weight_decay)};
    T* param = static_cast<T*>(t.param) + from;
    Moments<double> moments{};
    for (int64_t i = 0; i < n; ++i) {
        const auto x = static_cast<double>(param[i]), g1 = static_cast<double>(mean1[i]);
        if (second)
            moments.add(x, g1, static_cast<double>(mean2[i]));
        else
            moments.add(x, g1);
        // At l = 1 the second gradient has no weight: an inf in it must not reach the param.
        param[i] -= second && o.c2 != 0 ? decrement(param[i], mean1[i], mean2[i], c) : decrement(param[i], mean1[i], c);
    }
    chunk.stats[kSqNorm1] += moments.sq_norm1;
    chunk.stats[kSqNorm2] += moments.sq_norm2;
    chunk.stats[kInner] += moments.inner;
    chunk.stats[kWeightSqNorm] += moments.weight_sq_norm;
    if (std::isnan(moments.poison)) chunk.stats[kFinite] = 0;
}

void step_chunk(void* context, int64_t i) {
    const Pass& pass = *static_cast<Pass*>(context);
    Chunk& chunk = pass.chunks[i];
    for (int64_t from = chunk.begin; from < chunk.end; from += kBlock) {
        const int64_t n = chunk.end - from < kBlock ? chunk.end - from : kBlock;
        if (chunk.tensor->is_double)
            step_block<double>(pass, chunk, from, n);
        else
            step_block<float>(pass, chunk, from, n);
    }
}

}  // namespace
}  // namespace SVAG_SIMD
}  // namespace svag

extern "C" int SVAG_ENTRY(svag_step_per_sample)(const svag::PerSampleTensor* tensors, int64_t count, int64_t samples1,
                                                int64_t samples2, const svag::StepOptions& options, double* sq_norms,
                                                double* stats) {
    using namespace svag;
    using namespace svag::SVAG_SIMD;
    const int64_t samples = samples1 + samples2;
    int64_t chunk_count = 0;
    for (int64_t t = 0; t < count; ++t) chunk_count += (tensors[t].size + kChunk - 1) / kChunk;
    auto* chunks = static_cast<Chunk*>(std::calloc(chunk_count + 1, sizeof(Chunk)));
    auto* parts = static_cast<double*>(std::calloc(chunk_count * samples + 1, sizeof(double)));
    if (chunks == nullptr || parts == nullptr) {
        std::free(chunks);
        std::free(parts);
        return kOutOfMemory;
    }
    Chunk* chunk = chunks;
    for (int64_t t = 0; t < count; ++t)
        for (int64_t begin = 0; begin < tensors[t].size; begin += kChunk, ++chunk) {
            chunk->tensor = tensors + t;
            chunk->begin = begin;
            chunk->end = begin + kChunk < tensors[t].size ? begin + kChunk : tensors[t].size;
            chunk->sq_norms = parts + (chunk - chunks) * samples;
            chunk->stats[kFinite] = 1;
        }
    Pass pass{chunks, samples1, samples2, &options};
    parallel_chunks(chunk_count, options.threads, step_chunk, &pass);
    for (int64_t s = 0; s < samples; ++s) {
        sq_norms[s] = 0;
        for (int64_t i = 0; i < chunk_count; ++i) sq_norms[s] += chunks[i].sq_norms[s];
    }
    for (int k = 0; k < kStatCount; ++k) stats[k] = k == kFinite;
    for (int64_t i = 0; i < chunk_count; ++i) {
        for (int k = 0; k < kFinite; ++k) stats[k] += chunks[i].stats[k];
        if (chunks[i].stats[kFinite] == 0) stats[kFinite] = 0;
    }
    std::free(chunks);
    std::free(parts);
    return kOk;
}
