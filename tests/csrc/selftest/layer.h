// A layer's operands for the kernels of its products.
#pragma once

#include <cmath>

#include "cpu/kernels/weight_grad/layer_operands.h"

namespace selftest {

struct LayerShape {
    int64_t batch, groups, channels, outputs, height, width, kernel, stride, pad, dilation;
    int64_t out(int64_t n) const { return (n + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1; }
    int64_t input_size() const { return batch * groups * channels * height * width; }
    int64_t output_size() const { return batch * groups * outputs * out(height) * out(width); }
};

// The strides of [n, channels, height, width], dense, channels second or last.
inline void set_strides(int64_t channels, int64_t height, int64_t width, bool channels_last, int64_t* strides) {
    const int64_t second[] = {channels * height * width, height * width, width, 1};
    const int64_t last[] = {channels * height * width, 1, width * channels, channels};
    for (int i = 0; i < 4; ++i) strides[i] = channels_last ? last[i] : second[i];
}

template <class T>
void set_layer(svag::LayerOperands& layer, const LayerShape& s, bool channels_last, const T* inputs,
               const T* output_grads) {
    layer.inputs = inputs;
    layer.output_grads = output_grads;
    layer.is_double = sizeof(T) == sizeof(double);
    layer.batch = s.batch, layer.groups = s.groups, layer.channels = s.channels, layer.outputs = s.outputs;
    layer.height = s.height, layer.width = s.width;
    layer.out_height = s.out(s.height), layer.out_width = s.out(s.width);
    layer.kernel_h = layer.kernel_w = s.kernel, layer.stride_h = layer.stride_w = s.stride;
    layer.pad_h = layer.pad_w = s.pad, layer.dilation_h = layer.dilation_w = s.dilation;
    set_strides(s.groups * s.channels, s.height, s.width, channels_last, layer.input_strides);
    set_strides(s.groups * s.outputs, layer.out_height, layer.out_width, channels_last, layer.output_strides);
}

// One sample's gradient of one weight, as the definition says; `size` grows by the sum of the terms' sizes.
template <class T>
double sample_grad(const svag::LayerOperands& a, int64_t b, int64_t o, int64_t c, int64_t ky, int64_t kx,
                   double& size) {
    const T *inputs = static_cast<const T*>(a.inputs), *output_grads = static_cast<const T*>(a.output_grads);
    const int64_t *i = a.input_strides, *d = a.output_strides;
    const int64_t in_channel = o / a.outputs * a.channels + c;
    double sum = 0;
    for (int64_t y = 0; y < a.out_height; ++y)
        for (int64_t x = 0; x < a.out_width; ++x) {
            const int64_t row = y * a.stride_h - a.pad_h + ky * a.dilation_h;
            const int64_t column = x * a.stride_w - a.pad_w + kx * a.dilation_w;
            if (row < 0 || row >= a.height || column < 0 || column >= a.width) continue;
            const double term =
                static_cast<double>(inputs[b * i[0] + in_channel * i[1] + row * i[2] + column * i[3]]) *
                static_cast<double>(output_grads[b * d[0] + o * d[1] + y * d[2] + x * d[3]]);
            sum += term;
            size += std::fabs(term);
        }
    return sum;
}

}  // namespace selftest
