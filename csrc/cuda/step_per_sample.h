// The fused SVAG step from per-sample gradients, on a GPU.
#pragma once

#include <cstdint>

#include "svag_math.h"
#include "tensor_list.h"

namespace svag {

struct CudaPerSampleOptions {
    StepCoefficients<double> coefficients;
    int64_t samples1, samples2;
    int device;
    void* stream;
    double* workspace;  // svag_step_per_sample_cuda_workspace() values on the device
    double* sq_norms;   // samples1 + samples2 values on the device
    double* stats;      // kStatCount values on the device
};

}  // namespace svag

// How many float64 values the partial sums of a list of these sizes take.
extern "C" int64_t svag_step_per_sample_cuda_workspace(const int64_t* sizes, const int* dtypes, int64_t count,
                                                       int64_t samples);

// A tensor's grad1 is [samples1, size], its grad2 [samples2, size] or null, both of the param's dtype; compensation is
// not served. Returns a svag::Status, or minus a cudaError_t. Launches on the stream and does not wait.
extern "C" int svag_step_per_sample_cuda(const svag::StepTensor* tensors, int64_t count,
                                         const svag::CudaPerSampleOptions& options);
