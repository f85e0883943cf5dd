// SIMD vectors in GCC/Clang's portable extension: the same source serves SSE2, AVX2, AVX-512 and NEON.
// Included by files under cpu/kernels/ alone, each compiled once a level.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "svag_math.h"
#include "tensor_list.h"

#define SVAG_LEVEL_portable 0
#define SVAG_LEVEL_avx2 1
#define SVAG_LEVEL_avx512 2
#define SVAG_LEVEL_CAT2(x) SVAG_LEVEL_##x
#define SVAG_LEVEL_CAT(x) SVAG_LEVEL_CAT2(x)
#define SVAG_LEVEL SVAG_LEVEL_CAT(SVAG_SIMD)

namespace svag {
namespace SVAG_SIMD {

#if SVAG_LEVEL == SVAG_LEVEL_avx512
constexpr int kVectorBytes = 64;
#elif SVAG_LEVEL == SVAG_LEVEL_avx2
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

template <class S>
struct Simd;
template <>
struct Simd<float> {
    static constexpr int width = kVectorBytes / 4;
    typedef float V __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Simd<double> {
    static constexpr int width = kVectorBytes / 8;
    typedef double V __attribute__((vector_size(kVectorBytes)));
};

using VFloat = Simd<float>::V;
using VDouble = Simd<double>::V;
typedef uint32_t VBits __attribute__((vector_size(kVectorBytes)));
typedef uint64_t VWord __attribute__((vector_size(kVectorBytes)));
typedef uint16_t VHalfBits __attribute__((vector_size(kVectorBytes / 2)));
typedef float VHalfFloat __attribute__((vector_size(kVectorBytes / 2)));

template <class V, class P>
SVAG_INLINE V load_raw(const P* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

SVAG_INLINE VBits select(VBits mask, VBits a, VBits b) { return (mask & a) | (~mask & b); }

SVAG_INLINE VFloat widen(VHalfBits h, bfloat16) {
    return (VFloat)(__builtin_convertvector(h, VBits) << 16);
}

SVAG_INLINE VHalfBits narrow(VFloat v, bfloat16) {
    const VBits u = (VBits)v;
    const VBits rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;  // to nearest, ties to even
    const VBits is_nan = (VBits)((u & 0x7fffffffu) > 0x7f800000u);
    return __builtin_convertvector(select(is_nan, (u >> 16) | 0x40u, rounded), VHalfBits);
}

SVAG_INLINE VFloat widen(VHalfBits h, float16) {
#if SVAG_LEVEL == SVAG_LEVEL_avx512
    return (VFloat)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h);
#elif SVAG_LEVEL == SVAG_LEVEL_avx2
    return (VFloat)_mm256_cvtph_ps((__m128i)h);
#else
    // The exponent is rebiased by a multiplication, which also turns subnormals into normal numbers.
    const VBits u = __builtin_convertvector(h, VBits);
    const VBits magnitude = (u & 0x7fffu) << 13;
    const VFloat scaled = (VFloat)magnitude * 0x1p112f;
    const VBits is_special = (VBits)((u & 0x7c00u) == 0x7c00u);
    return (VFloat)(select(is_special, magnitude | 0x7f800000u, (VBits)scaled) | ((u & 0x8000u) << 16));
#endif
}

SVAG_INLINE VHalfBits narrow(VFloat v, float16) {
#if SVAG_LEVEL == SVAG_LEVEL_avx512
    return (VHalfBits)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif SVAG_LEVEL == SVAG_LEVEL_avx2
    return (VHalfBits)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
    const VBits u = (VBits)v;
    const VBits sign = (u >> 16) & 0x8000u;
    const VBits magnitude = u & 0x7fffffffu;
    // Normal: rebias and round the 13 lost bits, ties to even; a carry runs into the exponent, up to inf.
    const VBits normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Subnormal: adding 0.5 lines the float's last bit up with float16's, and the hardware rounds.
    const VBits subnormal = (VBits)((VFloat)magnitude + 0.5f) - 0x3f000000u;
    const VBits is_small = (VBits)(magnitude < 0x38800000u);
    const VBits is_big = (VBits)(magnitude >= 0x477ff000u);
    const VBits is_nan = (VBits)(magnitude > 0x7f800000u);
    VBits out = select(is_small, subnormal, normal);
    out = select(is_big, VBits{} + 0x7c00u, out);
    out = select(is_nan, VBits{} + 0x7e00u, out);
    return __builtin_convertvector(out | sign, VHalfBits);
#endif
}

// Io<P, A>: Simd<A>::width elements of the storage type P as a vector of the arithmetic type A, and back.
template <class P, class A>
struct Io;

template <class A>
struct Io<A, A> {
    using V = typename Simd<A>::V;
    static SVAG_INLINE V load(const A* p) { return load_raw<V>(p); }
    static SVAG_INLINE void store(A* p, V v) { std::memcpy(p, &v, sizeof v); }
    static SVAG_INLINE V rounded(V v) { return v; }
};

template <>
struct Io<float, double> {
    static SVAG_INLINE VDouble load(const float* p) {
        return __builtin_convertvector(load_raw<VHalfFloat>(p), VDouble);
    }
};

template <class Half>
struct Io16 {
    static SVAG_INLINE VFloat load(const Half* p) { return widen(load_raw<VHalfBits>(p), Half{}); }
    static SVAG_INLINE void store(Half* p, VFloat v) {
        const VHalfBits h = narrow(v, Half{});
        std::memcpy(p, &h, sizeof h);
    }
    // v as a later load would give it.
    static SVAG_INLINE VFloat rounded(VFloat v) { return widen(narrow(v, Half{}), Half{}); }
};
template <>
struct Io<bfloat16, float> : Io16<bfloat16> {};
template <>
struct Io<float16, float> : Io16<float16> {};

// Correctly rounded, unlike the vector libraries' own.
#if SVAG_LEVEL == SVAG_LEVEL_avx512
SVAG_INLINE VFloat square_root(VFloat v) { return (VFloat)_mm512_maskz_sqrt_ps(0xffff, v); }
SVAG_INLINE VDouble square_root(VDouble v) { return (VDouble)_mm512_maskz_sqrt_pd(0xff, v); }
#elif SVAG_LEVEL == SVAG_LEVEL_avx2
SVAG_INLINE VFloat square_root(VFloat v) { return (VFloat)_mm256_sqrt_ps(v); }
SVAG_INLINE VDouble square_root(VDouble v) { return (VDouble)_mm256_sqrt_pd(v); }
#else
SVAG_INLINE VFloat square_root(VFloat v) {
    for (unsigned i = 0; i < sizeof v / sizeof v[0]; ++i) v[i] = __builtin_sqrtf(v[i]);
    return v;
}
SVAG_INLINE VDouble square_root(VDouble v) {
    for (unsigned i = 0; i < sizeof v / sizeof v[0]; ++i) v[i] = __builtin_sqrt(v[i]);
    return v;
}
#endif

// The sum of a vector's lanes in float64, in lane order.
template <class V>
SVAG_INLINE double lane_sum(V v) {
    double sum = 0;
    for (unsigned i = 0; i < sizeof v / sizeof v[0]; ++i) sum += static_cast<double>(v[i]);
    return sum;
}

}  // namespace SVAG_SIMD
}  // namespace svag
