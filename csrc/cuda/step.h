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
    // where not null: a captured graph follows them. A row of these for each replica.
    const double* device_coefficients;
    bool skip_nonfinite;  // leave every param of a replica untouched when any of its gradients' entries is inf or nan
    // A GradScaler's, one float each on the device, or null; only with skip_nonfinite. The gradients are divided by the
    // scale, in memory too the last of them, which the user sees. Where found_inf isn't 0 nothing is updated.
    const float* scale;
    const float* found_inf;
    // Each tensor has so many replicas' elements, one replica after the other, and its size is one replica's. Where there
    // are several, device_coefficients must be given, and scale null. Each has the bits of its step alone in tensors whose
    // addresses are multiples of 16.
    int64_t replicas;
    int device;
    void* stream;
    double* workspace;  // svag_step_cuda_workspace() values a replica on the device
    double* stats;      // kStatCount values a replica on the device
};

}  // namespace svag

// How many float64 values the partial sums of a list of these sizes take.
extern "C" int64_t svag_step_cuda_workspace(const int64_t* sizes, int64_t count);

// Returns a svag::Status, or minus a cudaError_t. Launches on the stream and does not wait.
extern "C" int svag_step_cuda(const svag::StepTensor* tensors, int64_t count, const svag::CudaStepOptions& options);
