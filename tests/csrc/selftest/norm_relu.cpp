#include "cpu/norm_relu.h"

#include <cmath>
#include <limits>

#include "selftest.h"
#include "tensor_list.h"

namespace {

// Activations, what the kernels make of them, and the formula on them in double.
template <class T>
struct Problem {
    svag::NormShape shape;
    std::vector<T> x, weight, bias, residual, y_grad, y, x_grad, residual_grad;
    std::vector<double> mean, var, weight_grad, bias_grad;

    explicit Problem(const svag::NormShape& s, double shift = 0) : shape(s) {
        selftest::Random random(7);
        const auto drawn = [&random](int64_t n, double from) {
            std::vector<T> v(static_cast<size_t>(n));
            for (T& e : v) e = static_cast<T>(from + random.uniform());
            return v;
        };
        const int64_t size = s.samples * s.channels * s.pixels;
        x = drawn(size, shift);
        weight = drawn(s.channels, 0);
        bias = drawn(s.channels, 0);
        residual = drawn(size, 0);
        y_grad = drawn(size, 0);
        y = x_grad = residual_grad = std::vector<T>(x.size(), static_cast<T>(NAN));
        const int64_t units = s.groups > 0 ? s.samples * s.groups : s.segments * s.channels;
        mean = var = std::vector<double>(static_cast<size_t>(units), NAN);
        weight_grad = bias_grad = std::vector<double>(weight.size(), NAN);
    }

    void run(bool affine, bool adds) {
        const T *w = affine ? weight.data() : nullptr, *b = affine ? bias.data() : nullptr;
        const svag::NormForward forward{x.data(), w, b, adds ? residual.data() : nullptr, y.data(), mean.data(),
                                        var.data()};
        EXPECT(SVAG_KERNEL(svag_norm_relu)(shape, forward) == svag::kOk);
        const svag::NormBackward backward{x.data(), w, b, mean.data(), var.data(), adds ? y.data() : nullptr,
                                          y_grad.data(), x_grad.data(), adds ? residual_grad.data() : nullptr,
                                          weight_grad.data(), bias_grad.data()};
        EXPECT(SVAG_KERNEL(svag_norm_relu_grad)(shape, backward) == svag::kOk);
    }

    // Which sample, channel and unit an element is of.
    int64_t sample(int64_t i) const { return i / (shape.channels * shape.pixels); }
    int64_t channel(int64_t i) const {
        return shape.channels_last ? i % shape.channels : i / shape.pixels % shape.channels;
    }
    size_t unit(int64_t i) const {
        if (shape.groups > 0)
            return static_cast<size_t>(sample(i) * shape.groups + channel(i) / (shape.channels / shape.groups));
        return static_cast<size_t>(sample(i) / (shape.samples / shape.segments) * shape.channels + channel(i));
    }

