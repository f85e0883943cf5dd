#include "cpu/adaptive_step.h"

#include <cmath>

#include "selftest.h"

namespace {

template <class A>
constexpr svag::DType kDType = sizeof(A) == 4 ? svag::DType::float32 : svag::DType::float64;

template <class A>
struct Lists {
    std::vector<A> x, g1, g2, m, v;

    explicit Lists(int64_t n) {
        selftest::Random random(static_cast<uint64_t>(n) + 1);
        for (auto* list : {&x, &g1, &g2, &m, &v})
            for (int64_t i = 0; i <= n; ++i) list->push_back(static_cast<A>(random.uniform()));  // one more: a guard
        for (A& value : v) value = std::fabs(value);
    }

    svag::AdaptiveTensor describe(bool second, bool first_moment) {
        return {{x.data(), g1.data(), second ? g2.data() : nullptr, nullptr, nullptr, static_cast<int64_t>(x.size()) - 1,
                 kDType<A>, kDType<A>},
                first_moment ? m.data() : nullptr, v.data(), 0.03, 0.9};
    }
};

svag::AdaptiveOptions options(double c1, double c2, double weight1 = 0.2) {
    return {c1, c2, 0.05, weight1, 0.75, 0.25, 1e-3, false, 1};
}

template <class A>
void compare_with_the_formula(int64_t n, const svag::AdaptiveOptions& o, bool second, bool first_moment) {
    Lists<A> lists(n);
    const Lists<A> before = lists;
    double stats[svag::kStatCount];
    const svag::AdaptiveTensor tensor = lists.describe(second, first_moment);
    EXPECT(SVAG_KERNEL(svag_adaptive_step)(&tensor, 1, o, stats) == svag::kOk);
    const double rounding = 32 * (sizeof(A) == 4 ? 0x1p-24 : 0x1p-53);
    double inner = 0;
    for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
        const double x = before.x[i], second_gradient = second ? before.g2[i] : 0;
        const double g = o.c1 * before.g1[i] + o.c2 * second_gradient + o.weight_decay * x;
        const double m = before.m[i] + o.one_minus_beta1 * (g - before.m[i]);
        const double v = o.beta2 * before.v[i] + o.one_minus_beta2 * g * g;
        const double step = tensor.step_size * (first_moment ? m : g) /
                            (std::sqrt(v) / tensor.bias_correction2_sqrt + o.eps);
        // The gradient's rounding, relative to its terms, is carried on by each formula.
        const double size = std::fabs(o.c1) + std::fabs(o.c2) + 1;
        EXPECT_NEAR(lists.v[i], v, rounding * size * size);
        if (first_moment) EXPECT_NEAR(lists.m[i], m, rounding * size);
        const double share = tensor.step_size / (std::sqrt(v) + o.eps);
        EXPECT_NEAR(lists.x[i], x - step, rounding * (1 + share * size + std::fabs(step) * size * size / (v + 1e-6)));
        inner += static_cast<double>(before.g1[i]) * second_gradient;
    }
    EXPECT_NEAR(stats[svag::kInner], inner, 2048 * rounding * static_cast<double>(n + 1));
    EXPECT(stats[svag::kFinite] == 1);
    EXPECT(lists.x.back() == before.x.back() && lists.m.back() == before.m.back() && lists.v.back() == before.v.back());
}

}  // namespace

SVAG_CHECK(adaptive_step_follows_the_formula) {
    for (const int64_t n : {0, 1, 3, 8, 31, 33, 4097})
        for (const bool first_moment : {true, false}) {
            compare_with_the_formula<float>(n, options(2, -1), true, first_moment);
            compare_with_the_formula<double>(n, options(2, -1), true, first_moment);
            compare_with_the_formula<float>(n, options(1, 0, 0.7), true, first_moment);
            compare_with_the_formula<double>(n, options(1, 0, 0.7), false, first_moment);
        }
}

SVAG_CHECK(adaptive_step_skips_when_a_gradient_is_not_finite) {
    Lists<float> lists(5000);
    lists.g2[4321] = INFINITY;
    const Lists<float> before = lists;
    auto o = options(2, -1);
    o.skip_nonfinite = true;
    double stats[svag::kStatCount];
    const svag::AdaptiveTensor tensor = lists.describe(true, true);
    EXPECT(SVAG_KERNEL(svag_adaptive_step)(&tensor, 1, o, stats) == svag::kOk);
    EXPECT(stats[svag::kFinite] == 0);
    EXPECT(lists.x == before.x && lists.m == before.m && lists.v == before.v);
}

SVAG_CHECK(adaptive_step_gives_the_same_bits_for_any_thread_count) {
    std::vector<float> expected;
    for (const int threads : {1, 2, 5}) {
        Lists<float> lists(200001);
        auto o = options(2, -1);
        o.threads = threads;
        double stats[svag::kStatCount];
        const svag::AdaptiveTensor tensor = lists.describe(true, true);
        EXPECT(SVAG_KERNEL(svag_adaptive_step)(&tensor, 1, o, stats) == svag::kOk);
        if (threads == 1) expected = lists.x;
        EXPECT(lists.x == expected);
    }
}

SVAG_CHECK(adaptive_step_refuses_other_dtypes) {
    Lists<float> lists(3);
    svag::AdaptiveTensor tensor = lists.describe(true, true);
    tensor.param_dtype = svag::DType::bfloat16;
    double stats[svag::kStatCount];
    EXPECT(SVAG_KERNEL(svag_adaptive_step)(&tensor, 1, options(2, -1), stats) == svag::kUnsupportedDType);
}
