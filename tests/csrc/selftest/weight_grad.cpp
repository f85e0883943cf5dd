#include "cpu/kernels/weight_grad/weight_grad.h"

#include <cmath>

#include "layer.h"
#include "selftest.h"
#include "tensor_list.h"

namespace {

using Shape = selftest::LayerShape;

// Tiles that are not full, windows that leave the image, groups, a 1x1 kernel (Linear), an image of one pixel.
const Shape kShapes[] = {
    {3, 1, 1, 1, 1, 1, 1, 1, 0, 1},  {4, 1, 5, 7, 6, 5, 3, 1, 1, 1},    {5, 2, 3, 9, 7, 6, 3, 2, 1, 1},
    {2, 1, 17, 13, 8, 8, 3, 1, 2, 2}, {18, 1, 33, 10, 1, 4, 1, 1, 0, 1}, {3, 1, 16, 32, 4, 4, 3, 1, 1, 1},
};

// Enough work for several threads, and several samples in a chunk.
const Shape kLarge{40, 2, 16, 12, 7, 6, 3, 1, 1, 1};

template <class T>
struct Problem {
    svag::WeightGradArgs args{};
    std::vector<T> inputs, output_grads, grad;
    std::vector<double> weights, sq_norms, gram;
    std::vector<int64_t> order, ends, segment_of;

    Problem(const Shape& s, bool channels_last, int segments) {
        selftest::Random random(17);
        const auto fill = [&random](auto& v, int64_t n) {
            v.resize(static_cast<size_t>(n));
            for (auto& e : v) e = static_cast<T>(random.uniform());
        };
        fill(inputs, s.input_size());
        fill(output_grads, s.output_size());
        fill(weights, s.batch);
        grad.assign(static_cast<size_t>(s.groups * s.outputs * s.channels * s.kernel * s.kernel), static_cast<T>(NAN));
        sq_norms.assign(static_cast<size_t>(s.batch), NAN);
        gram.assign(static_cast<size_t>(segments * segments), NAN);
        segment_of.resize(static_cast<size_t>(s.batch));
        for (int64_t b = 0; b < s.batch; ++b) segment_of[static_cast<size_t>(b)] = b % segments;
        for (int64_t k = 0; k < segments; ++k) {
            for (int64_t b = k; b < s.batch; b += segments) order.push_back(b);
            ends.push_back(static_cast<int64_t>(order.size()));
        }
        selftest::set_layer(args, s, channels_last, inputs.data(), output_grads.data());
        selftest::set_strides(s.channels, s.kernel, s.kernel, channels_last, args.grad_strides);
        args.weights = weights.data();
        args.order = order.data();
        args.segment_ends = ends.data();
        args.segments = segments;
        args.grad = grad.data();
        args.sq_norms = sq_norms.data();
        args.segment_gram = gram.data();
        args.threads = 1;
    }

    int run(svag::LoopOrder loop_order, int threads) {
        args.loop_order = loop_order;
        args.threads = threads;
        return SVAG_KERNEL(svag_weight_grad)(args);
    }

    void compare_with_the_definition() const {
        const auto& a = args;
        const auto S = static_cast<size_t>(a.segments), B = static_cast<size_t>(a.batch);
        const double rounding = (sizeof(T) == 8 ? 0x1p-53 : 0x1p-24) *
                                static_cast<double>(a.batch + a.out_height * a.out_width + 8);
        std::vector<double> sq(B), sq_size(B), products(S * S), product_sizes(S * S), segment(S), segment_size(S);
        for (int64_t o = 0; o < a.groups * a.outputs; ++o)
            for (int64_t c = 0; c < a.channels; ++c)
                for (int64_t tap = 0; tap < a.kernel_h * a.kernel_w; ++tap) {
                    const int64_t ky = tap / a.kernel_w, kx = tap % a.kernel_w;
                    double sum = 0, size = 0;
                    segment.assign(S, 0), segment_size.assign(S, 0);
                    for (size_t b = 0; b < B; ++b) {
                        double terms = 0;
                        const double g = selftest::sample_grad<T>(args, static_cast<int64_t>(b), o, c, ky, kx, terms);
                        sq[b] += g * g;
                        sq_size[b] += terms * terms;
                        sum += weights[b] * g;
                        size += std::fabs(weights[b]) * terms;
                        segment[static_cast<size_t>(segment_of[b])] += weights[b] * g;
                        segment_size[static_cast<size_t>(segment_of[b])] += std::fabs(weights[b]) * terms;
                    }
                    const int64_t* w = a.grad_strides;
                    EXPECT_NEAR(grad[static_cast<size_t>(o * w[0] + c * w[1] + ky * w[2] + kx * w[3])], sum,
                                rounding * size);
                    for (size_t s = 0; s < S; ++s)
                        for (size_t t = 0; t < S; ++t) {
                            products[s * S + t] += segment[s] * segment[t];
                            product_sizes[s * S + t] += segment_size[s] * segment_size[t];
                        }
                }
        for (size_t b = 0; a.sq_norms != nullptr && b < B; ++b)
            EXPECT_NEAR(sq_norms[b], sq[b], 3 * rounding * sq_size[b]);
        for (size_t k = 0; k < S * S; ++k) EXPECT_NEAR(gram[k], products[k], 3 * rounding * product_sizes[k]);
    }
};

template <class T>
void compare_all(bool channels_last, int segments) {
    for (const Shape& shape : kShapes)
        for (const auto order : {svag::LoopOrder::samples_outside, svag::LoopOrder::tiles_outside}) {
            Problem<T> problem(shape, channels_last, segments);
            EXPECT(problem.run(order, 1) == svag::kOk);
            problem.compare_with_the_definition();
        }
}

}  // namespace

