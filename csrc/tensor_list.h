// Plain descriptors of a list of tensors: addresses, lengths and dtypes. The caller owns the memory.
#pragma once

#include <cstdint>

namespace svag {

enum class DType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

// One tensor of each list of a fused step. Null: no second gradient, no compensation, no momentum.
struct StepTensor {
    void* param;
    const void* grad1;
    const void* grad2;
    void* compensation;  // float32, as long as param
    void* momentum;      // as long as param; float64 where param is, else float32
    int64_t size;
    DType param_dtype;
    DType grad_dtype;
};

enum Status : int { kOk = 0, kUnsupportedDType = 1, kOutOfMemory = 2 };

// Where the step's statistics are in its output of five float64 values.
enum StatIndex : int { kSqNorm1 = 0, kSqNorm2 = 1, kInner = 2, kWeightSqNorm = 3, kFinite = 4, kStatCount = 5 };

}  // namespace svag
