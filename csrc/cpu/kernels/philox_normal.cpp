#include "cpu/philox_normal.h"

#include "cpu/normal_group.h"

namespace svag {
namespace SVAG_SIMD {
namespace {

template <class A>
void fill(A* out, int64_t size, int64_t first, const NormalStream& stream) {
    using V = typename Simd<A>::V;
    constexpr int64_t group = Normals<A>::group;
    const RoundKeys keys(stream.key);
    A buffer[group];
    for (int64_t i = 0; i < size; i += group) {
        const bool whole = size - i >= group;
        A* to = whole ? out + i : buffer;
        const auto counter = static_cast<uint32_t>((first + i) / group * kNormalCounters);
        for (int lane = 0; lane < kNormalCounters; lane += Simd<A>::width) {
            V z[Normals<A>::per_counter];
            Normals<A>::draw(counter + lane, stream.draw, keys, z);
            for (int j = 0; j < Normals<A>::per_counter; ++j)
                std::memcpy(to + j * kNormalCounters + lane, &z[j], sizeof z[j]);
        }
        if (!whole) std::memcpy(out + i, buffer, static_cast<size_t>(size - i) * sizeof(A));
    }
}

}  // namespace
}  // namespace SVAG_SIMD
}  // namespace svag

extern "C" int SVAG_ENTRY(svag_philox_normal)(void* out, bool is_double, int64_t size, int64_t first,
                                              const svag::NormalStream& stream) {
    namespace here = svag::SVAG_SIMD;
    if (is_double)
        here::fill(static_cast<double*>(out), size, first, stream);
    else
        here::fill(static_cast<float*>(out), size, first, stream);
    return svag::kOk;
}
