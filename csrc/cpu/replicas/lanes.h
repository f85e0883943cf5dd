// What every kind of layer is written in: masks over a vector's lanes, walks over pixels, where gradients go.
// Included by cpu/kernels/replicas.cpp alone, which is compiled once a SIMD level.
#pragma once

#include "cpu/replicas/net.h"
#include "cpu/replicas/product.h"

namespace svag {
namespace SVAG_SIMD {
namespace {

typedef int32_t VIntLanes __attribute__((vector_size(kVectorBytes)));

// The lanes' sum, by halves.
SVAG_INLINE float fold(VFloat v) {
#if SVAG_LEVEL == SVAG_LEVEL_avx512
    const __m256 half = _mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, (__m512)v, 0),
                                      _mm512_maskz_extractf32x8_ps(0xff, (__m512)v, 1));
    const Quad q = (Quad)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif SVAG_LEVEL == SVAG_LEVEL_avx2
    const Quad q = (Quad)_mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
#else
    const Quad q = v;
#endif
    return (q[0] + q[2]) + (q[1] + q[3]);
}

SVAG_INLINE VFloat choose(VIntLanes mask, VFloat a, VFloat b) { return (VFloat)select((VBits)mask, (VBits)a, (VBits)b); }

// All ones for the lanes of real channels.
SVAG_INLINE VIntLanes channel_mask(int64_t first, int64_t channels) {
    VIntLanes lane{};
    for (int i = 0; i < W; ++i) lane[i] = i;
    return (VIntLanes)(lane < static_cast<int32_t>(channels - first < W ? channels - first : W));
}

// Not max: nan stays nan.
SVAG_INLINE VFloat rectified(VFloat v) { return choose((VIntLanes)(v < 0.0f), VFloat{}, v); }

// Where the gradient of a weight goes: into the gradient, or as a step into the weight.
struct Target {
    float* base;  // the packed weights or gradients
    Epilogue epilogue;
};

// Call body(pixel, y, x) for every pixel.
template <class Body>
SVAG_INLINE void each_pixel(const Layout& layout, const Body& body) {
    int64_t pixel = 0;
    for (int64_t y = 0; y < layout.height; ++y)
        for (int64_t x = 0; x < layout.width; ++x) body(pixel++, y, x);
}

}  // namespace
}  // namespace SVAG_SIMD
}  // namespace svag
