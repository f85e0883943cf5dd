#include "cpu/affine_walk.h"

#include "cpu/normal_group.h"
#include "cpu/thread_pool.h"

namespace svag {
namespace SVAG_SIMD {
namespace {

// Trajectories that one thread takes at a time.
constexpr int64_t kChunk = 2048;

// All steps of the group at x, its trajectories in registers.
template <class A>
void walk_group(A* x, int64_t first, const AffineWalk& walk, const RoundKeys& keys) {
    using V = typename Simd<A>::V;
    constexpr int count = Normals<A>::per_counter;
    const A keep = A(walk.keep), shift = A(walk.shift), slope = A(walk.slope), spread = A(walk.spread);
    const auto counter = static_cast<uint32_t>(first / Normals<A>::group * kNormalCounters);
    for (int lane = 0; lane < kNormalCounters; lane += Simd<A>::width) {
        V state[count];
        for (int j = 0; j < count; ++j) state[j] = load_raw<V>(x + j * kNormalCounters + lane);
        uint64_t draw = walk.stream.draw;
        for (int64_t step = 0; step < walk.steps; ++step) {
            V noise[count];
            Normals<A>::draw(counter + lane, draw++, keys, noise);
            for (int j = 0; j < count; ++j) noise[j] *= A(walk.weights[0]);
            for (int64_t w = 1; w < walk.weight_count; ++w) {
                V more[count];
                Normals<A>::draw(counter + lane, draw++, keys, more);
                for (int j = 0; j < count; ++j) noise[j] += A(walk.weights[w]) * more[j];
            }
            for (int j = 0; j < count; ++j)
                state[j] = (keep * state[j] + shift) + (slope * state[j] + spread) * noise[j];
        }
        for (int j = 0; j < count; ++j) std::memcpy(x + j * kNormalCounters + lane, &state[j], sizeof state[j]);
    }
}

template <class A>
void walk_chunk(void* context, int64_t chunk) {
    const AffineWalk& walk = *static_cast<const AffineWalk*>(context);
    constexpr int64_t group = Normals<A>::group;
    const RoundKeys keys(walk.stream.key);
    const int64_t end = walk.size - chunk * kChunk < kChunk ? walk.size : (chunk + 1) * kChunk;
    for (int64_t i = chunk * kChunk; i < end; i += group) {
        A* x = static_cast<A*>(walk.x) + i;
        if (end - i >= group) {
            walk_group(x, i, walk, keys);
        } else {
            A rest[group] = {};
            std::memcpy(rest, x, static_cast<size_t>(end - i) * sizeof(A));
            walk_group(rest, i, walk, keys);
            std::memcpy(x, rest, static_cast<size_t>(end - i) * sizeof(A));
        }
    }
}

}  // namespace
}  // namespace SVAG_SIMD
}  // namespace svag

extern "C" int SVAG_ENTRY(svag_affine_walk)(const svag::AffineWalk& walk) {
    namespace here = svag::SVAG_SIMD;
    svag::AffineWalk context = walk;
    svag::parallel_chunks((walk.size + here::kChunk - 1) / here::kChunk, walk.threads,
                          walk.is_double ? here::walk_chunk<double> : here::walk_chunk<float>, &context);
    return svag::kOk;
}
