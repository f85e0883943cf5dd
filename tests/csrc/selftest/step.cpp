#include "cpu/step.h"

#include <cmath>
#include <limits>

#include "selftest.h"

namespace {

using svag::DType;

constexpr double kInf = std::numeric_limits<double>::infinity();

// A tensor of any dtype, read and written in float64. One element more than asked for guards its end.
class Tensor {
  public:
    Tensor(DType dtype, int64_t n) : dtype_(dtype), n_(n), bytes_(static_cast<size_t>((n + 1) * item()), 0x5a) {}

    static Tensor random(DType dtype, int64_t n, uint64_t seed) {
        Tensor t(dtype, n);
        selftest::Random random(seed);
        for (int64_t i = 0; i < n; ++i) t.set(i, random.uniform());
        return t;
    }

    DType dtype() const { return dtype_; }
    int64_t size() const { return n_; }
    void* data() { return bytes_.data(); }
    bool operator==(const Tensor& other) const { return bytes_ == other.bytes_; }
    bool guard_is_intact() const {
        for (auto i = static_cast<size_t>(n_ * item()); i < bytes_.size(); ++i)
            if (bytes_[i] != 0x5a) return false;
        return true;
    }

    double get(int64_t i) const {
        switch (dtype_) {
            case DType::float32: return static_cast<double>(raw<float>(i));
            case DType::float64: return raw<double>(i);
            case DType::float16: return selftest::from_float16(raw<uint16_t>(i));
            default: return selftest::from_bfloat16(raw<uint16_t>(i));
        }
    }
    void set(int64_t i, double value) {
        switch (dtype_) {
            case DType::float32: return put(i, static_cast<float>(value));
            case DType::float64: return put(i, value);
            case DType::float16: return put(i, selftest::to_float16(value));
            default: return put(i, selftest::to_bfloat16(value));
        }
    }
    void set_bits(int64_t i, uint16_t bits) { put(i, bits); }

    // Half the distance from 1 to the next number, and from 0: what rounding to this dtype may cost.
    double epsilon() const {
        switch (dtype_) {
            case DType::float32: return 0x1p-24;
            case DType::float64: return 0x1p-53;
            case DType::float16: return 0x1p-11;
            default: return 0x1p-8;
        }
    }
    double tiny() const { return dtype_ == DType::float16 ? 0x1p-25 : 0x1p-134; }

  private:
    int64_t item() const { return dtype_ == DType::float64 ? 8 : dtype_ == DType::float32 ? 4 : 2; }
    template <class T>
    T raw(int64_t i) const {
        T value;
        std::memcpy(&value, bytes_.data() + static_cast<size_t>(i) * sizeof(T), sizeof(T));
        return value;
    }
    template <class T>
    void put(int64_t i, T value) {
        std::memcpy(bytes_.data() + static_cast<size_t>(i) * sizeof(T), &value, sizeof(T));
    }

