// The two operands of a layer's products b_i^T a_i: its inputs and its output gradients, and the convolution's geometry.
#pragma once

#include <cstdint>

namespace svag {

// Linear is a 1x1 convolution over an image of one row: T columns, channels last.
// Strides count elements, in the order sample (or output channel), channel, row, column.
struct LayerOperands {
    const void* inputs;
    const void* output_grads;
    bool is_double;  // float64, else float32: of both operands and of what is made of them in their dtype
    int64_t input_strides[4], output_strides[4];
    int64_t batch, groups;
    int64_t channels, outputs;  // of one group
    int64_t height, width, out_height, out_width;
    int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

}  // namespace svag
