#include "cpu/kernels/weight_grad/weight_gram.h"

#include <cmath>

#include "layer.h"
#include "selftest.h"
#include "tensor_list.h"

namespace {

using Shape = selftest::LayerShape;

// Rows that don't fill a tile or a vector, windows that leave the image, groups, rows that the stride passes over, an
// image of one pixel, rows longer than a float32 sum runs.
const Shape kShapes[] = {
    {3, 1, 1, 1, 1, 1, 1, 1, 0, 1},   {4, 1, 5, 7, 6, 5, 3, 1, 1, 1},  {5, 2, 3, 9, 7, 6, 3, 2, 1, 1},
    {2, 1, 17, 13, 8, 8, 3, 1, 2, 2}, {9, 1, 33, 10, 1, 14, 1, 1, 0, 1}, {3, 1, 16, 32, 4, 4, 3, 1, 1, 1},
    {2, 3, 4, 6, 7, 5, 1, 2, 0, 1},   {2, 1, 4, 3, 2, 3, 1, 2, 1, 1},  {2, 1, 2100, 3, 1, 6, 1, 1, 0, 1},
};

template <class T>
struct Problem {
    svag::WeightGramArgs args{};
    std::vector<T> inputs, output_grads;
    std::vector<double> sq_norms;

    Problem(const Shape& s, bool channels_last, double scale = 1) {
        selftest::Random random(23);
        const auto fill = [&random, scale](auto& v, int64_t n) {
            v.resize(static_cast<size_t>(n));
            for (auto& e : v) e = static_cast<T>(scale * random.uniform());
        };
        fill(inputs, s.input_size());
        fill(output_grads, s.output_size());
        sq_norms.assign(static_cast<size_t>(s.batch), NAN);
        selftest::set_layer(args, s, channels_last, inputs.data(), output_grads.data());
        args.sq_norms = sq_norms.data();
    }

    int run(int threads) {
        args.threads = threads;
        return SVAG_KERNEL(svag_weight_gram)(args);
    }

    double sq_norm(int64_t b) const {
        double sum = 0, terms = 0;
        for (int64_t o = 0; o < args.groups * args.outputs; ++o)
            for (int64_t c = 0; c < args.channels; ++c)
                for (int64_t tap = 0; tap < args.kernel_h * args.kernel_w; ++tap) {
                    const double g =
                        selftest::sample_grad<T>(args, b, o, c, tap / args.kernel_w, tap % args.kernel_w, terms);
                    sum += g * g;
                }
        return sum;
    }
};

template <class T>
void compare_all(double scale, double tolerance) {
    for (const Shape& shape : kShapes)
        for (const bool channels_last : {false, true}) {
            Problem<T> problem(shape, channels_last, scale);
            EXPECT(problem.run(1) == svag::kOk);
            for (int64_t b = 0; b < shape.batch; ++b) {
                const double exact = problem.sq_norm(b);
                EXPECT_NEAR(problem.sq_norms[static_cast<size_t>(b)], exact, tolerance * exact);
            }
        }
}

}  // namespace

SVAG_CHECK(weight_gram_follows_the_definition_in_float64) { compare_all<double>(1, 1e-12); }
SVAG_CHECK(weight_gram_follows_the_definition_in_float32) { compare_all<float>(1, 1e-7); }
SVAG_CHECK(weight_gram_of_large_float32_rows_does_not_overflow) { compare_all<float>(1e30, 1e-12); }

// Rows alike but for a little, output gradients whose sum over the positions is nearly 0.
SVAG_CHECK(weight_gram_of_rows_that_cancel_keeps_its_digits) {
    const int64_t positions = 9, channels = 24, outputs = 16;
    for (const bool channels_last : {false, true}) {
        Problem<float> problem(Shape{4, 1, channels, outputs, 3, 3, 1, 1, 0, 1}, channels_last);
        for (float& x : problem.inputs) x = 3 + x / 32;
        for (int64_t b = 0; b < 4; ++b)
            for (int64_t o = 0; o < outputs; ++o) {
                const auto at = [&](int64_t t) -> float& {
                    const int64_t* d = problem.args.output_strides;
                    return problem.output_grads[static_cast<size_t>(b * d[0] + o * d[1] + t * d[3])];
                };
                float mean = 0;
                for (int64_t t = 0; t < positions; ++t) mean += at(t) / static_cast<float>(positions);
                for (int64_t t = 0; t < positions; ++t) at(t) -= mean;
            }
        EXPECT(problem.run(1) == svag::kOk);
        for (int64_t b = 0; b < 4; ++b) {
            const double exact = problem.sq_norm(b);
            EXPECT_NEAR(problem.sq_norms[static_cast<size_t>(b)], exact, 1e-10 * exact);
        }
    }
}

SVAG_CHECK(weight_gram_of_rows_that_cancel_is_not_negative) {
    Problem<float> problem(Shape{40, 1, 33, 17, 1, 2, 1, 1, 0, 1}, true);
    for (size_t b = 0; b < 40; ++b)
        for (size_t c = 0; c < 33; ++c) problem.inputs[(2 * b + 1) * 33 + c] = problem.inputs[2 * b * 33 + c];
    for (size_t b = 0; b < 40; ++b)
        for (size_t o = 0; o < 17; ++o) problem.output_grads[(2 * b + 1) * 17 + o] = -problem.output_grads[2 * b * 17 + o];
    EXPECT(problem.run(1) == svag::kOk);
    for (const double n : problem.sq_norms) EXPECT(n >= 0 && n < 1e-12);
}

SVAG_CHECK(weight_gram_gives_the_same_bits_for_any_thread_count) {
    for (const Shape& shape : kShapes) {
        Problem<float> one(shape, false), many(shape, false);
        EXPECT(one.run(1) == svag::kOk);
        EXPECT(many.run(3) == svag::kOk);
        EXPECT(one.sq_norms == many.sq_norms);
    }
}
