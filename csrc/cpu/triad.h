// x += 1e-9 (y + z): three streams read and one written, the memory traffic of the fused step and nothing else.
// The benches hold the step against it: the floor that the machine's memory sets.
#pragma once

#include <cstdint>

#include "cpu/simd_level.h"

SVAG_DECLARE_KERNEL(svag_triad, (float* x, const float* y, const float* z, int64_t size, int threads))
