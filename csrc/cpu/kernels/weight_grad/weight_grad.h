// The weight gradient of a convolution (or Linear, as one) with every sample's squared norm, on the CPU.
#pragma once

#include <cstdint>

#include "cpu/kernels/weight_grad/layer_operands.h"
#include "cpu/simd_level.h"

namespace svag {

enum class LoopOrder : int { samples_outside = 1, tiles_outside = 2 };

// One SVAG step of the weight on the first two segments' gradients.
struct WeightStep {
    double rate;  // lr / l
    double c1, c2, weight_decay;
    double* weight_sq_norm;  // one value, written: before the step
};

struct WeightGradArgs : LayerOperands {
    const double* weights;        // [batch]; null: ones
    const int64_t* order;         // [batch]: samples, segment by segment; null: as they come
    const int64_t* segment_ends;  // [segments]: where each ends in `order`
    int64_t segments;             // at least 1

    // Written; or, where `step` is given, the weight itself: a finished tile takes its step, and dW is never stored.
    void* grad;
    int64_t grad_strides[4];
    int64_t segment_stride;  // elements from one segment's own gradient in `grad` to the next's; 0: their sum alone
    const WeightStep* step;
    double* sq_norms;      // [batch], written; null with tiles outside: no norms, and sums run over several samples
    double* segment_gram;  // [segments, segments], written; may be null without a step
    LoopOrder loop_order;
    int threads;
};

}  // namespace svag

// Returns a svag::Status. batch, channels, outputs and both images must not be empty.
SVAG_DECLARE_KERNEL(svag_weight_grad, (const svag::WeightGradArgs& args))
