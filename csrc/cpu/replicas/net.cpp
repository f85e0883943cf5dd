#include "cpu/replicas/net.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace svag {
namespace {

int64_t padded(int64_t channels) { return (channels + kLanePadding - 1) / kLanePadding * kLanePadding; }

bool reads_border(const LayerSpec& spec) { return spec.kind == LayerKind::affine && spec.kernel_h == 3; }

bool is_trained(const LayerSpec& spec) {
    return (spec.weight >= 0 && spec.weight_trained) || (spec.bias >= 0 && spec.bias_trained);
}

// Layers that don't need their output again: a norm may write over it.
bool forgets_output(const LayerSpec& spec) {
    return spec.kind == LayerKind::affine || spec.kind == LayerKind::pool || spec.kind == LayerKind::flatten;
}

}  // namespace

int64_t Net::reserve(int64_t floats) {
    const int64_t at = used_;
    used_ += padded(floats);
    return at;
}

const int32_t* Net::table(std::vector<int32_t> values) {
    tables_.push_back(std::move(values));
    return tables_.back().data();
}

Net::Net(const std::vector<LayerSpec>& specs, bool squared_error) {
    const auto count = static_cast<int64_t>(specs.size());
    view_.count = count;
    view_.squared_error = squared_error;
    view_.first_trained = count;
    for (int64_t k = count - 1; k >= 0; --k)
        if (is_trained(specs[k])) view_.first_trained = k;

    // Value k is layer k's input, value `count` the net's output.
    std::vector<Layout> values(count + 1), grads(count + 1);
    for (int64_t k = 0; k <= count; ++k) {
        const LayerSpec& of = specs[k < count ? k : count - 1];
        Layout& v = values[k];
        v = k < count ? Layout{of.in_height, of.in_width, of.in_channels, 0, 0}
                      : Layout{of.out_height, of.out_width, of.out_channels, 0, 0};
        // Nothing is computed in the data, so only what goes through it by vectors asks for whole ones.
        const bool plain = k == 0 && of.kind == LayerKind::affine;
        v.pitch = plain ? v.channels : padded(v.channels);
        grads[k] = v;
        v.border = k < count && reads_border(of) ? 1 : 0;
        grads[k].border = k > 0 && reads_border(specs[k - 1]) && k - 1 > view_.first_trained ? 1 : 0;
    }

    int64_t floats = 0;
    for (int64_t k = 0; k <= count; ++k) floats += values[k].sample() + (k > view_.first_trained ? grads[k].sample() : 0);
    view_.samples = std::max<int64_t>(1, std::min<int64_t>(kMostSamples, kChunkFloats / floats));
    const int64_t samples = view_.samples;
    if (samples * floats >= int64_t{1} << 31) throw std::length_error("svag_fast._C: one sample's values are too many");

    std::vector<int64_t> value_at(count + 1), grad_at(count + 1);
    int64_t shared[2] = {0, 0};
    for (int64_t k = view_.first_trained + 1; k <= count; ++k)
        if (!grads[k].border) shared[k % 2] = std::max(shared[k % 2], samples * grads[k].sample());
    const int64_t shared_at[2] = {reserve(shared[0]), reserve(shared[1])};
    for (int64_t k = 0; k <= count; ++k) {
        value_at[k] = reserve(samples * values[k].sample());
        grad_at[k] = !grads[k].border ? shared_at[k % 2] : reserve(samples * grads[k].sample());
    }

    layers_.resize(count);
    int64_t transposed = 0;
    for (int64_t pass = 0; pass < 2; ++pass)  // the trained weights, then the frozen ones
        for (int64_t k = 0; k < count; ++k) {
            Layer& layer = layers_[k];
            const LayerSpec& spec = layer.spec = specs[k];
            layer.in = values[k];
            layer.out = values[k + 1];
            if (pass == 0) layer.weight_at = layer.bias_at = -1;
            layer.taps = spec.kernel_h * spec.kernel_w;
            const int64_t per_norm = spec.per_element ? layer.in.pixels() * layer.in.pitch : layer.in.pitch;
            const int64_t weight = spec.kind == LayerKind::norm ? per_norm : layer.taps * layer.in.pitch * layer.out.pitch;
            const int64_t bias = spec.kind == LayerKind::norm ? per_norm : layer.out.pitch;
            if (spec.weight >= 0 && (spec.weight_trained != 0) == (pass == 0)) {
                layer.weight_at = view_.packed;
                view_.packed += padded(weight);
            }
            if (spec.bias >= 0 && (spec.bias_trained != 0) == (pass == 0)) {
                layer.bias_at = view_.packed;
                view_.packed += padded(bias);
            }
            if (pass == 0) view_.trained = view_.packed;
            if (spec.kind == LayerKind::affine) transposed = std::max(transposed, weight);
            if (spec.kind == LayerKind::norm) view_.most_norm = std::max(view_.most_norm, per_norm);
            view_.most_channels = std::max({view_.most_channels, layer.in.pitch, layer.out.pitch});
        }
    for (int64_t k = 0; k < count; ++k) {
        Layer& layer = layers_[k];
        layer.in_grad = grads[k];
        layer.out_grad = grads[k + 1];
        layer.in_at = value_at[k];
        layer.out_at = value_at[k + 1];
        layer.in_grad_at = grad_at[k];
        layer.out_grad_at = grad_at[k + 1];
        if (layer.spec.kind == LayerKind::affine) set_affine(layer, k <= view_.first_trained);
        if (layer.spec.kind == LayerKind::norm) {
            const bool over = k > 0 && forgets_output(specs[k - 1]);
            layer.normalised_at = over ? layer.in_at : reserve(samples * layer.in.sample());
            layer.rstd_at = reserve(samples * layer.in.pitch);
        }
    }
    view_.layers = layers_.data();
    view_.input = values[0];
    view_.output = values[count];
    view_.input_at = value_at[0];
    view_.output_at = value_at[count];
    view_.output_grad_at = grad_at[count];
    view_.weights_at = reserve(view_.packed);
    view_.grad1_at = reserve(view_.trained);
    view_.grad2_at = reserve(view_.trained);
    view_.transposed_at = reserve(transposed);
    view_.channels_at = reserve(4 * view_.most_channels);
    view_.norm_grad_at = reserve(2 * view_.most_norm);
    view_.scratch = used_;
}

