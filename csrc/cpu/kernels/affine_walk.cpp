#include "cpu/affine_walk.h"

#include "cpu/normal_group.h"
#include "cpu/thread_pool.h"

namespace svag {
namespace SVAG_SIMD {
namespace {

// Trajectories that one thread takes at a time.
constexpr int64_t kChunk = 2048;

// All steps of the trajectories at x, `groups` <= kTile groups of them, which stay in the first level of cache.
template <class A>
void walk_groups(A* x, int64_t groups, uint32_t counter, const AffineWalk& walk, const RoundKeys& keys) {
    using V = typename Simd<A>::V;
    // A single weight goes into the noise's coefficients.
    const double scale = walk.weight_count == 1 ? walk.weights[0] : 1;
    const A keep = A(walk.keep), shift = A(walk.shift), slope = A(walk.slope * scale), spread = A(walk.spread * scale);
    const int64_t size = groups * kGroup<A>;
    A noise[kTile * kGroup<A>], more[kTile * kGroup<A>];
    uint64_t draw = walk.stream.draw;
    for (int64_t step = 0; step < walk.steps; ++step) {
        fill_groups(noise, groups, counter, draw++, keys);
        for (int64_t w = 1; w < walk.weight_count; ++w) {
            fill_groups(more, groups, counter, draw++, keys);
            const A first = w == 1 ? A(walk.weights[0]) : A(1), weight = A(walk.weights[w]);
            for (int64_t i = 0; i < size; ++i) noise[i] = first * noise[i] + weight * more[i];
        }
        for (int64_t i = 0; i < size; i += Simd<A>::width) {
            const V at = load_raw<V>(x + i);
            const V moved = (keep * at + shift) + (slope * at + spread) * load_raw<V>(noise + i);
            std::memcpy(x + i, &moved, sizeof moved);
        }
    }
}

template <class A>
void walk_chunk(void* context, int64_t chunk) {
    const AffineWalk& walk = *static_cast<const AffineWalk*>(context);
    constexpr int64_t tile = kTile * kGroup<A>;
    const RoundKeys keys(walk.stream.key);
    const int64_t end = walk.size - chunk * kChunk < kChunk ? walk.size : (chunk + 1) * kChunk;
    for (int64_t i = chunk * kChunk; i < end; i += tile) {
        A* x = static_cast<A*>(walk.x) + i;
        const auto counter = static_cast<uint32_t>(i / kGroup<A> * kNormalCounters);
        if (end - i >= tile) {
            walk_groups(x, kTile, counter, walk, keys);
        } else {
            A rest[tile] = {};
            std::memcpy(rest, x, static_cast<size_t>(end - i) * sizeof(A));
            walk_groups(rest, (end - i + kGroup<A> - 1) / kGroup<A>, counter, walk, keys);
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
