// float16 for kernels run on the host.
#pragma once

#include "cuda_runtime.h"

struct __half {
    uint16_t bits;
};

inline float __half2float(__half value) {
    const int exponent = (value.bits >> 10) & 31, fraction = value.bits & 1023;
    const float sign = value.bits & 0x8000 ? -1.0f : 1.0f;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    return sign * std::ldexp(static_cast<float>(exponent ? fraction + 1024 : fraction), (exponent ? exponent : 1) - 25);
}

inline __half __float2half_rn(float value) {
    const auto sign = static_cast<uint16_t>(std::signbit(value) ? 0x8000 : 0);
    const float magnitude = std::fabs(value);
    if (value != value) return {0x7fff};
    if (magnitude == 0) return {sign};
    if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
    int exponent;
    std::frexp(magnitude, &exponent);
    // One unit in the last place is 2^(exponent - 11), and 2^-24 for subnormals; nearbyint rounds ties to even.
    const int unit = exponent - 11 < -24 ? -24 : exponent - 11;
    const auto steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -unit)));
    // Added, not or-ed: the leading one of a normal number, and a carry out of 2047 steps, raise the exponent.
    return {static_cast<uint16_t>(sign | (((unit + 24) << 10) + steps))};
}
