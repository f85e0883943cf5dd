// The fused SVAG step over a list of tensors, on a GPU.
#pragma once

#include <cstdint>

#include "svag_math.h"
#include "tensor_list.h"

namespace svag {

struct CudaStepOptions {
    StepCoefficients<double> coefficients;
    MomentumFactors momentum;
    // lr, its divisor, c1, c2, weight_decay and the momentum's two factors on the device, read instead of the above
    // where not null: a captured graph follows them.
    const double* device_coefficients;
    bool skip_nonfinite;  // leave every param untouched when any gradient entry is inf or nan
    // A GradScaler's, one float each on the device, or null; only with skip_nonfinite. The gradients are divided by the
    // scale, in memory too the last of them, which the user sees. Where found_inf isn't 0 nothing is updated.
    const float* scale;
    const float* found_inf;
    int device;
    void* stream;
    double* workspace;  // svag_step_cuda_workspace() values on the device
    double* stats;      // kStatCount values on the device
};

}  // namespace svag

// How many float64 values the partial sums of a list of these sizes take.
extern "C" int64_t svag_step_cuda_workspace(const int64_t* sizes, int64_t count);

// Returns a svag::Status, or minus a cudaError_t. Launches on the stream and does not wait.
extern "C" int svag_step_cuda(const svag::StepTensor* tensors, int64_t count, const svag::CudaStepOptions& options);
