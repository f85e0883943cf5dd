// Every sample's squared norm of a layer's weight gradient from products of rows, without the gradient, on the CPU.
#pragma once

#include "cpu/kernels/weight_grad/layer_operands.h"
#include "cpu/simd_level.h"

namespace svag {

struct WeightGramArgs : LayerOperands {
    double* sq_norms;  // [batch], written
    int threads;
};

}  // namespace svag

// Returns a svag::Status. batch, channels, outputs and both images must not be empty.
SVAG_DECLARE_KERNEL(svag_weight_gram, (const svag::WeightGramArgs& args))
