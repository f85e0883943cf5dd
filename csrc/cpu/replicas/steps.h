// Sampling, and steps of one replica.
// Included by cpu/kernels/replicas.cpp alone, which is compiled once a SIMD level.
#pragma once

#include "cpu/replicas/loss.h"
#include "cpu/replicas/packing.h"
#include "tensor_list.h"

namespace svag {
namespace SVAG_SIMD {
namespace {

// Philox4x32-10 of one counter (Salmon, Moraes, Dror, Shaw, SC 2011).
SVAG_INLINE void philox_words(uint32_t c[4], uint64_t seed) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
        const uint64_t p0 = uint64_t{c[0]} * 0xD2511F53u, p1 = uint64_t{c[2]} * 0xCD9E8D57u;
        const uint32_t a = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ key0;
        const uint32_t b = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ key1;
        c[0] = a;
        c[1] = static_cast<uint32_t>(p1);
        c[2] = b;
        c[3] = static_cast<uint32_t>(p0);
    }
}

// Samples [begin, end) of batch 1 or 2 of a step: svag_fast/replicas/sampling.py says the same in PyTorch.
SVAG_INLINE void draw(uint64_t seed, int64_t step, uint32_t batch, int64_t begin, int64_t end, int64_t population,
                      int64_t* indices) {
    for (int64_t pair = begin / 2; 2 * pair < end; ++pair) {
        uint32_t c[4] = {static_cast<uint32_t>(pair), static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32),
                         batch};
        philox_words(c, seed);
        for (int64_t i = 0; i < 2; ++i) {
            const uint64_t word = c[2 * i] | uint64_t{c[2 * i + 1]} << 32;
            const int64_t at = 2 * pair + i;
            if (at >= begin && at < end)
                indices[at - begin] = static_cast<int64_t>((static_cast<__uint128_t>(word) *
                                                            static_cast<uint64_t>(population)) >> 64);
        }
    }
}

// The sum of a[i] b[i], whole vectors: in float32 over a block, in float64 over the blocks.
SVAG_INLINE double inner_product(const float* a, const float* b, int64_t n) {
    constexpr int64_t block = 64 * W;
    double total = 0;
    for (int64_t first = 0; first < n; first += block) {
        const int64_t end = first + block < n ? first + block : n;
        VFloat sums[2] = {};
        int64_t i = first;
        for (; i + 2 * W <= end; i += 2 * W) {
            sums[0] += load(a + i) * load(b + i);
            sums[1] += load(a + i + W) * load(b + i + W);
        }
        if (i < end) sums[0] += load(a + i) * load(b + i);
        total += lane_sum(sums[0] + sums[1]);
    }
    return total;
}

SVAG_INLINE bool all_finite(const float* a, int64_t n) {
    VFloat poison{};
    for (int64_t i = 0; i < n; i += W) poison += load(a + i) * 0.0f;
    return fold(poison) == 0.0f;
}

// Weights are looked at after every so many steps, and at the caller's last.
constexpr int64_t kLookEvery = 32;

class Replica {
  public:
    SVAG_INLINE Replica(const Walk& walk, Run& run, float* scratch)
        : walk_(walk), net_(*walk.net), run_(run), s_(scratch), w_(scratch + net_.weights_at) {
        pack(net_, run, w_);
    }

    SVAG_INLINE void advance() {
        int64_t rate = 0;
        while (!run_.diverged && run_.step < run_.to_step) {
            while (rate + 1 < run_.rate_count && run_.rate_from[rate + 1] <= run_.step) ++rate;
            if (!step(run_.rates[rate] / run_.l)) {
                run_.diverged = true;
                break;
            }
            ++run_.step;
            if (run_.step % kLookEvery == 0 || run_.step == run_.last_step)
                run_.diverged = !all_finite(w_, net_.trained);
        }
        unpack(net_, w_, run_.weights);
    }

    SVAG_INLINE double evaluate(int64_t* right) {
        double loss = 0;
        *right = 0;
        for (int64_t first = 0; first < walk_.data.count; first += net_.samples) {
            const int64_t end = first + net_.samples < walk_.data.count ? first + net_.samples : walk_.data.count;
            for (int64_t i = first; i < end; ++i) fetch(net_, walk_.data, s_, i - first, i);
            forward(net_, s_, end - first);
            for (int64_t i = first; i < end; ++i) {
                loss += sample_loss(net_, walk_.data, s_, nullptr, i - first, i, 0);
                if (!net_.squared_error)
                    *right += is_right(s_ + net_.output_at + (i - first) * net_.output.sample(), net_.output.channels,
                                       walk_.data.labels[i]);
            }
        }
        return loss / static_cast<double>(walk_.data.count);
    }

