// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the Box-Muller
// transform (1958), a vector of counters at a time. Included by files under cpu/kernels/ alone, each compiled once a level.
// The polynomials interpolate at Chebyshev's nodes; relative errors are below 3.6e-8 (float32) and 4e-17 (float64).
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "cpu/philox_normal.h"
#include "cpu/simd.h"

namespace svag {
namespace SVAG_SIMD {
namespace {

typedef int64_t VLong __attribute__((vector_size(kVectorBytes)));
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
    // -2 log(1 + f) = -4 atanh(y), y = f/(2 + f)
    const VFloat y = f / (f + 2.0f), z = y * y;
    VFloat p = VFloat{} - 0.5985474586486816f;
    p = p * z - 0.7994948029518127f;
    p = p * z - 1.3333363533020020f;
    p = p * z - 4.0f;
    const VFloat e = __builtin_convertvector(exponent, VFloat);
    const VFloat radius = square_root(e * -1.3862943611198906f + p * y);
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
    const VInt odd = (VInt)(angle_word << 1) >> 31;
    const VBits first = (VBits)(odd ? sine : cosine), second = (VBits)(odd ? cosine : sine), sign = VBits{} + 0x80000000u;
    *z0 = radius * (VFloat)(first ^ ((angle_word + 0x40000000u) & sign));
    *z1 = radius * (VFloat)(second ^ (angle_word & sign));
}

SVAG_INLINE void box_muller(VWord radius_word, VWord angle_word, VDouble* z0, VDouble* z1) {
    constexpr uint64_t one = 0x3ff0000000000000u;
    // u = 2^e (1 + f) in (0, 1] with 52 bits, 1 + f in [sqrt(1/2), sqrt(2)); e + 1023 is had without a sign.
    const VDouble u = 2.0 - (VDouble)((radius_word >> 12) | one);
    const VWord exponent = ((VWord)u + (one - 0x3fe6a09e667f3bcdu)) >> 52;
    const VDouble f = (VDouble)((VWord)u - ((exponent - 1023u) << 52)) - 1.0;
    const VDouble y = f / (f + 2.0), z = y * y;
    VDouble p = VDouble{} - 0.29626123843228065;
    p = p * z - 0.30624414648778374;
    p = p * z - 0.36367287345296633;
    p = p * z - 0.44444393672014637;
    p = p * z - 0.5714285752541893;
    p = p * z - 0.7999999999858641;
    p = p * z - 1.3333333333333533;
    p = p * z - 4.0;
    const VDouble e = (VDouble)(exponent | 0x4330000000000000u) - (0x1p52 + 1023);
    const VDouble radius = square_root(e * -1.3862943611198906 + p * y);
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
    const VLong odd = (VLong)(VWord{} - ((angle_word >> 62) & 1u));
    const VWord first = (VWord)(odd ? sine : cosine), second = (VWord)(odd ? cosine : sine);
    const VWord sign = VWord{} + 0x8000000000000000u;
    *z0 = radius * (VDouble)(first ^ ((angle_word + 0x4000000000000000u) & sign));
    *z1 = radius * (VDouble)(second ^ (angle_word & sign));
}

// The numbers of a slice of a group: `width` neighbouring counters, `words` vectors of random bits. Number j of counter
// i is element 16 j + i of its group.
template <class A>
struct Slice;

template <>
struct Slice<float> {
    using Bits = VBits;
    static constexpr int words = 4, per_counter = 4;

    static SVAG_INLINE void draw(uint32_t counter, uint64_t draw, const RoundKeys& keys, VBits* bits) {
        // Even counters in one vector of 64-bit lanes, odd ones in another: the words then interleave by a shift.
        VWord even;
        for (unsigned i = 0; i < kVectorBytes / 8; ++i) even[i] = counter + 2 * i;
        const Words x = philox(even, draw, keys), y = philox(even + 1u, draw, keys);
        for (int j = 0; j < words; ++j) bits[j] = (VBits)((x.w[j] & 0xffffffffu) | (y.w[j] << 32));
    }
};

template <>
struct Slice<double> {
    using Bits = VWord;
    static constexpr int words = 2, per_counter = 2;

    static SVAG_INLINE void draw(uint32_t counter, uint64_t draw, const RoundKeys& keys, VWord* bits) {
        VWord index;
        for (unsigned i = 0; i < kVectorBytes / 8; ++i) index[i] = counter + i;
        const Words x = philox(index, draw, keys);
        for (int j = 0; j < words; ++j) bits[j] = (x.w[2 * j] & 0xffffffffu) | (x.w[2 * j + 1] << 32);
    }
};

template <class A>
constexpr int64_t kGroup = Slice<A>::per_counter * kNormalCounters;

// Groups whose numbers are made together: enough independent work to keep a core's pipelines full.
constexpr int64_t kTile = 4;

// Fill `out` with the numbers of `groups` <= kTile groups. Bits first, then numbers: each loop's turns are independent.
template <class A>
void fill_groups(A* out, int64_t groups, uint32_t counter, uint64_t draw, const RoundKeys& keys) {
    constexpr int width = Simd<A>::width, slices = kNormalCounters / width, words = Slice<A>::words;
    typename Slice<A>::Bits bits[kTile * slices][words];
    for (int64_t s = 0; s < groups * slices; ++s)
        Slice<A>::draw(counter + static_cast<uint32_t>(s * width), draw, keys, bits[s]);
    for (int64_t s = 0; s < groups * slices; ++s) {
        A* to = out + s / slices * kGroup<A> + s % slices * width;
        for (int j = 0; j < words; j += 2) {
            typename Simd<A>::V z[2];
            box_muller(bits[s][j], bits[s][j + 1], z, z + 1);
            std::memcpy(to + j * kNormalCounters, &z[0], sizeof z[0]);
            std::memcpy(to + (j + 1) * kNormalCounters, &z[1], sizeof z[1]);
        }
    }
}

}  // namespace
}  // namespace SVAG_SIMD
}  // namespace svag
