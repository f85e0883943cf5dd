// The memory of one kernel call: its pieces are reserved first, then allocated as one block, freed with this object.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "svag_math.h"

namespace svag {

class ScratchMemory {
  public:
    static constexpr int64_t kAlign = 64;  // bytes: a cache line, and the widest vector

    // Where `E`s will begin, in bytes. It is known before there is memory, so a kernel's pieces can be const.
    template <class E>
    struct Piece {
        int64_t begin;
    };

    ScratchMemory() = default;
    ScratchMemory(const ScratchMemory&) = delete;
    ScratchMemory& operator=(const ScratchMemory&) = delete;
    SVAG_INLINE ~ScratchMemory() { std::free(memory_); }

    template <class E>
    SVAG_INLINE Piece<E> reserve(int64_t count) {
        const Piece<E> piece{bytes_};
        bytes_ += padded<char>(count * static_cast<int64_t>(sizeof(E)));
        return piece;
    }

    // False where memory has run out.
    SVAG_INLINE bool allocate() {
        memory_ = static_cast<char*>(std::aligned_alloc(kAlign, static_cast<size_t>(bytes_)));
        return memory_ != nullptr;
    }

    template <class E>
    SVAG_INLINE E* at(Piece<E> piece) const {
        return reinterpret_cast<E*>(memory_ + piece.begin);
    }

    // The least number of elements, `count` or more, that fills whole lines: what follows is aligned too.
    template <class E>
    static SVAG_INLINE int64_t padded(int64_t count) {
        constexpr int64_t line = kAlign / static_cast<int64_t>(sizeof(E));
        static_assert(kAlign % sizeof(E) == 0, "");
        return (count + line - 1) / line * line;
    }

  private:
    int64_t bytes_ = 0;
    char* memory_ = nullptr;
};

}  // namespace svag
