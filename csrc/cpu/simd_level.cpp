#include "cpu/simd_level.h"

#include <cstring>

namespace svag {
namespace {

SimdLevel& current() {
    static SimdLevel level = best_simd_level();
    return level;
}

}  // namespace

SimdLevel best_simd_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512) return SimdLevel::avx512;
    if (avx2) return SimdLevel::avx2;
#endif
    return SimdLevel::portable;
}

SimdLevel simd_level() { return current(); }

const char* simd_level_name(SimdLevel level) {
    switch (level) {
        case SimdLevel::avx512: return "avx512";
        case SimdLevel::avx2: return "avx2";
        default: return "portable";
    }
}

bool select_simd_level(const char* name) {
    for (int i = 0; i <= static_cast<int>(best_simd_level()); ++i) {
        const auto level = static_cast<SimdLevel>(i);
        if (std::strcmp(name, simd_level_name(level)) == 0) {
            current() = level;
            return true;
        }
    }
    return false;
}

}  // namespace svag
