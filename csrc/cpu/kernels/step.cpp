#include "cpu/step.h"

#include <cmath>
#include <cstdlib>

#include "cpu/simd.h"
#include "cpu/thread_pool.h"

namespace svag {
namespace SVAG_SIMD {
namespace {

// Sums run in float32 over a block, in float64 across blocks: float32's rounding stays below 1e-5 of the sum.
constexpr int64_t kBlock = 4096;
// What one thread takes at a time: long enough to hide the hand-over, short enough to share the work evenly.
constexpr int64_t kChunk = 16 * kBlock;
// Below this many elements waking a second thread costs more than it saves.
constexpr int64_t kSerial = 8 * kBlock;

struct Chunk {
    const StepTensor* tensor;
    int64_t begin, end;
    double stats[kStatCount];
};

struct Pass {
    const StepOptions* options;
    Chunk* chunks;
    bool update;
};

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

// One block of one tensor: statistics, and the update where it is asked for.
template <class P, class G, class A, bool kGrad2, bool kCompensated>
class Block {
    using V = typename Simd<A>::V;
    static constexpr int width = Simd<A>::width;

  public:
    Block(const StepOptions& o, bool update)
        : coefficients_{A(o.rate), A(o.c1), A(o.c2), A(o.weight_decay)}, combine_(o.c2 != 0), update_(update) {}

    SVAG_INLINE void run(P* x, const G* g1, const G* g2, float* e, int64_t n, double* stats) const {
        Moments<V> m{};
        int64_t i = 0;
        for (; i + width <= n; i += width)
            element(m, x + i, g1 + i, kGrad2 ? g2 + i : nullptr, kCompensated ? e + i : nullptr);
        if (i < n) {
            const auto left = static_cast<size_t>(n - i);
            P tail_x[width] = {};
            G tail_1[width] = {}, tail_2[width] = {};
            float tail_e[width] = {};
            std::memcpy(tail_x, x + i, left * sizeof(P));
            std::memcpy(tail_1, g1 + i, left * sizeof(G));
            if (kGrad2) std::memcpy(tail_2, g2 + i, left * sizeof(G));
            if (kCompensated) std::memcpy(tail_e, e + i, left * sizeof(float));
            element(m, tail_x, tail_1, tail_2, tail_e);
            if (update_) std::memcpy(x + i, tail_x, left * sizeof(P));
            if (update_ && kCompensated) std::memcpy(e + i, tail_e, left * sizeof(float));
        }
        double sums[kStatCount] = {lane_sum(m.sq_norm1), lane_sum(m.sq_norm2), lane_sum(m.inner),
                                   lane_sum(m.weight_sq_norm), lane_sum(m.poison)};
        const bool finite = sums[kFinite] == 0;
        if constexpr (sizeof(A) == sizeof(float)) {
            if (finite && !std::isfinite(sums[kSqNorm1] + sums[kSqNorm2] + sums[kInner]))
                sums_in_float64(g1, g2, n, sums);
        }
        for (int k = 0; k < kFinite; ++k) stats[k] += sums[k];
        if (!finite) stats[kFinite] = 0;
    }

  private:
    SVAG_INLINE void element(Moments<V>& m, P* x, const G* g1, const G* g2, float* e) const {
        const V vx = Io<P, A>::load(x);
        const V v1 = Io<G, A>::load(g1);
        if constexpr (kCompensated) {
            // The parameter's value is x + e; e holds what rounding x to its dtype has lost so far.
            const V ve = Io<float, A>::load(e);
            V sum, error;
            two_sum(vx, ve - decrement_at(m, vx, vx + ve, v1, g2), sum, error);
            if (update_) {
                Io<P, A>::store(x, sum);
                Io<float, A>::store(e, (sum - Io<P, A>::rounded(sum)) + error);
            }
        } else {
            const V step = decrement_at(m, vx, vx, v1, g2);
            if (update_) Io<P, A>::store(x, vx - step);
        }
    }

    SVAG_INLINE V decrement_at(Moments<V>& m, V x, V value, V g1, const G* g2) const {
        if constexpr (kGrad2) {
            const V v2 = Io<G, A>::load(g2);
            m.add(x, g1, v2);
            if (combine_) return decrement(value, g1, v2, coefficients_);
        } else {
            m.add(x, g1);
        }
        return decrement(value, g1, coefficients_);
    }

