#include "cpu/adaptive_step.h"

#include "cpu/chunked_step.h"

namespace svag {
namespace SVAG_SIMD {
namespace {

using AdaptivePass = Pass<AdaptiveTensor, AdaptiveOptions>;

// a * b + c, rounded once where the level has such an instruction, as torch's kernels then do, else twice.
#if SVAG_LEVEL == SVAG_LEVEL_avx512
SVAG_INLINE VFloat multiply_add(VFloat a, VFloat b, VFloat c) { return (VFloat)_mm512_fmadd_ps(a, b, c); }
SVAG_INLINE VDouble multiply_add(VDouble a, VDouble b, VDouble c) { return (VDouble)_mm512_fmadd_pd(a, b, c); }
#elif SVAG_LEVEL == SVAG_LEVEL_avx2
SVAG_INLINE VFloat multiply_add(VFloat a, VFloat b, VFloat c) { return (VFloat)_mm256_fmadd_ps(a, b, c); }
SVAG_INLINE VDouble multiply_add(VDouble a, VDouble b, VDouble c) { return (VDouble)_mm256_fmadd_pd(a, b, c); }
#else
template <class A>
SVAG_INLINE A multiply_add_one(A a, A b, A c) {
#if defined(__ARM_FEATURE_FMA)
    return sizeof(A) == sizeof(float) ? A(__builtin_fmaf(a, b, c)) : A(__builtin_fma(a, b, c));
#else
    return a * b + c;
#endif
}
template <class V>
SVAG_INLINE V multiply_add(V a, V b, V c) {
    for (unsigned i = 0; i < sizeof c / sizeof c[0]; ++i) c[i] = multiply_add_one(a[i], b[i], c[i]);
    return c;
}
#endif

// One element's step, in the order of operations of torch's single-tensor Adam and RMSprop, and rounded where they
// round (with the fused multiply-add where the level has one, as torch's own kernels do).
template <class A, bool kGrad2, bool kFirstMoment>
class AdaptiveBlock {
    using V = typename Simd<A>::V;
    static constexpr int width = Simd<A>::width;

  public:
    AdaptiveBlock(const AdaptiveOptions& o, const AdaptiveTensor& t, bool update)
        : c1_(A(o.c1)), c2_(A(o.c2)), weight_decay_(A(o.weight_decay)), weight1_(A(o.one_minus_beta1)),
          beta2_(A(o.beta2)), weight2_(A(o.one_minus_beta2)), eps_(A(o.eps)), step_(A(-t.step_size)),
          correction_(A(t.bias_correction2_sqrt)), combine_(o.c2 != 0), update_(update) {}

    SVAG_INLINE void run(A* x, const A* g1, const A* g2, A* m, A* v, int64_t n, double* stats) const {
        Moments<V> moments{};
        int64_t i = 0;
        for (; i + width <= n; i += width)
            element(moments, x + i, g1 + i, kGrad2 ? g2 + i : nullptr, kFirstMoment ? m + i : nullptr, v + i);
        if (i < n) {
            const auto left = static_cast<size_t>(n - i) * sizeof(A);
            A tail_x[width] = {}, tail_1[width] = {}, tail_2[width] = {}, tail_m[width] = {}, tail_v[width] = {};
            std::memcpy(tail_x, x + i, left);
            std::memcpy(tail_1, g1 + i, left);
            if (kGrad2) std::memcpy(tail_2, g2 + i, left);
            if (kFirstMoment) std::memcpy(tail_m, m + i, left);
            std::memcpy(tail_v, v + i, left);
            element(moments, tail_x, tail_1, tail_2, tail_m, tail_v);
            if (update_) {
                std::memcpy(x + i, tail_x, left);
                if (kFirstMoment) std::memcpy(m + i, tail_m, left);
                std::memcpy(v + i, tail_v, left);
            }
        }
        add_block<A>(moments, g1, kGrad2 ? g2 : nullptr, n, stats);
    }

  private:
    SVAG_INLINE void element(Moments<V>& moments, A* x, const A* g1, const A* g2, A* m, A* v) const {
        const V vx = load_raw<V>(x);
        V g = load_raw<V>(g1);
        if constexpr (kGrad2) {
            const V second = load_raw<V>(g2);
            moments.add(vx, g, second);
            g = combine_ ? c1_ * g + c2_ * second : c1_ * g;
        } else {
            moments.add(vx, g);
            g = c1_ * g;
        }
        if (!update_) return;
        if (weight_decay_ != 0) g = multiply_add(V{} + weight_decay_, vx, g);
        V direction = g;
        if constexpr (kFirstMoment) {
            // torch's lerp starts from the nearer end.
            const V old = load_raw<V>(m), difference = g - old;
            direction = weight1_ < A(0.5) ? multiply_add(V{} + weight1_, difference, old)
                                          : multiply_add(V{} + (weight1_ - A(1)), difference, g);
            std::memcpy(m, &direction, sizeof direction);
        }
        const V kept = beta2_ * load_raw<V>(v), square = multiply_add(weight2_ * g, g, kept);
        std::memcpy(v, &square, sizeof square);
        const V moved = vx + (step_ * direction) / (square_root(square) / correction_ + eps_);
        std::memcpy(x, &moved, sizeof moved);
    }

    A c1_, c2_, weight_decay_, weight1_, beta2_, weight2_, eps_, step_, correction_;
    bool combine_, update_;
};

template <class A, bool kGrad2, bool kFirstMoment>
void run_chunk(const AdaptivePass& pass, AdaptivePass::Chunk& chunk) {
    const AdaptiveTensor& t = *chunk.tensor;
    const AdaptiveBlock<A, kGrad2, kFirstMoment> block(*pass.options, t, pass.update);
    for (int64_t i = chunk.begin; i < chunk.end; i += kBlock)
        block.run(static_cast<A*>(t.param) + i, static_cast<const A*>(t.grad1) + i,
                  kGrad2 ? static_cast<const A*>(t.grad2) + i : nullptr,
                  kFirstMoment ? static_cast<A*>(t.exp_avg) + i : nullptr, static_cast<A*>(t.exp_avg_sq) + i,
                  chunk.end - i < kBlock ? chunk.end - i : kBlock, chunk.stats);
}

template <class A>
void run_chunk(const AdaptivePass& pass, AdaptivePass::Chunk& chunk) {
    const bool first_moment = chunk.tensor->exp_avg != nullptr;
    if (chunk.tensor->grad2 != nullptr)
        return first_moment ? run_chunk<A, true, true>(pass, chunk) : run_chunk<A, true, false>(pass, chunk);
    return first_moment ? run_chunk<A, false, true>(pass, chunk) : run_chunk<A, false, false>(pass, chunk);
}

void run_any_chunk(const AdaptivePass& pass, AdaptivePass::Chunk& chunk) {
    return chunk.tensor->param_dtype == DType::float32 ? run_chunk<float>(pass, chunk)
                                                       : run_chunk<double>(pass, chunk);
}

}  // namespace
}  // namespace SVAG_SIMD
}  // namespace svag

extern "C" int SVAG_ENTRY(svag_adaptive_step)(const svag::AdaptiveTensor* tensors, int64_t count,
                                              const svag::AdaptiveOptions& options, double* stats) {
    using namespace svag;
    for (int64_t t = 0; t < count; ++t)
        if (tensors[t].param_dtype != tensors[t].grad_dtype ||
            (tensors[t].param_dtype != DType::float32 && tensors[t].param_dtype != DType::float64))
            return kUnsupportedDType;
    return SVAG_SIMD::AdaptivePass::run<SVAG_SIMD::run_any_chunk>(tensors, count, &options, 1, stats);
}
