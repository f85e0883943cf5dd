// Independent N(0, 1) numbers by counter: which they are depends on (key, element, draw) alone, not on the order or the
// thread in which they are made. svag_fast/ops/philox_normal.py says which counter makes which number.
#pragma once

#include <cstdint>

#include "cpu/simd_level.h"
#include "tensor_list.h"

namespace svag {

// Elements of one group share a block of counters: 16 counters, four float32 or two float64 numbers each.
constexpr int64_t kNormalCounters = 16;

struct NormalStream {
    uint32_t key[2];
    uint64_t draw;  // draws of one stream are independent
};

}  // namespace svag

// out: `size` float32 or float64 numbers, of elements [first, first + size); `first` is a multiple of 64.
SVAG_DECLARE_KERNEL(svag_philox_normal, (void* out, bool is_double, int64_t size, int64_t first,
                                         const svag::NormalStream& stream))