    StepCoefficients<A> coefficients_;
    bool combine_, update_;
};

template <class P, class G, class A, bool kGrad2, bool kCompensated>
void run_chunk(const Pass& pass, Chunk& chunk) {
    const Block<P, G, A, kGrad2, kCompensated> block(*pass.options, pass.update);
    const StepTensor& t = *chunk.tensor;
    for (int64_t i = chunk.begin; i < chunk.end; i += kBlock)
        block.run(static_cast<P*>(t.param) + i, static_cast<const G*>(t.grad1) + i,
                  kGrad2 ? static_cast<const G*>(t.grad2) + i : nullptr,
                  kCompensated ? static_cast<float*>(t.compensation) + i : nullptr,
                  chunk.end - i < kBlock ? chunk.end - i : kBlock, chunk.stats);
}

template <class P, class G, class A>
void run_chunk(const Pass& pass, Chunk& chunk) {
    const bool grad2 = chunk.tensor->grad2 != nullptr;
    if constexpr (sizeof(A) == sizeof(float)) {
        if (chunk.tensor->compensation != nullptr)
            return grad2 ? run_chunk<P, G, A, true, true>(pass, chunk) : run_chunk<P, G, A, false, true>(pass, chunk);
    }
    return grad2 ? run_chunk<P, G, A, true, false>(pass, chunk) : run_chunk<P, G, A, false, false>(pass, chunk);
}

constexpr int pair(DType param, DType grad) { return static_cast<int>(param) * 4 + static_cast<int>(grad); }

bool supported(const StepTensor& t) {
    const bool dtypes = t.param_dtype == t.grad_dtype || t.grad_dtype == DType::float32;
    return dtypes && (t.compensation == nullptr || t.param_dtype != DType::float64);
}

void run_chunk(void* context, int64_t i) {
    const Pass& pass = *static_cast<const Pass*>(context);
    Chunk& chunk = pass.chunks[i];
    for (double& s : chunk.stats) s = 0;
    chunk.stats[kFinite] = 1;
    switch (pair(chunk.tensor->param_dtype, chunk.tensor->grad_dtype)) {
        case pair(DType::float32, DType::float32): return run_chunk<float, float, float>(pass, chunk);
        case pair(DType::float64, DType::float64): return run_chunk<double, double, double>(pass, chunk);
        case pair(DType::float64, DType::float32): return run_chunk<double, float, double>(pass, chunk);
        case pair(DType::bfloat16, DType::bfloat16): return run_chunk<bfloat16, bfloat16, float>(pass, chunk);
        case pair(DType::bfloat16, DType::float32): return run_chunk<bfloat16, float, float>(pass, chunk);
        case pair(DType::float16, DType::float16): return run_chunk<float16, float16, float>(pass, chunk);
        case pair(DType::float16, DType::float32): return run_chunk<float16, float, float>(pass, chunk);
        default: return;
    }
}

int step(const StepTensor* tensors, int64_t count, const StepOptions& options, double* stats) {
    int64_t chunk_count = 0, elements = 0;
    for (int64_t t = 0; t < count; ++t) {
        if (!supported(tensors[t])) return kUnsupportedDType;
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
    parallel_chunks(chunk_count, threads, run_chunk, &pass);
    for (int k = 0; k < kFinite; ++k) stats[k] = 0;
    stats[kFinite] = 1;
    for (c = 0; c < chunk_count; ++c) {
        for (int k = 0; k < kFinite; ++k) stats[k] += chunks[c].stats[k];
        if (chunks[c].stats[kFinite] == 0) stats[kFinite] = 0;
    }
    if (options.skip_nonfinite && stats[kFinite] == 1) {
        pass.update = true;
        parallel_chunks(chunk_count, threads, run_chunk, &pass);
    }
    std::free(chunks);
    return kOk;
}

}  // namespace
}  // namespace SVAG_SIMD
}  // namespace svag

extern "C" int SVAG_ENTRY(svag_step)(const svag::StepTensor* tensors, int64_t count,
                                     const svag::StepOptions& options, double* stats) {
    return svag::SVAG_SIMD::step(tensors, count, options, stats);
}
