// Which compiled copy of the CPU kernels runs: decided once, by the processor and by SVAG_FAST_SIMD.
#pragma once

namespace svag {

enum class SimdLevel { portable = 0, avx2 = 1, avx512 = 2 };

// The best level that this processor runs.
SimdLevel best_simd_level();

// The level in use: the best one, or what select_simd_level chose.
SimdLevel simd_level();

// Choose a level by name; returns false for an unknown name or one that this processor lacks.
bool select_simd_level(const char* name);

// Choose what SVAG_FAST_SIMD names; throws std::runtime_error, with what this processor runs, where it can't.
void select_simd_level_from_environment();

const char* simd_level_name(SimdLevel level);

}  // namespace svag

// A kernel file under cpu/kernels/ is compiled once a level and names its entry points SVAG_ENTRY(op).
// It instantiates no library template: a weak symbol built for AVX2 could otherwise serve the portable copy.
#define SVAG_PASTE2(a, b) a##_##b
#define SVAG_PASTE(a, b) SVAG_PASTE2(a, b)
#define SVAG_ENTRY(op) SVAG_PASTE(op, SVAG_SIMD)

// SVAG_DECLARE_KERNEL(op, (args)) declares every level's copy of `int op(args)`;
// SVAG_KERNEL(op) is the copy for the level in use.
#if defined(__x86_64__)
#define SVAG_DECLARE_KERNEL(op, args)  \
    extern "C" int op##_portable args; \
    extern "C" int op##_avx2 args;     \
    extern "C" int op##_avx512 args;
#define SVAG_KERNEL(op)                                            \
    (svag::simd_level() == svag::SimdLevel::avx512 ? op##_avx512   \
     : svag::simd_level() == svag::SimdLevel::avx2 ? op##_avx2     \
                                                   : op##_portable)
#else
#define SVAG_DECLARE_KERNEL(op, args) extern "C" int op##_portable args;
#define SVAG_KERNEL(op) op##_portable
#endif