void Net::set_affine(Layer& layer, bool first) {
    const LayerSpec& spec = layer.spec;
    const int64_t border = spec.kernel_h / 2;
    const auto narrow = [](int64_t offset) { return static_cast<int32_t>(offset); };
    std::vector<int32_t> rows_in, rows_out, rows_grad, depth_in, depth_weight;
    for (int64_t i = 0; i < view_.samples; ++i)
        for (int64_t y = 0; y < layer.out.height; ++y)
            for (int64_t x = 0; x < layer.out.width; ++x) {
                const int64_t from = layer.in.at(y * spec.stride_h - border, x * spec.stride_w - border);
                rows_in.push_back(narrow(i * layer.in.sample() + from));
                rows_out.push_back(narrow(i * layer.out.sample() + layer.out.at(y, x)));
                rows_grad.push_back(narrow(i * layer.out_grad.sample() + layer.out_grad.at(y, x)));
            }
    for (int64_t tap = 0; tap < layer.taps; ++tap)
        for (int64_t c = 0; c < spec.in_channels; ++c) {
            const int64_t a = tap / spec.kernel_w, b = tap % spec.kernel_w;
            depth_in.push_back(narrow(a * layer.in.row() + b * layer.in.pitch + c));
            depth_weight.push_back(narrow((tap * layer.in.pitch + c) * layer.out.pitch));
        }
    layer.depth = static_cast<int64_t>(depth_in.size());
    layer.rows_in = table(std::move(rows_in));
    layer.rows_out = table(std::move(rows_out));
    layer.rows_grad = table(std::move(rows_grad));
    layer.depth_in = table(std::move(depth_in));
    layer.depth_weight = table(std::move(depth_weight));
    if (!first) set_backward(layer);
}

void Net::set_backward(Layer& layer) {
    const LayerSpec& spec = layer.spec;
    const int64_t border = spec.kernel_h / 2;
    const Layout &dz = layer.out_grad, &dx = layer.in_grad;
    const auto narrow = [](int64_t offset) { return static_cast<int32_t>(offset); };
    std::vector<int32_t> order;
    layer.backward_count = 0;
    for (int64_t py = 0; py < spec.stride_h; ++py)
        for (int64_t px = 0; px < spec.stride_w; ++px) {
            std::vector<int32_t> from, to, dz_depth, weight_depth;
            for (int64_t i = 0; i < view_.samples; ++i)
                for (int64_t y = 0; y < dx.height; ++y)
                    for (int64_t x = 0; x < dx.width; ++x) {
                        if ((y + border) % spec.stride_h != py || (x + border) % spec.stride_w != px) continue;
                        const int64_t row = (y + border - py) / spec.stride_h, column = (x + border - px) / spec.stride_w;
                        from.push_back(narrow(i * dz.sample() + dz.at(row, column)));
                        to.push_back(narrow(i * dx.sample() + dx.at(y, x)));
                    }
            for (int64_t a = py; a < spec.kernel_h; a += spec.stride_h)
                for (int64_t b = px; b < spec.kernel_w; b += spec.stride_w) {
                    const int64_t place = static_cast<int64_t>(order.size());
                    const int64_t back = (a - py) / spec.stride_h * dz.row() + (b - px) / spec.stride_w * dz.pitch;
                    for (int64_t o = 0; o < spec.out_channels; ++o) {
                        dz_depth.push_back(narrow(o - back));
                        weight_depth.push_back(narrow((place * layer.out.pitch + o) * layer.in.pitch));
                    }
                    order.push_back(narrow(a * spec.kernel_w + b));
                }
            BackwardProduct& product = layer.backward[layer.backward_count++];
            product.rows = static_cast<int64_t>(to.size()) / view_.samples;
            product.depth = static_cast<int64_t>(dz_depth.size());
            product.dz = table(std::move(from));
            product.dx = table(std::move(to));
            product.dz_depth = table(std::move(dz_depth));
            product.weight_depth = table(std::move(weight_depth));
        }
    layer.tap_order = table(std::move(order));
}

}  // namespace svag
