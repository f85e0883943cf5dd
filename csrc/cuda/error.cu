#include "cuda/error.h"

#include <cuda_runtime.h>

extern "C" const char* svag_cuda_error_name(int status) { return cudaGetErrorName(static_cast<cudaError_t>(-status)); }

extern "C" const char* svag_cuda_error_text(int status) { return cudaGetErrorString(static_cast<cudaError_t>(-status)); }