    DType dtype_;
    int64_t n_;
    std::vector<unsigned char> bytes_;
};

struct Pair {
    DType param, grad;
};
const Pair kPairs[] = {{DType::float32, DType::float32},   {DType::float64, DType::float64},
                       {DType::float64, DType::float32},   {DType::bfloat16, DType::bfloat16},
                       {DType::bfloat16, DType::float32},  {DType::float16, DType::float16},
                       {DType::float16, DType::float32}};

svag::StepTensor describe(Tensor& x, Tensor& g1, Tensor* g2, Tensor* compensation = nullptr,
                          Tensor* momentum = nullptr) {
    return {x.data(),
            g1.data(),
            g2 == nullptr ? nullptr : g2->data(),
            compensation == nullptr ? nullptr : compensation->data(),
            momentum == nullptr ? nullptr : momentum->data(),
            x.size(),
            x.dtype(),
            g1.dtype()};
}

svag::StepOptions options(double lr, double l, double weight_decay, int threads = 1) {
    const double root = std::sqrt(2 * l - 1);
    return {lr / l, (1 + root) / 2, (1 - root) / 2, weight_decay, false, threads, {}};
}

int step(const svag::StepTensor& tensor, const svag::StepOptions& o, double* stats) {
    return SVAG_KERNEL(svag_step)(&tensor, 1, &o, 1, stats);
}

DType wide(DType param) { return param == DType::float64 ? DType::float64 : DType::float32; }

void compare_with_the_formula(Pair dtypes, int64_t n, const svag::StepOptions& o, bool second, bool momentum = false) {
    Tensor x = Tensor::random(dtypes.param, n, 1), g1 = Tensor::random(dtypes.grad, n, 2),
           g2 = Tensor::random(dtypes.grad, n, 3);
    Tensor v = Tensor::random(wide(dtypes.param), n, 4);
    const Tensor before = x, v_before = v;
    double stats[svag::kStatCount];
    EXPECT(step(describe(x, g1, second ? &g2 : nullptr, nullptr, momentum ? &v : nullptr), o, stats) == svag::kOk);

    const double arithmetic = dtypes.param == DType::float64 ? 0x1p-53 : 0x1p-24;
    double sq_norm1 = 0, sq_norm2 = 0, inner = 0, weight_sq_norm = 0, magnitude = 0;
    for (int64_t i = 0; i < n; ++i) {
        const double p = before.get(i), a = g1.get(i), b = second ? g2.get(i) : 0;
        const double mu = dtypes.param == DType::float64 ? o.momentum.float64 : o.momentum.float32;
        const double kept = momentum ? mu * v_before.get(i) : 0;
        const double moved = kept + (o.c1 * a + o.c2 * b + o.weight_decay * p);
        const double expected = p - o.rate * moved;
        // Every operation rounds once, to at most the sum of the terms' sizes.
        const double of_moved = std::fabs(kept) + std::fabs(o.c1 * a) + std::fabs(o.c2 * b) +
                                std::fabs(o.weight_decay * p);
        const double terms = std::fabs(p) + o.rate * of_moved;
        if (momentum) EXPECT_NEAR(v.get(i), moved, 8 * arithmetic * of_moved);
        EXPECT_NEAR(x.get(i), expected, 8 * arithmetic * terms + x.epsilon() * std::fabs(expected) + x.tiny());
        sq_norm1 += a * a;
        sq_norm2 += b * b;
        inner += a * b;
        magnitude += std::fabs(a * b);
        weight_sq_norm += p * p;
    }
    // Sums of up to 4096 terms in the arithmetic's precision, spread over at least two lanes.
    const double relative = 2048 * arithmetic;
    EXPECT_NEAR(stats[svag::kSqNorm1], sq_norm1, relative * sq_norm1);
    EXPECT_NEAR(stats[svag::kSqNorm2], sq_norm2, relative * sq_norm2);
    EXPECT_NEAR(stats[svag::kInner], inner, relative * magnitude);
    EXPECT_NEAR(stats[svag::kWeightSqNorm], weight_sq_norm, relative * weight_sq_norm);
    EXPECT(stats[svag::kFinite] == 1);
    EXPECT(x.guard_is_intact());
    EXPECT(v.guard_is_intact());
    EXPECT(momentum || v == v_before);
}

}  // namespace

SVAG_CHECK(step_follows_the_formula) {
    for (const Pair dtypes : kPairs)
        for (const int64_t n : {0, 1, 3, 8, 31, 33, 4097}) {
            compare_with_the_formula(dtypes, n, options(0.3, 4, 0.05), true);
            compare_with_the_formula(dtypes, n, options(0.3, 1, 0.05), true);
            compare_with_the_formula(dtypes, n, options(0.3, 1, 0), false);
        }
    compare_with_the_formula(kPairs[0], 65536 + 5, options(0.1, 65536, 0.01), true);
}

