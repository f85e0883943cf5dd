#include "cpu/replicas/runs.h"

#include "cpu/replicas/steps.h"
#include "cpu/scratch_slots.h"
#include "cpu/thread_pool.h"

namespace svag {
namespace SVAG_SIMD {
namespace {

struct Call {
    const Walk& walk;
    ScratchSlots slots;
    double* losses;
    int64_t* right;
    const int64_t* indices;
    int64_t size;
    float* grads;
    int64_t parameters;

    explicit Call(const Walk& w) : walk(w), slots(w.slots, w.threads) {}

    // Run body(replica, its place) for every replica, a thread a replica.
    template <class Body>
    int each(const Body& body) {
        struct Context {
            Call& call;
            const Body& body;
        } context{*this, body};
        const auto one = [](void* data, int64_t i) {
            auto& [call, body] = *static_cast<Context*>(data);
            const int64_t place = call.walk.order[i], slot = call.slots.take();
            float* scratch = call.walk.scratch + slot * call.walk.net->scratch;
            Run& run = call.walk.runs[place];
            body(Replica(call.walk, run, scratch), place);
            // No nan stays behind in what is only ever zero.
            if (run.diverged) std::memset(scratch, 0, static_cast<size_t>(call.walk.net->scratch) * sizeof(float));
            call.slots.free(slot);
        };
        parallel_chunks(walk.count, walk.threads, one, &context);
        return kOk;
    }
};

}  // namespace
}  // namespace SVAG_SIMD
}  // namespace svag

using Here = svag::SVAG_SIMD::Replica;

extern "C" int SVAG_ENTRY(svag_replicas_advance)(const svag::Walk& walk) {
    return svag::SVAG_SIMD::Call(walk).each([](Here replica, int64_t) { replica.advance(); });
}

extern "C" int SVAG_ENTRY(svag_replicas_evaluate)(const svag::Walk& walk, double* losses, int64_t* right) {
    return svag::SVAG_SIMD::Call(walk).each(
        [=](Here replica, int64_t place) { losses[place] = replica.evaluate(right + place); });
}

extern "C" int SVAG_ENTRY(svag_replicas_gradient)(const svag::Walk& walk, const int64_t* indices, int64_t size,
                                                  float* grads, int64_t parameters) {
    return svag::SVAG_SIMD::Call(walk).each([=](Here replica, int64_t place) {
        replica.gradient(indices, size, grads + place * parameters);
    });
}
