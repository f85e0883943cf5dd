#include "cpu/affine_walk.h"

#include <cmath>
#include <vector>

#include "selftest.h"

namespace {

template <class A>
svag::AffineWalk describe(std::vector<A>& x, int64_t n, const std::vector<double>& weights, int threads) {
    return {x.data(), sizeof(A) == 8, n, 5, 0.9, 0.1, -0.3, 0.4, weights.data(), static_cast<int64_t>(weights.size()),
            {{3, 4}, 0xffffffffu}, threads};
}

template <class A>
std::vector<A> starts(int64_t n) {
    std::vector<A> x;
    for (int64_t i = 0; i <= n; ++i) x.push_back(static_cast<A>(1 + static_cast<double>(i % 7)));  // one more: a guard
    return x;
}

// The same numbers from the normals of svag_philox_normal, a draw at a time.
template <class A>
void compare(int64_t n, const std::vector<double>& weights) {
    std::vector<A> x = starts<A>(n), expected = x, z(static_cast<size_t>(n));
    svag::AffineWalk walk = describe(x, n, weights, 1);
    EXPECT(SVAG_KERNEL(svag_affine_walk)(walk) == svag::kOk);
    std::vector<double> e(z.size());
    for (int64_t step = 0; step < walk.steps; ++step) {
        for (double& value : e) value = 0;
        for (const double weight : weights) {
            SVAG_KERNEL(svag_philox_normal)(z.data(), walk.is_double, n, 0, walk.stream);
            ++walk.stream.draw;
            for (size_t i = 0; i < z.size(); ++i) e[i] += weight * static_cast<double>(z[i]);
        }
        for (size_t i = 0; i < z.size(); ++i) {
            const double at = static_cast<double>(expected[i]);
            expected[i] = static_cast<A>(walk.keep * at + walk.shift + (walk.slope * at + walk.spread) * e[i]);
        }
    }
    for (size_t i = 0; i < z.size(); ++i) {
        const double size = std::fabs(static_cast<double>(expected[i])) + 10;
        EXPECT_NEAR(x[i], expected[i], 64 * size * (sizeof(A) == 4 ? 0x1p-24 : 0x1p-53));
    }
    EXPECT(x.back() == expected.back());
}

}  // namespace

SVAG_CHECK(affine_walk_takes_the_steps_of_the_formula) {
    for (const int64_t n : {0, 1, 33, 64, 100, 2047, 2048, 4200}) {
        compare<float>(n, {1});
        compare<double>(n, {1});
    }
    compare<float>(100, {2, -1.5, 0.5});
    compare<double>(100, {2, -1.5, 0.5});
}

SVAG_CHECK(affine_walk_gives_the_same_bits_for_any_thread_count) {
    const std::vector<double> weights{1};
    std::vector<float> expected;
    for (const int threads : {1, 2, 5}) {
        std::vector<float> x = starts<float>(20001);
        EXPECT(SVAG_KERNEL(svag_affine_walk)(describe(x, 20001, weights, threads)) == svag::kOk);
        if (threads == 1) expected = x;
        EXPECT(x == expected);
    }
}