SVAG_CHECK(step_with_momentum_follows_the_formula) {
    auto one = options(0.3, 1, 0.05), several = options(0.3, 4, 0.05);
    one.momentum = several.momentum = {0.9, 0.8};
    for (const Pair dtypes : kPairs)
        for (const int64_t n : {0, 1, 8, 33, 4097}) {
            compare_with_the_formula(dtypes, n, several, true, true);
            compare_with_the_formula(dtypes, n, one, false, true);
        }
}

// No step is taken: all that the kernel does is to widen and to narrow again.
SVAG_CHECK(step_keeps_every_half_precision_number) {
    for (const DType dtype : {DType::float16, DType::bfloat16}) {
        Tensor x(dtype, 65536), g(dtype, 65536);
        for (int64_t i = 0; i < 65536; ++i) {
            x.set_bits(i, static_cast<uint16_t>(i));
            g.set(i, 0);
            if (!std::isfinite(x.get(i))) x.set(i, 1);
        }
        const Tensor before = x;
        double stats[svag::kStatCount];
        EXPECT(step(describe(x, g, nullptr), options(0, 1, 0), stats) == svag::kOk);
        EXPECT(x == before);
    }
}

// x = 0 and rate = -1: the result is the gradient, rounded to the param's dtype to nearest, ties to even.
SVAG_CHECK(step_rounds_to_nearest_even) {
    constexpr int64_t n = 60000;
    for (const DType dtype : {DType::float16, DType::bfloat16}) {
        Tensor x(dtype, n), g(DType::float32, n);
        selftest::Random random(7);
        for (int64_t i = 0; i < n; ++i) {
            x.set(i, 0);
            // Any float16's or bfloat16's neighbourhood: midpoints between two of them, and just beside those.
            Tensor any(dtype, 1);
            any.set_bits(0, static_cast<uint16_t>(random.bits() >> 20));
            const double value = std::isfinite(any.get(0)) ? any.get(0) : 65519.0;
            const double middle = value * (1 + any.epsilon());
            const double steps[] = {0, 1, -1, 0.3};
            g.set(i, middle * (1 + steps[random.bits() % 4] * 0x1p-23));
        }
        double stats[svag::kStatCount];
        svag::StepOptions o = options(1, 1, 0);
        o.rate = -1;
        EXPECT(step(describe(x, g, nullptr), o, stats) == svag::kOk);
        for (int64_t i = 0; i < n; ++i) {
            Tensor expected(dtype, 1);
            expected.set(0, g.get(i));
            EXPECT_NEAR(x.get(i) == expected.get(0), 1, 0);
        }
    }
}

SVAG_CHECK(step_gives_the_same_bits_for_any_thread_count) {
    const int64_t sizes[] = {200001, 0, 7, 65536, 70003};
    std::vector<Tensor> params, firsts, seconds;
    for (const int64_t n : sizes) {
        params.push_back(Tensor::random(DType::float32, n, 11));
        firsts.push_back(Tensor::random(DType::float32, n, 12));
        seconds.push_back(Tensor::random(DType::float32, n, 13));
    }
    double reference[svag::kStatCount];
    std::vector<Tensor> expected;
    for (const int threads : {1, 2, 5}) {
        std::vector<Tensor> x = params;
        std::vector<svag::StepTensor> list;
        for (size_t t = 0; t < x.size(); ++t) list.push_back(describe(x[t], firsts[t], &seconds[t]));
        double stats[svag::kStatCount];
        const auto o = options(0.1, 8, 0.01, threads);
        EXPECT(SVAG_KERNEL(svag_step)(list.data(), static_cast<int64_t>(list.size()), &o, 1, stats) == svag::kOk);
        if (threads == 1) {
            std::memcpy(reference, stats, sizeof stats);
            expected = x;
        }
        EXPECT(std::memcmp(reference, stats, sizeof stats) == 0);
        EXPECT(x == expected);
    }
}

