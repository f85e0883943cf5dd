// A small chain net laid out for training on one thread: layers, where their values are, and which meets which.
// Images are channels last, the channels padded with zeros to whole vectors; what a 3x3 kernel reads has a border of
// zeros. So a convolution is a product whose rows and depth are looked up in tables: nothing is unfolded.
#pragma once

#include <cstdint>
#include <vector>

namespace svag {

enum class LayerKind : int64_t { affine = 0, norm, relu, tanh, gelu, gelu_tanh, pool, flatten };

// One layer as Python describes it. A linear layer is a 1x1 convolution of an image of one pixel.
struct LayerSpec {
    LayerKind kind;
    int64_t in_channels, in_height, in_width, out_channels, out_height, out_width;
    int64_t kernel_h, kernel_w, stride_h, stride_w;
    int64_t groups;       // of a norm
    int64_t relu;         // of a norm: a ReLU follows in the same pass
    int64_t per_element;  // of a norm: its weight has one value a channel and pixel, not one a channel
    // Offsets into the replica's trained parameters or into the frozen ones; -1: there is none.
    int64_t weight, weight_trained, bias, bias_trained;
    double eps;
};

struct Layout {
    int64_t height, width, channels, pitch, border;

    int64_t row() const { return (width + 2 * border) * pitch; }
    int64_t sample() const { return (height + 2 * border) * row(); }
    int64_t at(int64_t y, int64_t x) const { return (y + border) * row() + (x + border) * pitch; }
    int64_t pixels() const { return height * width; }
};

// One of the products that make the gradient of a convolution's input: the pixels that a stride puts at the same place
// between output pixels meet the same taps.
struct BackwardProduct {
    int64_t rows, depth;          // rows: a sample
    const int32_t *dz, *dx;       // [samples * rows], in the output's and the input's gradient
    const int32_t *dz_depth, *weight_depth;
};

struct Layer {
    LayerSpec spec;
    Layout in, out, in_grad, out_grad;
    int64_t in_at, out_at, in_grad_at, out_grad_at;  // in the scratch, in floats, as all offsets
    int64_t weight_at, bias_at;                      // in the packed weights; -1: none
    // Affine: [samples * pixels], then [taps * in_channels].
    const int32_t *rows_in, *rows_out, *rows_grad, *depth_in, *depth_weight;
    int64_t depth;
    int64_t taps;
    const int32_t* tap_order;  // [taps], of the transposed weight
    int64_t backward_count;
    BackwardProduct backward[4];
    int64_t normalised_at, rstd_at;  // norm: its values before weight, bias and ReLU; may be its input
};

// What the kernels see of a net.
struct NetView {
    const Layer* layers;
    int64_t count;
    int64_t first_trained;  // `count` where nothing is trained
    int64_t samples;        // of a chunk at most
    int64_t squared_error;  // else cross-entropy
    Layout input, output;
    int64_t input_at, output_at, output_grad_at;
    int64_t trained, packed;  // packed weights: the trained ones come first
    int64_t weights_at, grad1_at, grad2_at, transposed_at, channels_at, norm_grad_at;
    int64_t most_channels;  // `channels_at` holds four times so many
    int64_t most_norm;      // `norm_grad_at` holds twice so many
    int64_t scratch;        // floats a thread
};

constexpr int64_t kLanePadding = 16;     // channels are padded to whole vectors of the widest level
constexpr int64_t kMostSamples = 128;    // of a chunk
constexpr int64_t kChunkFloats = 160000; // of a chunk's values: they stay in a core's cache

class Net {
  public:
    Net(const std::vector<LayerSpec>& specs, bool squared_error);
    const NetView& view() const { return view_; }

  private:
    int64_t reserve(int64_t floats);
    const int32_t* table(std::vector<int32_t> values);
    void set_affine(Layer& layer, bool first);
    void set_backward(Layer& layer);

    NetView view_{};
    std::vector<Layer> layers_;
    std::vector<std::vector<int32_t>> tables_;
    int64_t used_ = 0;
};

}  // namespace svag
