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

// Each tensor is cut into `segments` of equal length (their number divides its size), as of so many replicas: `options`
// and `stats` have one for each, one behind the other. threads and skip_nonfinite are the first options'; with the latter
// the segments that aren't finite are untouched, the others step.
// stats: kStatCount float64 values a segment, written; returns a svag::Status.
SVAG_DECLARE_KERNEL(svag_step, (const svag::StepTensor* tensors, int64_t count, const svag::StepOptions* options,
                                int64_t segments, double* stats))
