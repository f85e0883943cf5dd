// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the Box-Muller
// transform (1958), a vector of counters at a time. Included by files under cpu/kernels/ alone, each compiled once a level.
// The polynomials interpolate at Chebyshev's nodes; relative errors are below 5.3e-8 (float32) and 4e-17 (float64).
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "cpu/philox_normal.h"
#include "cpu/simd.h"

namespace svag {
namespace SVAG_SIMD {
namespace {

typedef int32_t VInt __attribute__((vector_size(kVectorBytes)));

// The product of the lower halves of each lane, in full.
SVAG_INLINE VWord multiply_halves(VWord a, VWord b) {
#if SVAG_LEVEL == SVAG_LEVEL_avx512
    return (VWord)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
#elif SVAG_LEVEL == SVAG_LEVEL_avx2
    return (VWord)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (VWord)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// The keys of the ten rounds, spread over a vector's lanes.
struct RoundKeys {
    VWord low[10], high[10];

    explicit RoundKeys(const uint32_t key[2]) {
        for (uint32_t r = 0; r < 10; ++r) {
            low[r] = VWord{} + uint64_t{key[0] + r * 0x9E3779B9u};
            high[r] = VWord{} + uint64_t{key[1] + r * 0xBB67AE85u};
        }
    }
};

// The four words of each lane's counter, in the lower half of each 64-bit lane; above it there is rubbish.
struct Words {
    VWord w[4];
};

SVAG_INLINE Words philox(VWord index, uint64_t draw, const RoundKeys& keys) {
    VWord a = index, b = VWord{} + (draw & 0xffffffffu), c = VWord{} + (draw >> 32), d = VWord{};
    const VWord m0 = VWord{} + 0xD2511F53u, m1 = VWord{} + 0xCD9E8D57u;
    for (int r = 0; r < 10; ++r) {
        const VWord p0 = multiply_halves(a, m0), p1 = multiply_halves(c, m1);
        a = (p1 >> 32) ^ b ^ keys.low[r];
        c = (p0 >> 32) ^ d ^ keys.high[r];
        b = p1;
        d = p0;
    }
    return {{a, b, c, d}};
}

// Two independent normal numbers a lane, sqrt(-2 log u) times cos and sin of an angle, from two words.
SVAG_INLINE void box_muller(VBits radius_word, VBits angle_word, VFloat* z0, VFloat* z1) {
    // u = 2^e (1 + f) in (0, 1] with 31 bits, 1 + f in [sqrt(1/2), sqrt(2)).
    const VFloat u = __builtin_convertvector((VInt)(radius_word >> 1), VFloat) * 0x1p-31f + 0x1p-32f;
    const VInt shifted = (VInt)u - 0x3f3504f3;
    const VInt exponent = shifted >> 23;
    const VFloat f = (VFloat)((VInt)u - (exponent << 23)) - 1.0f;
    VFloat p = VFloat{} + 0.08533313125371933f;
    p = p * f - 0.14269258081912994f;
    p = p * f + 0.14977401494979858f;
    p = p * f - 0.1657799333333969f;
    p = p * f + 0.19955933094024658f;
    p = p * f - 0.250013530254364f;
    p = p * f + 0.33334192633628845f;
    p = p * f - 0.4999999701976776f;
    p = p * f + 1.0f;
    const VFloat log_u = __builtin_convertvector(exponent, VFloat) * 0.6931471805599453f + p * f;
    const VFloat radius = square_root(log_u * -2.0f);
    // The angle is (q + t) pi/2, q the word's two upper bits and t in [-1/2, 1/2] the others.
    const VFloat t = __builtin_convertvector((VInt)(angle_word << 2), VFloat) * 0x1p-32f;
    const VFloat s = t * t;
    VFloat sine = VFloat{} - 0.004602149128913879f;
    sine = sine * s + 0.07968021929264069f;
    sine = sine * s - 0.6459634900093079f;
    sine = (sine * s + 1.5707963705062866f) * t;
    VFloat cosine = VFloat{} + 0.0009036280680447817f;
    cosine = cosine * s - 0.02086007036268711f;
    cosine = cosine * s + 0.25366920232772827f;
    cosine = cosine * s - 1.2337005138397217f;
    cosine = cosine * s + 1.0f;
    const VBits odd = (VBits)((VInt)(angle_word << 1) >> 31), sign = VBits{} + 0x80000000u;
    const VBits first = select(odd, (VBits)sine, (VBits)cosine), second = select(odd, (VBits)cosine, (VBits)sine);
    *z0 = radius * (VFloat)(first ^ ((angle_word + 0x40000000u) & sign));
    *z1 = radius * (VFloat)(second ^ (angle_word & sign));
}

SVAG_INLINE void box_muller(VWord radius_word, VWord angle_word, VDouble* z0, VDouble* z1) {
    constexpr uint64_t one = 0x3ff0000000000000u;
    // u = 2^e (1 + f) in (0, 1] with 52 bits, 1 + f in [sqrt(1/2), sqrt(2)); e + 1023 is had without a sign.
    const VDouble u = 2.0 - (VDouble)((radius_word >> 12) | one);
    const VWord exponent = ((VWord)u + (one - 0x3fe6a09e667f3bcdu)) >> 52;
    const VDouble f = (VDouble)((VWord)u - ((exponent - 1023u) << 52)) - 1.0;
    // log(1 + f) = 2 atanh(f/(2 + f))
    const VDouble y = f / (f + 2.0), z = y * y;
    VDouble p = VDouble{} + 0.07406530960807016;
    p = p * z + 0.07656103662194594;
    p = p * z + 0.09091821836324158;
    p = p * z + 0.11111098418003659;
    p = p * z + 0.14285714381354733;
    p = p * z + 0.19999999999646603;
    p = p * z + 0.3333333333333383;
    p = p * z + 1.0;
    const VDouble e = (VDouble)(exponent | 0x4330000000000000u) - (0x1p52 + 1023);
    const VDouble log_u = e * 0.6931471805599453 + p * y * 2.0;
    const VDouble radius = square_root(log_u * -2.0);
    const VDouble t = (VDouble)(((angle_word << 2) >> 12) | one) - 1.5;
    const VDouble s = t * t;
    VDouble sine = VDouble{} + 5.633933781537854e-08;
    sine = sine * s - 3.59864335298231e-06;
    sine = sine * s + 0.0001604411507421909;
    sine = sine * s - 0.004681754132340976;
    sine = sine * s + 0.07969262624604301;
    sine = sine * s - 0.6459640975062443;
    sine = (sine * s + 1.5707963267948966) * t;
    VDouble cosine = VDouble{} - 6.321256869628588e-09;
    cosine = cosine * s + 4.710609726757823e-07;
    cosine = cosine * s - 2.520203677046026e-05;
    cosine = cosine * s + 0.0009192602741831558;
    cosine = cosine * s - 0.02086348076331121;
    cosine = cosine * s + 0.2536695079010467;
    cosine = cosine * s - 1.2337005501361697;
    cosine = cosine * s + 1.0;
    const VWord odd = VWord{} - ((angle_word >> 62) & 1u), sign = VWord{} + 0x8000000000000000u;
    const VWord first = select(odd, (VWord)sine, (VWord)cosine), second = select(odd, (VWord)cosine, (VWord)sine);
    *z0 = radius * (VDouble)(first ^ ((angle_word + 0x4000000000000000u) & sign));
    *z1 = radius * (VDouble)(second ^ (angle_word & sign));
}

// The normals of a slice of a group: `width` neighbouring counters. Number j of counter i is element 16 j + i of its
// group, so `per_counter` vectors whose lanes are neighbouring elements.
template <class A>
struct Normals;

template <>
struct Normals<float> {
    static constexpr int per_counter = 4;
    static constexpr int64_t group = per_counter * kNormalCounters;

    static SVAG_INLINE void draw(uint32_t counter, uint64_t draw, const RoundKeys& keys, VFloat* z) {
        // Even counters in one vector of 64-bit lanes, odd ones in another: the words then interleave by a shift.
        VWord even;
        for (unsigned i = 0; i < kVectorBytes / 8; ++i) even[i] = counter + 2 * i;
        const Words x = philox(even, draw, keys), y = philox(even + 1u, draw, keys);
        VBits words[4];
        for (int j = 0; j < 4; ++j) words[j] = (VBits)((x.w[j] & 0xffffffffu) | (y.w[j] << 32));
        box_muller(words[0], words[1], z, z + 1);
        box_muller(words[2], words[3], z + 2, z + 3);
    }
};

template <>
struct Normals<double> {
    static constexpr int per_counter = 2;
    static constexpr int64_t group = per_counter * kNormalCounters;

    static SVAG_INLINE void draw(uint32_t counter, uint64_t draw, const RoundKeys& keys, VDouble* z) {
        VWord index;
        for (unsigned i = 0; i < kVectorBytes / 8; ++i) index[i] = counter + i;
        const Words x = philox(index, draw, keys);
        box_muller((x.w[0] & 0xffffffffu) | (x.w[1] << 32), (x.w[2] & 0xffffffffu) | (x.w[3] << 32), z, z + 1);
    }
};

}  // namespace
}  // namespace SVAG_SIMD
}  // namespace svag
