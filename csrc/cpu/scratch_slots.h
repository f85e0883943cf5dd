// Hands each running chunk of a kernel a scratch slot of its own: at most as many run at once as there are threads.
#pragma once

#include <cstdint>
#include <cstring>

#include "svag_math.h"

namespace svag {

class ScratchSlots {
  public:
    ScratchSlots() = default;
    // `busy`: one byte a slot.
    SVAG_INLINE ScratchSlots(char* busy, int64_t count) : busy_(busy), count_(count) {
        std::memset(busy, 0, static_cast<size_t>(count));
    }

    SVAG_INLINE int64_t take() {
        for (int64_t i = 0;; i = (i + 1) % count_)
            if (!__atomic_test_and_set(busy_ + i, __ATOMIC_ACQUIRE)) return i;
    }
    SVAG_INLINE void free(int64_t slot) { __atomic_clear(busy_ + slot, __ATOMIC_RELEASE); }

  private:
    char* busy_ = nullptr;
    int64_t count_ = 1;
};

}  // namespace svag