    void compare(bool affine, bool adds, double tolerance) const {
        const auto size = static_cast<int64_t>(x.size());
        const double values = static_cast<double>(size) / static_cast<double>(mean.size());
        std::vector<double> m(mean.size()), v(mean.size()), sum(mean.size()), product(mean.size());
        const auto at = [](const std::vector<T>& a, int64_t i) {
            return static_cast<double>(a[static_cast<size_t>(i)]);
        };
        for (int64_t i = 0; i < size; ++i) m[unit(i)] += at(x, i) / values;
        for (int64_t i = 0; i < size; ++i) v[unit(i)] += (at(x, i) - m[unit(i)]) * (at(x, i) - m[unit(i)]) / values;
        for (size_t u = 0; u < m.size(); ++u) {
            EXPECT_NEAR(mean[u], m[u], tolerance);
            EXPECT_NEAR(var[u], v[u], tolerance);
        }
        const auto factor = [&](int64_t i) { return affine ? at(weight, channel(i)) : 1; };
        const auto normal = [&](int64_t i) { return (at(x, i) - m[unit(i)]) / std::sqrt(v[unit(i)] + shape.eps); };
        // Behind the ReLU as the kernel saw it: at the kink rounding decides.
        const auto grad = [&](int64_t i) { return shape.relu && at(y, i) <= 0 ? 0 : at(y_grad, i); };
        std::vector<double> w_grad(weight.size()), b_grad(weight.size());
        for (int64_t i = 0; i < size; ++i) {
            const double out = normal(i) * factor(i) + (affine ? at(bias, channel(i)) : 0) + (adds ? at(residual, i) : 0);
            EXPECT_NEAR(y[static_cast<size_t>(i)], shape.relu && out < 0 ? 0 : out, 8 * tolerance);
            sum[unit(i)] += factor(i) * grad(i);
            product[unit(i)] += factor(i) * grad(i) * normal(i);
            w_grad[static_cast<size_t>(channel(i))] += grad(i) * normal(i);
            b_grad[static_cast<size_t>(channel(i))] += grad(i);
        }
        for (int64_t i = 0; i < size; ++i) {
            const double out = (factor(i) * grad(i) - sum[unit(i)] / values - normal(i) * product[unit(i)] / values) /
                               std::sqrt(v[unit(i)] + shape.eps);
            EXPECT_NEAR(x_grad[static_cast<size_t>(i)], out, 16 * tolerance);
            if (adds) EXPECT_NEAR(residual_grad[static_cast<size_t>(i)], grad(i), 0);
        }
        for (size_t c = 0; c < weight.size(); ++c) {
            EXPECT_NEAR(weight_grad[c], w_grad[c], 64 * tolerance);
            EXPECT_NEAR(bias_grad[c], b_grad[c], 64 * tolerance);
        }
    }
};

template <class T>
void try_all(int64_t samples, int64_t channels, int64_t pixels, int64_t groups, int64_t segments) {
    for (const bool last : {false, true})
        for (const bool affine : {false, true})
            for (const bool adds : {false, true}) {
                Problem<T> problem({samples, channels, pixels, groups, segments, last, sizeof(T) == 8, !adds || affine,
                                    1e-3, 2});
                problem.run(affine, adds);
                problem.compare(affine, adds, sizeof(T) == 8 ? 1e-13 : 2e-6);
            }
}

}  // namespace

SVAG_CHECK(norm_relu_follows_the_formula) {
    for (const int64_t pixels : {2, 17, 70}) {
        try_all<float>(4, 6, pixels, 2, 1);
        try_all<double>(2, 35, pixels, 5, 1);
        try_all<float>(4, 19, pixels, 0, 2);
        try_all<double>(3, 8, pixels, 0, 1);
    }
    try_all<float>(2, 3, 1100, 1, 1);
    try_all<float>(2, 5, 4000, 0, 1);
}

SVAG_CHECK(norm_relu_gives_the_same_bits_for_any_thread_count) {
    for (const bool last : {false, true})
        for (const int64_t groups : {0, 4}) {
            Problem<float> one({6, 32, 300, groups, 2, last, false, true, 1e-5, 1});
            Problem<float> many = one;
            many.shape.threads = 3;
            one.run(true, true);
            many.run(true, true);
            EXPECT(one.y == many.y && one.mean == many.mean && one.var == many.var);
            EXPECT(one.x_grad == many.x_grad && one.residual_grad == many.residual_grad);
            EXPECT(one.weight_grad == many.weight_grad && one.bias_grad == many.bias_grad);
        }
}

SVAG_CHECK(norm_relu_keeps_its_digits_where_a_mean_is_large) {
    for (const bool last : {false, true})
        for (const int64_t groups : {0, 2}) {
            Problem<float> problem({4, 16, 64, groups, 1, last, false, true, 1e-5, 1}, 4096);
            problem.run(false, false);
            problem.compare(false, false, 4e-6);
        }
}

SVAG_CHECK(norm_relu_without_eps_gives_zeros_for_equal_values) {
    for (const int64_t groups : {0, 1}) {
        Problem<float> problem({2, 3, 5, groups, 1, false, false, true, 0, 1});
        for (float& e : problem.x) e = 3;
        problem.run(false, false);
        for (const float e : problem.y) EXPECT(e == 0);
        for (const float e : problem.x_grad) EXPECT(e == 0);
    }
}

SVAG_CHECK(norm_relu_lets_a_nan_through) {
    Problem<float> problem({2, 3, 40, 3, 1, false, false, true, 1e-5, 1});
    problem.x[1] = std::numeric_limits<float>::quiet_NaN();
    problem.run(false, false);
    for (size_t i = 0; i < problem.y.size(); ++i) EXPECT(std::isnan(problem.y[i]) == (i < 40));
}