// Replicas in one list against each alone: bits of params, buffers and statistics, whatever the others hold.
SVAG_CHECK(step_of_segments_is_each_segment_alone_to_the_bit) {
    constexpr int kSegments = 3;
    for (const Pair& dtypes : kPairs)
        for (const int threads : {1, 3})
            for (const bool skip : {false, true}) {
                const int64_t large = &dtypes == kPairs ? 70003 : 1025;  // several chunks of a segment
                const int64_t sizes[] = {1, 0, 31, large, 17};
                std::vector<svag::StepOptions> options_of;
                for (const double l : {1.0, 65536.0, 4.0}) {
                    options_of.push_back(options(0.3 / l, l, 0.05 * l, threads));
                    options_of.back().skip_nonfinite = skip;
                    options_of.back().momentum = {1 - 0.1 / l, 1 - 0.2 / l};
                }
                std::vector<Tensor> x, g1, g2, v;
                for (const int64_t n : sizes) {
                    x.push_back(Tensor::random(dtypes.param, kSegments * n, 1));
                    g1.push_back(Tensor::random(dtypes.grad, kSegments * n, 2));
                    g2.push_back(Tensor::random(dtypes.grad, kSegments * n, 3));
                    v.push_back(Tensor::random(wide(dtypes.param), kSegments * n, 4));
                }
                g2[3].set(large + 5, std::nan(""));  // in the middle one
                const std::vector<Tensor> before = x, v_before = v;
                std::vector<svag::StepTensor> list;
                for (size_t t = 0; t < x.size(); ++t) list.push_back(describe(x[t], g1[t], &g2[t], nullptr, &v[t]));
                double stats[kSegments * svag::kStatCount];
                EXPECT(SVAG_KERNEL(svag_step)(list.data(), static_cast<int64_t>(list.size()), options_of.data(), kSegments,
                                              stats) == svag::kOk);
                for (int64_t s = 0; s < kSegments; ++s) {
                    std::vector<Tensor> own[4];
                    for (size_t t = 0; t < x.size(); ++t) {
                        const Tensor* whole[] = {&before[t], &g1[t], &g2[t], &v_before[t]};
                        for (int k = 0; k < 4; ++k) {
                            own[k].emplace_back(whole[k]->dtype(), sizes[t]);
                            for (int64_t i = 0; i < sizes[t]; ++i) own[k][t].set(i, whole[k]->get(s * sizes[t] + i));
                        }
                    }
                    std::vector<svag::StepTensor> alone;
                    for (size_t t = 0; t < x.size(); ++t)
                        alone.push_back(describe(own[0][t], own[1][t], &own[2][t], nullptr, &own[3][t]));
                    double expected[svag::kStatCount];
                    const auto& o = options_of[static_cast<size_t>(s)];
                    EXPECT(SVAG_KERNEL(svag_step)(alone.data(), static_cast<int64_t>(alone.size()), &o, 1, expected) ==
                           svag::kOk);
                    EXPECT(stats[s * svag::kStatCount + svag::kFinite] == (s == 1 ? 0 : 1));
                    EXPECT(std::memcmp(expected, stats + s * svag::kStatCount, sizeof expected) == 0);
                    for (size_t t = 0; t < x.size(); ++t)
                        for (int64_t i = 0; i < sizes[t]; ++i) {
                            const double pairs[][2] = {{x[t].get(s * sizes[t] + i), own[0][t].get(i)},
                                                       {v[t].get(s * sizes[t] + i), own[3][t].get(i)}};
                            for (const auto& [found, wanted] : pairs)
                                EXPECT(found == wanted || (std::isnan(found) && std::isnan(wanted)));
                        }
                }
                for (size_t t = 0; t < x.size(); ++t) EXPECT(x[t].guard_is_intact() && v[t].guard_is_intact());
                EXPECT(skip == (x[3].get(large + 5) == before[3].get(large + 5)));
            }
}

