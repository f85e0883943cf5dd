// The fused SVAG step over a list of tensors, on the CPU.
#pragma once

#include <cstdint>

#include "cpu/simd_level.h"
#include "svag_math.h"
#include "tensor_list.h"

namespace svag {

struct StepOptions {
    double rate;  // lr / l, or lr / l² where momentum keeps its time
    double c1, c2, weight_decay;
    bool skip_nonfinite;  // leave every param untouched when any gradient entry is inf or nan
    int threads;
    MomentumFactors momentum{};  // of tensors that have a momentum buffer
};

}  // namespace svag

// stats: kStatCount float64 values, written; returns a svag::Status.
SVAG_DECLARE_KERNEL(svag_step, (const svag::StepTensor* tensors, int64_t count, const svag::StepOptions& options,
                                double* stats))