SVAG_CHECK(weight_grad_follows_the_definition_in_float32) { compare_all<float>(false, 2); }
SVAG_CHECK(weight_grad_follows_the_definition_in_float64) { compare_all<double>(false, 1); }
SVAG_CHECK(weight_grad_reads_channels_last) { compare_all<float>(true, 3); }

SVAG_CHECK(weight_grad_gives_the_same_bits_for_any_thread_count) {
    for (const auto order : {svag::LoopOrder::samples_outside, svag::LoopOrder::tiles_outside}) {
        Problem<float> one(kLarge, false, 2), many(kLarge, false, 2);
        EXPECT(one.run(order, 1) == svag::kOk);
        EXPECT(many.run(order, 3) == svag::kOk);
        many.compare_with_the_definition();
        EXPECT(one.grad == many.grad);
        EXPECT(one.sq_norms == many.sq_norms);
        EXPECT(one.gram == many.gram);
    }
}

SVAG_CHECK(weight_grad_keeps_segments_apart_whose_sum_it_gives_otherwise) {
    for (const auto order : {svag::LoopOrder::samples_outside, svag::LoopOrder::tiles_outside})
        for (const Shape& shape : kShapes) {
            Problem<double> sum(shape, false, 2), apart(shape, false, 2);
            const size_t n = sum.grad.size();
            apart.grad.assign(2 * n, NAN);
            apart.args.grad = apart.grad.data();
            apart.args.segment_stride = static_cast<int64_t>(n);
            EXPECT(sum.run(order, 1) == svag::kOk);
            EXPECT(apart.run(order, 1) == svag::kOk);
            EXPECT(sum.sq_norms == apart.sq_norms);
            EXPECT(sum.gram == apart.gram);
            double squares = 0;
            for (size_t k = 0; k < n; ++k) {
                EXPECT_NEAR(apart.grad[k] + apart.grad[n + k], sum.grad[k], 1e-13 * (1 + std::fabs(sum.grad[k])));
                squares += apart.grad[k] * apart.grad[k];
            }
            EXPECT_NEAR(squares, sum.gram[0], 1e-12 * (1 + squares));
        }
}

SVAG_CHECK(weight_grad_without_weights_or_order_takes_ones_and_the_samples_as_they_come) {
    for (const auto order : {svag::LoopOrder::samples_outside, svag::LoopOrder::tiles_outside})
        for (const Shape& shape : kShapes) {
            Problem<float> given(shape, false, 1), left_out(shape, false, 1);
            given.weights.assign(given.weights.size(), 1);
            left_out.args.weights = nullptr;
            left_out.args.order = nullptr;
            EXPECT(given.run(order, 1) == svag::kOk);
            EXPECT(left_out.run(order, 1) == svag::kOk);
            EXPECT(given.grad == left_out.grad);
            EXPECT(given.sq_norms == left_out.sq_norms);
        }
}

SVAG_CHECK(weight_grad_without_norms_sums_over_several_samples) {
    for (int segments = 1; segments <= 3; ++segments)
        for (const bool channels_last : {false, true}) {
            for (const Shape& shape : kShapes) {
                Problem<double> problem(shape, channels_last, segments);
                problem.args.sq_norms = nullptr;
                EXPECT(problem.run(svag::LoopOrder::tiles_outside, 1) == svag::kOk);
                problem.compare_with_the_definition();
            }
            Problem<float> one(kLarge, channels_last, segments), many(kLarge, channels_last, segments);
            one.args.sq_norms = many.args.sq_norms = nullptr;
            EXPECT(one.run(svag::LoopOrder::tiles_outside, 1) == svag::kOk);
            EXPECT(many.run(svag::LoopOrder::tiles_outside, 3) == svag::kOk);
            many.compare_with_the_definition();
            EXPECT(one.grad == many.grad);
            EXPECT(one.gram == many.gram);
        }
}
