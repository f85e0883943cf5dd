#include "cpu/simd_level.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace svag {
namespace {

SimdLevel& current() {
    static SimdLevel level = best_simd_level();
    return level;
}

#if defined(__x86_64__)
// By cpuid: before clang 19 __builtin_cpu_supports does not know this one.
bool has_f16c() {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

}  // namespace

SimdLevel best_simd_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
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

void select_simd_level_from_environment() {
    const char* wanted = std::getenv("SVAG_FAST_SIMD");
    if (wanted == nullptr || *wanted == '\0' || select_simd_level(wanted)) return;
    std::string runs;
    for (int i = 0; i <= static_cast<int>(best_simd_level()); ++i) {
        if (i > 0) runs += ", ";
        runs += simd_level_name(static_cast<SimdLevel>(i));
    }
    throw std::runtime_error("SVAG_FAST_SIMD=" + std::string(wanted) + ": this machine runs " + runs);
}

}  // namespace svag
