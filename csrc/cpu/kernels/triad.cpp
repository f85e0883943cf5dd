#include "cpu/triad.h"

#include "cpu/simd.h"
#include "cpu/thread_pool.h"

namespace svag {
namespace SVAG_SIMD {
namespace {

constexpr int64_t kChunk = 65536;  // the fused step's own

struct Streams {
    float* x;
    const float *y, *z;
    int64_t size;
};

void run_chunk(void* context, int64_t chunk) {
    const Streams& s = *static_cast<const Streams*>(context);
    const int64_t begin = chunk * kChunk;
    const int64_t end = s.size - begin < kChunk ? s.size : begin + kChunk;
    for (int64_t i = begin; i < end; ++i) s.x[i] += 1e-9f * (s.y[i] + s.z[i]);
}

}  // namespace
}  // namespace SVAG_SIMD
}  // namespace svag

extern "C" int SVAG_ENTRY(svag_triad)(float* x, const float* y, const float* z, int64_t size, int threads) {
    namespace here = svag::SVAG_SIMD;
    here::Streams streams{x, y, z, size};
    svag::parallel_chunks((size + here::kChunk - 1) / here::kChunk, threads, here::run_chunk, &streams);
    return svag::kOk;
}
