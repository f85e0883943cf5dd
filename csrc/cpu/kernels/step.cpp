#include "cpu/step.h"

#include <type_traits>

#include "cpu/chunked_step.h"

namespace svag {
namespace SVAG_SIMD {
namespace {

using StepPass = Pass<StepTensor, StepOptions>;

// With this much arithmetic an element, a core sees too few loads ahead to keep memory busy: with 512 bytes of each
// stream asked for in advance the pass is as fast as a plain triad, without 0.9 times (docs/decisions.md).
template <class T>
SVAG_INLINE void fetch_ahead(T* p) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + 512, !std::is_const_v<T>);
}

// One block of one tensor: statistics, and the update where it is asked for.
template <class P, class G, class A, bool kGrad2, bool kCompensated, bool kMomentum>
class Block {
    using V = typename Simd<A>::V;
    static constexpr int width = Simd<A>::width;

  public:
    Block(const StepOptions& o, bool update)
        : coefficients_{A(o.rate), A(o.c1), A(o.c2), A(o.weight_decay)}, momentum_(Momentum<A>::of(o.momentum)),
          combine_(o.c2 != 0), update_(update) {}

    SVAG_INLINE void run(P* x, const G* g1, const G* g2, float* e, A* v, int64_t n, double* stats) const {
        Moments<V> m{};
        int64_t i = 0;
        for (; i + width <= n; i += width) {
            fetch_ahead(x + i);
            fetch_ahead(g1 + i);
            if (kGrad2) fetch_ahead(g2 + i);
            if (kCompensated) fetch_ahead(e + i);
            if (kMomentum) fetch_ahead(v + i);
            element(m, x + i, g1 + i, kGrad2 ? g2 + i : nullptr, kCompensated ? e + i : nullptr,
                    kMomentum ? v + i : nullptr);
        }
        if (i < n) {
            const auto left = static_cast<size_t>(n - i);
            P tail_x[width] = {};
            G tail_1[width] = {}, tail_2[width] = {};
            float tail_e[width] = {};
            A tail_v[width] = {};
            std::memcpy(tail_x, x + i, left * sizeof(P));
            std::memcpy(tail_1, g1 + i, left * sizeof(G));
            if (kGrad2) std::memcpy(tail_2, g2 + i, left * sizeof(G));
            if (kCompensated) std::memcpy(tail_e, e + i, left * sizeof(float));
            if (kMomentum) std::memcpy(tail_v, v + i, left * sizeof(A));
            element(m, tail_x, tail_1, tail_2, tail_e, tail_v);
            if (update_) std::memcpy(x + i, tail_x, left * sizeof(P));
            if (update_ && kCompensated) std::memcpy(e + i, tail_e, left * sizeof(float));
            if (update_ && kMomentum) std::memcpy(v + i, tail_v, left * sizeof(A));
        }
        add_block<A>(m, g1, kGrad2 ? g2 : nullptr, n, stats);
    }

  private:
    SVAG_INLINE void element(Moments<V>& m, P* x, const G* g1, const G* g2, float* e, A* v) const {
        const V vx = Io<P, A>::load(x);
        const V v1 = Io<G, A>::load(g1);
        if constexpr (kCompensated) {
            // The parameter's value is x + e; e holds what rounding x to its dtype has lost so far.
            const V ve = Io<float, A>::load(e);
            V sum, error;
            two_sum(vx, ve - decrement_at(m, vx, vx + ve, v1, g2, v), sum, error);
            if (update_) {
                Io<P, A>::store(x, sum);
                Io<float, A>::store(e, (sum - Io<P, A>::rounded(sum)) + error);
            }
        } else {
            const V step = decrement_at(m, vx, vx, v1, g2, v);
            if (update_) Io<P, A>::store(x, vx - step);
        }
    }

    // rate * v after v's own update, or rate * u.
    SVAG_INLINE V decrement_at(Moments<V>& m, V x, V value, V g1, const G* g2, A* v) const {
        V u = direction_at(m, x, value, g1, g2);
        if constexpr (kMomentum) {
            u = momentum_.after(Io<A, A>::load(v), u);
            if (update_) Io<A, A>::store(v, u);
        }
        return coefficients_.rate * u;
    }

    SVAG_INLINE V direction_at(Moments<V>& m, V x, V value, V g1, const G* g2) const {
        if constexpr (kGrad2) {
            const V v2 = Io<G, A>::load(g2);
            m.add(x, g1, v2);
            if (combine_) return direction(value, g1, v2, coefficients_);
        } else {
            m.add(x, g1);
        }
        return direction(value, g1, coefficients_);
    }

    StepCoefficients<A> coefficients_;
    Momentum<A> momentum_;
    bool combine_, update_;
};

template <class P, class G, class A, bool kGrad2, bool kCompensated, bool kMomentum>
void run_chunk(const StepPass& pass, StepPass::Chunk& chunk) {
    const Block<P, G, A, kGrad2, kCompensated, kMomentum> block(pass.options[chunk.segment], pass.update);
    const StepTensor& t = *chunk.tensor;
    for (int64_t i = chunk.begin; i < chunk.end; i += kBlock)
        block.run(static_cast<P*>(t.param) + i, static_cast<const G*>(t.grad1) + i,
                  kGrad2 ? static_cast<const G*>(t.grad2) + i : nullptr,
                  kCompensated ? static_cast<float*>(t.compensation) + i : nullptr,
                  kMomentum ? static_cast<A*>(t.momentum) + i : nullptr,
                  chunk.end - i < kBlock ? chunk.end - i : kBlock, chunk.stats);
}

template <class P, class G, class A, bool kGrad2, bool kCompensated>
void run_chunk(const StepPass& pass, StepPass::Chunk& chunk) {
    return chunk.tensor->momentum != nullptr ? run_chunk<P, G, A, kGrad2, kCompensated, true>(pass, chunk)
                                             : run_chunk<P, G, A, kGrad2, kCompensated, false>(pass, chunk);
}

template <class P, class G, class A>
void run_chunk(const StepPass& pass, StepPass::Chunk& chunk) {
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

void run_any_chunk(const StepPass& pass, StepPass::Chunk& chunk) {
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

int step(const StepTensor* tensors, int64_t count, const StepOptions* options, int64_t segments, double* stats) {
    for (int64_t t = 0; t < count; ++t)
        if (!supported(tensors[t])) return kUnsupportedDType;
    return StepPass::run<run_any_chunk>(tensors, count, options, segments, stats);
}

}  // namespace
}  // namespace SVAG_SIMD
}  // namespace svag

extern "C" int SVAG_ENTRY(svag_step)(const svag::StepTensor* tensors, int64_t count,
                                     const svag::StepOptions* options, int64_t segments, double* stats) {
    return svag::SVAG_SIMD::step(tensors, count, options, segments, stats);
}