SVAG_CHECK(step_skips_when_a_gradient_is_not_finite) {
    for (const double bad : {kInf, -kInf, std::nan("")})
        for (const int64_t place : {0, 5000, 9999}) {
            Tensor x = Tensor::random(DType::float32, 10000, 1), g1 = Tensor::random(DType::float32, 10000, 2),
                   g2 = Tensor::random(DType::float32, 10000, 3), v = Tensor::random(DType::float32, 10000, 4);
            const Tensor before = x, v_before = v;
            g2.set(place, bad);
            auto o = options(0.1, 2, 0.1);
            o.skip_nonfinite = true;
            double stats[svag::kStatCount];
            EXPECT(step(describe(x, g1, &g2, nullptr, &v), o, stats) == svag::kOk);
            EXPECT(stats[svag::kFinite] == 0);
            EXPECT(x == before && v == v_before);
            g2.set(place, 0);
            EXPECT(step(describe(x, g1, &g2, nullptr, &v), o, stats) == svag::kOk);
            EXPECT(stats[svag::kFinite] == 1);
            EXPECT(!(x == before) && !(v == v_before));
        }
}

SVAG_CHECK(step_at_l_1_keeps_an_inf_of_the_second_gradient_out) {
    Tensor x = Tensor::random(DType::float32, 100, 1), g1 = Tensor::random(DType::float32, 100, 2),
           g2 = Tensor::random(DType::float32, 100, 3);
    const Tensor before = x;
    g2.set(50, kInf);
    double stats[svag::kStatCount];
    EXPECT(step(describe(x, g1, &g2), options(0.1, 1, 0.1), stats) == svag::kOk);
    EXPECT(stats[svag::kFinite] == 0);
    for (int64_t i = 0; i < 100; ++i)
        EXPECT_NEAR(x.get(i), before.get(i) - 0.1 * (g1.get(i) + 0.1 * before.get(i)), 0x1p-22);
}

SVAG_CHECK(step_sums_squares_beyond_the_range_of_float32) {
    Tensor x = Tensor::random(DType::float32, 37, 1), g(DType::float32, 37);
    for (int64_t i = 0; i < 37; ++i) g.set(i, 0x1p70);
    double stats[svag::kStatCount];
    EXPECT(step(describe(x, g, &g), options(0, 1, 0), stats) == svag::kOk);
    for (const int k : {svag::kSqNorm1, svag::kSqNorm2, svag::kInner}) EXPECT(stats[k] == 37 * 0x1p140);
    EXPECT(stats[svag::kFinite] == 1);
}

// Each step takes less than half an ulp of x: without compensation x would never move.
SVAG_CHECK(step_compensates_rounding) {
    constexpr int kSteps = 20000;
    const double weight_decay = 1e-3, lr = 0.01;
    for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
        Tensor x(dtype, 19), g(dtype, 19), e(DType::float32, 19);
        for (int64_t i = 0; i < 19; ++i) {
            x.set(i, 1 + 0.125 * static_cast<double>(i));
            g.set(i, 0);
            e.set(i, 0);
        }
        const Tensor before = x;
        const auto o = options(lr, 1, weight_decay);
        double stats[svag::kStatCount];
        for (int k = 0; k < kSteps; ++k) EXPECT(step(describe(x, g, nullptr, &e), o, stats) == svag::kOk);
        const double factor = std::pow(1 - lr * weight_decay, kSteps);
        for (int64_t i = 0; i < 19; ++i)
            EXPECT_NEAR(x.get(i), before.get(i) * factor, 2 * x.epsilon() * before.get(i));
        EXPECT(e.guard_is_intact());
    }
}

SVAG_CHECK(step_refuses_what_it_was_not_built_for) {
    Tensor x(DType::float32, 4), g(DType::float16, 4);
    double stats[svag::kStatCount];
    EXPECT(step(describe(x, g, nullptr), options(0.1, 1, 0), stats) == svag::kUnsupportedDType);
}
