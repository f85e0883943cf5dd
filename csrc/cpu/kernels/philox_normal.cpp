#include "cpu/philox_normal.h"

#include "cpu/normal_group.h"

namespace svag {
namespace SVAG_SIMD {
namespace {

template <class A>
void fill(A* out, int64_t size, int64_t first, const NormalStream& stream) {
    constexpr int64_t tile = kTile * kGroup<A>;
    const RoundKeys keys(stream.key);
    for (int64_t i = 0; i < size; i += tile) {
        const auto counter = static_cast<uint32_t>((first + i) / kGroup<A> * kNormalCounters);
        if (size - i >= tile) {
            fill_groups(out + i, kTile, counter, stream.draw, keys);
        } else {
            A rest[tile];
            fill_groups(rest, (size - i + kGroup<A> - 1) / kGroup<A>, counter, stream.draw, keys);
            std::memcpy(out + i, rest, static_cast<size_t>(size - i) * sizeof(A));
        }
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