    SVAG_INLINE void gradient(const int64_t* indices, int64_t size, float* grad) {
        float* packed = s_ + net_.grad1_at;
        for (int64_t first = 0; first < size; first += net_.samples) {
            const int64_t end = first + net_.samples < size ? first + net_.samples : size;
            double losses[2] = {};
            const float weights[2] = {1.0f / static_cast<float>(size), 0};
            chunk(indices + first, end - first, end - first, weights, losses);
            backward(net_, s_, end - first, {packed, {first > 0 ? Finish::add : Finish::write, 0, 0, nullptr}});
        }
        unpack(net_, packed, grad);
    }

  private:
    // Forward, losses and what they send back; the first `in_first` samples belong to batch 1.
    SVAG_INLINE void chunk(const int64_t* indices, int64_t n, int64_t in_first, const float* weights, double* losses) {
        for (int64_t i = 0; i < n; ++i) fetch(net_, walk_.data, s_, i, indices[i]);
        forward(net_, s_, n);
        for (int64_t i = 0; i < n; ++i) {
            const int batch = i >= in_first;
            losses[batch] += sample_loss(net_, walk_.data, s_, s_ + net_.output_grad_at, i, indices[i], weights[batch]);
        }
    }

    // Returns false where a loss isn't finite: then nothing has changed.
    SVAG_INLINE bool step(double exact_rate) {
        const int64_t B = run_.batch_size, t = run_.step;
        const bool measured = walk_.measure_every > 0 && t % walk_.measure_every == 0;
        const bool amplified = run_.c2 != 0;
        const int64_t n = measured || amplified ? 2 * B : B;
        const bool at_once = !measured && n <= net_.samples;
        const double c1 = measured ? 1 : run_.c1, c2 = measured ? 1 : run_.c2, size = static_cast<double>(B);
        const float weights[2] = {static_cast<float>(c1 / size), static_cast<float>(c2 / size)};
        const Epilogue by_step{Finish::step, static_cast<float>(exact_rate), static_cast<float>(run_.weight_decay),
                               nullptr};
        float *grad1 = s_ + net_.grad1_at, *grad2 = s_ + net_.grad2_at;
        double losses[2] = {};
        int64_t indices[kMostSamples];
        for (int64_t first = 0, end; first < n; first = end) {
            end = first + net_.samples < n ? first + net_.samples : n;
            if (measured && first < B && end > B) end = B;  // whose gradients are kept apart
            const int64_t in_first = first >= B ? 0 : (end < B ? end : B) - first;
            if (in_first > 0) draw(run_.seed, t, 1, first, first + in_first, walk_.data.count, indices);
            if (first + in_first < end)
                draw(run_.seed, t, 2, first + in_first - B, end - B, walk_.data.count, indices + in_first);
            chunk(indices, end - first, in_first, weights, losses);
            if (!__builtin_isfinite(losses[0] + losses[1])) return false;
            const bool fresh = first == 0 || (measured && first == B);
            const Epilogue to_grad{fresh ? Finish::write : Finish::add, 0, 0, nullptr};
            const Target target = at_once ? Target{w_, by_step} : Target{measured && first >= B ? grad2 : grad1, to_grad};
            backward(net_, s_, end - first, target);
        }
        run_.sums[kRunLoss1] += losses[0] / size;
        run_.sums[kRunSteps1] += 1;
        if (n > B) {
            run_.sums[kRunLoss2] += losses[1] / size;
            run_.sums[kRunSteps2] += 1;
        }
        if (measured) measure(grad1, grad2);
        if (at_once) return true;
        const auto first = static_cast<float>(run_.c1), second = static_cast<float>(run_.c2);
        const bool combined = measured && amplified;
        for (int64_t i = 0; i < net_.trained; i += W) {
            const VFloat g = combined ? first * load(grad1 + i) + second * load(grad2 + i) : load(grad1 + i);
            store(w_ + i, stepped(load(w_ + i), g, by_step));
        }
        return true;
    }

    SVAG_INLINE void measure(const float* grad1, const float* grad2) {
        run_.sums[kRunSqNorm1] += inner_product(grad1, grad1, net_.trained);
        run_.sums[kRunSqNorm2] += inner_product(grad2, grad2, net_.trained);
        run_.sums[kRunInner] += inner_product(grad1, grad2, net_.trained);
        run_.sums[kRunWeightSqNorm] += inner_product(w_, w_, net_.trained);
        run_.sums[kRunMeasured] += 1;
    }

    const Walk& walk_;
    const NetView& net_;
    Run& run_;
    float *s_, *w_;
};

}  // namespace
}  // namespace SVAG_SIMD
}  // namespace svag
