// The fused SVAG step from per-sample gradients, on the CPU.
#pragma once

#include <cstdint>

#include "cpu/simd_level.h"
#include "cpu/step.h"

namespace svag {

struct PerSampleTensor {
    void* param;
    const void* grads1;  // [samples1, size]
    const void* grads2;  // [samples2, size], or null
    int64_t size;
    bool is_double;  // param and gradients: float64, else float32
};

}  // namespace svag

// sq_norms: samples1 + samples2 values, written; stats: kStatCount values, written. options.skip_nonfinite is not
// served. Returns a svag::Status.
SVAG_DECLARE_KERNEL(svag_step_per_sample,
                    (const svag::PerSampleTensor* tensors, int64_t count, int64_t samples1, int64_t samples2,
                     const svag::StepOptions& options, double* sq_norms, double* stats))
