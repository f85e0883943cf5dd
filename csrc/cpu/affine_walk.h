// Ensembles of random walks whose step is affine in the state, as is its noise: all their steps in one pass over them.
#pragma once

#include <cstdint>

#include "cpu/philox_normal.h"
#include "cpu/simd_level.h"

namespace svag {

// A step is x <- keep x + shift + (slope x + spread) e, e = sum_j weights[j] z_j with fresh standard normals z_j.
struct AffineWalk {
    void* x;
    bool is_double;
    int64_t size, steps;
    double keep, shift, slope, spread;
    const double* weights;
    int64_t weight_count;
    NormalStream stream;  // step k takes draws stream.draw + k weight_count + j
    int threads;
};

}  // namespace svag

// Returns a svag::Status.
SVAG_DECLARE_KERNEL(svag_affine_walk, (const svag::AffineWalk& walk))
