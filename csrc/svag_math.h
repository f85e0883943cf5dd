// The arithmetic of one element, shared by the CPU and the CUDA kernels; T is a scalar or a SIMD vector of S.
#pragma once

#if defined(__CUDACC__)
#define SVAG_INLINE __host__ __device__ __forceinline__
#else
#define SVAG_INLINE inline __attribute__((always_inline))
#endif

namespace svag {

// x -= rate * u, u = c1 g1 + c2 g2 + weight_decay x; with momentum v = mu v + u, x -= rate * v.
template <class S>
struct StepCoefficients {
    S rate, c1, c2, weight_decay;
};

// The step's direction u without the second gradient (l = 1: c2 = 0, and an inf in g2 must not reach x).
template <class T, class S>
SVAG_INLINE T direction(const T& x, const T& g1, const StepCoefficients<S>& c) {
    return c.c1 * g1 + c.weight_decay * x;
}

template <class T, class S>
SVAG_INLINE T direction(const T& x, const T& g1, const T& g2, const StepCoefficients<S>& c) {
    return c.c1 * g1 + c.c2 * g2 + c.weight_decay * x;
}

template <class T, class S>
SVAG_INLINE T decrement(const T& x, const T& g1, const StepCoefficients<S>& c) {
    return c.rate * direction(x, g1, c);
}

template <class T, class S>
SVAG_INLINE T decrement(const T& x, const T& g1, const T& g2, const StepCoefficients<S>& c) {
    return c.rate * direction(x, g1, g2, c);
}

// A list's momentum: for params of float64, and for all others.
struct MomentumFactors {
    double float64, float32;
};

// mu = kept + rest. Near 1 what rounding to float32 takes off mu is a part of 1 - mu that counts.
template <class S>
struct Momentum {
    S kept, rest;

    static SVAG_INLINE Momentum of(const MomentumFactors& factors) {
        const double mu = sizeof(S) == sizeof(double) ? factors.float64 : factors.float32;
        const S kept = static_cast<S>(mu);
        return {kept, static_cast<S>(mu - static_cast<double>(kept))};
    }

    // The new v.
    template <class T>
    SVAG_INLINE T after(const T& v, const T& u) const {
        return kept * v + (u + rest * v);
    }
};

// Knuth's two-sum: sum + error == a + b exactly, whichever is larger.
template <class T>
SVAG_INLINE void two_sum(const T& a, const T& b, T& sum, T& error) {
    sum = a + b;
    const T b_part = sum - a;
    error = (a - (sum - b_part)) + (b - b_part);
}

// What one element adds to the four statistics; `poison` becomes nan where a gradient is inf or nan.
template <class T>
struct Moments {
    T sq_norm1, sq_norm2, inner, weight_sq_norm, poison;

    SVAG_INLINE void add(const T& x, const T& g1) {
        sq_norm1 += g1 * g1;
        weight_sq_norm += x * x;
        poison += g1 * 0;
    }
    SVAG_INLINE void add(const T& x, const T& g1, const T& g2) {
        add(x, g1);
        sq_norm2 += g2 * g2;
        inner += g1 * g2;
        poison += g2 * 0;
    }
};

}  // namespace svag
