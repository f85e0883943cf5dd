// Normalisation, an addition and ReLU in one walk over the activations, and the backward pass of all three.
//
//     v = (x - mean) / sqrt(var + eps) * weight + bias + residual,    y = max(v, 0)  (or v)
//
// Each unit of values is normalised by itself: a group of a sample's channels (GroupNorm), or a channel of a segment of
// the samples (BatchNorm in training mode).
#pragma once

#include <cstdint>

#include "cpu/simd_level.h"

namespace svag {

struct NormShape {
    int64_t samples, channels, pixels;  // none is 0
    int64_t groups;                     // divides channels; 0: units are channels of segments
    int64_t segments;                   // divides samples; equal parts of them, one after the other
    bool channels_last;                 // memory is [samples, pixels, channels], else [samples, channels, pixels]
    bool is_double;                     // float64, else float32
    bool relu;
    double eps;
    int threads;
};

// Arrays of the shape's dtype, except where it says double. Null: no weight (1), no bias (0), no residual (0).
struct NormForward {
    const void *x, *weight, *bias, *residual;
    void* y;
    double *mean, *var;  // [samples, groups] or [segments, channels], written; var is the mean square about the mean
};

struct NormBackward {
    const void *x, *weight, *bias;
    const double *mean, *var;     // as forward wrote them
    const void *y, *y_grad;       // y: where there was a residual, otherwise null
    void *x_grad, *residual_grad;  // residual_grad: null unless there was a residual
    double *weight_grad, *bias_grad;  // [channels], written; null: not wanted
};

}  // namespace svag

// Both return a svag::Status. A unit with var + eps = 0 gives bias + residual, and its x a gradient of 0.
SVAG_DECLARE_KERNEL(svag_norm_relu, (const svag::NormShape& shape, const svag::NormForward& arrays))
SVAG_DECLARE_KERNEL(svag_norm_relu_grad, (const svag::NormShape& shape, const svag::NormBackward& arrays))
