// The fused SVAG step of Adam and RMSprop over a list of tensors, on the CPU.
#pragma once

#include <cstdint>

#include "cpu/simd_level.h"
#include "tensor_list.h"

namespace svag {

// A tensor with its moments, of the param's dtype (float32 or float64), as its gradients must be.
struct AdaptiveTensor : StepTensor {
    void* exp_avg;  // null: RMSprop, whose step is along the gradient itself
    void* exp_avg_sq;
    double step_size;               // lr over Adam's first bias correction
    double bias_correction2_sqrt;   // 1 for RMSprop
};

struct AdaptiveOptions {
    double c1, c2, weight_decay;
    double one_minus_beta1, beta2, one_minus_beta2, eps;
    bool skip_nonfinite;  // leave everything untouched when any gradient entry is inf or nan
    int threads;
};

}  // namespace svag

// stats: kStatCount float64 values, written; returns a svag::Status.
SVAG_DECLARE_KERNEL(svag_adaptive_step, (const svag::AdaptiveTensor* tensors, int64_t count,
                                         const svag::AdaptiveOptions& options, double* stats))
