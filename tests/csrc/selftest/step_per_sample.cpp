#include "cpu/step_per_sample.h"

#include <cmath>
#include <limits>

#include "selftest.h"
#include "tensor_list.h"

namespace {

constexpr int64_t kFirst = 5, kSecond = 3;  // samples of the two batches

// A list of two tensors: one of a few chunks with a cut-off tail, one of `small` elements.
template <class T>
struct Problem {
    std::vector<std::vector<T>> params, firsts, seconds;
    std::vector<svag::PerSampleTensor> list;
    std::vector<double> sq_norms = std::vector<double>(kFirst + kSecond, NAN);
    double stats[svag::kStatCount];

    Problem(int64_t large, int64_t small) {
        selftest::Random random(23);
        const auto drawn = [&random](int64_t n) {
            std::vector<T> v(static_cast<size_t>(n));
            for (T& e : v) e = static_cast<T>(random.uniform());
            return v;
        };
        for (const int64_t n : {large, small}) {
            params.push_back(drawn(n));
            firsts.push_back(drawn(kFirst * n));
            seconds.push_back(drawn(kSecond * n));
        }
    }

    int run(const svag::StepOptions& options) {
        list.clear();
        for (size_t t = 0; t < params.size(); ++t)
            list.push_back({params[t].data(), firsts[t].data(), seconds[t].data(),
                            static_cast<int64_t>(params[t].size()), sizeof(T) == sizeof(double)});
        return SVAG_KERNEL(svag_step_per_sample)(list.data(), static_cast<int64_t>(list.size()), kFirst, kSecond,
                                                 options, sq_norms.data(), stats);
    }
};

// The mean over the samples of element i, and each sample's square added to its norm; `size`: the terms' mean size.
template <class T>
double mean(const std::vector<T>& grads, int64_t samples, size_t i, double* sq_norms, double& size) {
    const size_t n = grads.size() / static_cast<size_t>(samples);
    double sum = 0;
    size = 0;
    for (int64_t s = 0; s < samples; ++s) {
        const auto g = static_cast<double>(grads[static_cast<size_t>(s) * n + i]);
        sum += g;
        size += std::fabs(g);
        sq_norms[s] += g * g;
    }
    size /= static_cast<double>(samples);
    return sum / static_cast<double>(samples);
}

template <class T>
void compare_with_the_formula(int64_t large, int64_t small, const svag::StepOptions& o) {
    Problem<T> problem(large, small);
    const auto before = problem.params;
    EXPECT(problem.run(o) == svag::kOk);
    const double rounding = sizeof(T) == 8 ? 0x1p-53 : 0x1p-24;
    std::vector<double> sq_norms(kFirst + kSecond);
    double sums[svag::kFinite] = {}, sizes[svag::kFinite] = {};
    for (size_t t = 0; t < before.size(); ++t)
        for (size_t i = 0; i < before[t].size(); ++i) {
            double size1, size2;
            const double g1 = mean(problem.firsts[t], kFirst, i, sq_norms.data(), size1);
            const double g2 = mean(problem.seconds[t], kSecond, i, sq_norms.data() + kFirst, size2);
            const auto x = static_cast<double>(before[t][i]);
            const double size = std::fabs(x) + o.rate * (std::fabs(o.c1) * size1 + std::fabs(o.c2) * size2 +
                                                         std::fabs(o.weight_decay * x));
            EXPECT_NEAR(problem.params[t][i], x - o.rate * (o.c1 * g1 + o.c2 * g2 + o.weight_decay * x),
                        16 * rounding * size);
            const double terms[] = {g1 * g1, g2 * g2, g1 * g2, x * x};
            const double bounds[] = {size1 * size1, size2 * size2, size1 * size2, x * x};
            for (int k = 0; k < svag::kFinite; ++k) {
                sums[k] += terms[k];
                sizes[k] += bounds[k];
            }
        }
    for (int k = 0; k < svag::kFinite; ++k) EXPECT_NEAR(problem.stats[k], sums[k], (32 * rounding + 1e-12) * sizes[k]);
    EXPECT(problem.stats[svag::kFinite] == 1);
    // A block's squares are summed in the arithmetic's own precision, over at least eight lanes.
    for (size_t s = 0; s < sq_norms.size(); ++s)
        EXPECT_NEAR(problem.sq_norms[s], sq_norms[s], (512 * rounding + 1e-12) * sq_norms[s]);
}

svag::StepOptions options(double l, int threads) {
    const double root = std::sqrt(2 * l - 1);
    return {0.1 / l, (1 + root) / 2, (1 - root) / 2, 0.05, false, threads};
}

}  // namespace

SVAG_CHECK(step_per_sample_follows_the_formula) {
    for (const double l : {1.0, 4.0})
        for (const int64_t small : {0, 1, 7, 2049}) {
            compare_with_the_formula<float>(33, small, options(l, 1));
            compare_with_the_formula<double>(33, small, options(l, 1));
        }
    compare_with_the_formula<float>(16384 + 2048 + 5, 3, options(2, 2));
}

SVAG_CHECK(step_per_sample_gives_the_same_bits_for_any_thread_count) {
    Problem<float> one(50001, 100), many(50001, 100);
    EXPECT(one.run(options(8, 1)) == svag::kOk);
    EXPECT(many.run(options(8, 3)) == svag::kOk);
    EXPECT(one.params == many.params);
    EXPECT(one.sq_norms == many.sq_norms);
    EXPECT(std::memcmp(one.stats, many.stats, sizeof one.stats) == 0);
}

SVAG_CHECK(step_per_sample_at_l_1_keeps_an_inf_of_the_second_batch_out) {
    Problem<float> problem(100, 1);
    problem.seconds[0][42] = std::numeric_limits<float>::infinity();
    EXPECT(problem.run(options(1, 1)) == svag::kOk);
    EXPECT(problem.stats[svag::kFinite] == 0);
    for (const float x : problem.params[0]) EXPECT(std::isfinite(x));
}
