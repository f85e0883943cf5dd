// Many small nets trained side by side, a thread a net, whole steps in one call.
#pragma once

#include <cstdint>

#include "cpu/replicas/net.h"
#include "cpu/simd_level.h"

namespace svag {

// Inputs are [count, height, width, channels]; labels for cross-entropy, else values [count, outputs].
struct Samples {
    const float* inputs;
    const int64_t* labels;
    const float* values;
    int64_t count;
};

enum RunSum : int {
    kRunLoss1, kRunLoss2,       // of each batch, summed over the steps that took it
    kRunSteps1, kRunSteps2,     // how many did
    kRunSqNorm1, kRunSqNorm2, kRunInner, kRunWeightSqNorm,  // summed over the measured steps
    kRunMeasured,
    kRunSums
};

// One replica. A step is x <- x - rate (c1 g1 + c2 g2 + weight_decay x), rate = lr / l.
struct Run {
    float* weights;       // its trained parameters, one after the other as PyTorch holds them
    const float* frozen;  // the others
    uint64_t seed;
    int64_t batch_size;
    double l, c1, c2, weight_decay;
    const int64_t* rate_from;  // [rates], ascending from 0: the step from which each learning rate holds
    const double* rates;
    int64_t rate_count;
    int64_t step, to_step;     // the step is moved on
    int64_t last_step;         // at which the weights are looked at, beside every 32nd
    double* sums;              // [kRunSums]
    bool diverged;             // set where a loss or a weight isn't finite: the step isn't taken
};

struct Walk {
    const NetView* net;
    Samples data;
    Run* runs;
    const int64_t* order;  // [count]: in which the runs are handed out
    int64_t count;
    int64_t measure_every;  // 0: never
    int threads;
    float* scratch;        // [threads, net->scratch], zeros at first, and handed over from call to call
    char* slots;           // [threads]
};

}  // namespace svag

// Each returns a svag::Status.
SVAG_DECLARE_KERNEL(svag_replicas_advance, (const svag::Walk& walk))
// losses: [count], the mean; right: [count], how many samples are classified rightly.
SVAG_DECLARE_KERNEL(svag_replicas_evaluate, (const svag::Walk& walk, double* losses, int64_t* right))
// grads: [count, parameters] of the mean loss over the samples.
SVAG_DECLARE_KERNEL(svag_replicas_gradient,
                    (const svag::Walk& walk, const int64_t* indices, int64_t size, float* grads, int64_t parameters))
