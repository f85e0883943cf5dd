// Brings one sample's channels into blocks with the channels of a pixel side by side, whatever the memory format.
#pragma once

#include <utility>

#include "cpu/kernels/weight_grad/tile.h"

namespace svag {
namespace SVAG_SIMD {
namespace {

template <class V, int... I>
SVAG_INLINE V shuffle(V a, V b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, I...);
#else
    using Indices = decltype(a < b);
    return __builtin_shuffle(a, b, Indices{I...});
#endif
}

// Swaps the off-diagonal blocks of size S of the matrix whose rows are r: log2(width) such steps transpose it.
template <class T, int S, int... I>
SVAG_INLINE void transpose_step(typename Simd<T>::V* r, std::integer_sequence<int, I...> lanes) {
    using V = typename Simd<T>::V;
    constexpr int W = Simd<T>::width;
    if constexpr (S < W) {
        for (int i = 0; i < W; ++i) {
            if (i & S) continue;
            const V a = r[i], b = r[i + S];
            r[i] = shuffle<V, ((I & S) ? W + I - S : I)...>(a, b);
            r[i + S] = shuffle<V, ((I & S) ? W + I : I + S)...>(a, b);
        }
        transpose_step<T, 2 * S>(r, lanes);
    }
}

// Where the channels of one block come from and where they are in the block.
template <class T>
struct PackBlock {
    const T* source;
    int64_t channel_stride, row_stride, column_stride;
    const T* source_end;  // nothing is read from here on
    int64_t channels;     // of this block, at most `pitch`
    int64_t pitch;        // elements from a pixel to the next
    int64_t height, width, left, right;  // left and right: columns of zeros
    T* target;  // height * (left + width + right) * pitch elements, and kSpill bytes that may be overwritten
};

// Bytes that a block's writer may spill behind it.
constexpr int64_t kSpill = kVectorBytes;
// Bytes behind all blocks that may be read: a tile's vectors at the last pixel.
constexpr int64_t kOverread = kMaxVectors * kVectorBytes;

template <class T>
SVAG_INLINE void pack_scalars(const PackBlock<T>& b, const T* source, T* target, int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i)
        for (int64_t c = 0; c < b.channels; ++c)
            target[i * b.pitch + c] = source[c * b.channel_stride + i * b.column_stride];
}

// One row, columns side by side in memory. A vector of channels is stored for each pixel: what it spills over the
// block's end is overwritten by the next pixel, so the last, partial vector of channels goes first.
template <class T>
SVAG_INLINE void pack_row_transposed(const PackBlock<T>& b, const T* source, T* target, int64_t width) {
    using V = typename Simd<T>::V;
    constexpr int W = Simd<T>::width;
    const int64_t whole = width / W * W;
    for (int64_t first = (b.channels - 1) / W * W; first >= 0; first -= W) {
        for (int64_t i = 0; i < whole; i += W) {
            V r[W];
            for (int c = 0; c < W; ++c) {
                const int64_t channel = first + c < b.channels ? first + c : b.channels - 1;
                r[c] = load_raw<V>(source + channel * b.channel_stride + i);
            }
            transpose_step<T, 1>(r, std::make_integer_sequence<int, W>{});
            for (int j = 0; j < W; ++j) std::memcpy(target + (i + j) * b.pitch + first, &r[j], sizeof r[j]);
        }
    }
    pack_scalars(b, source, target, whole, width);
}

// One row, channels side by side in memory.
template <class T>
SVAG_INLINE void pack_row_copied(const PackBlock<T>& b, const T* source, T* target, int64_t width) {
    using V = typename Simd<T>::V;
    constexpr int W = Simd<T>::width;
    const int64_t vectors = (b.channels + W - 1) / W;
    int64_t i = 0;
    for (; i < width && source + i * b.column_stride + vectors * W <= b.source_end; ++i)
        for (int64_t n = 0; n < vectors; ++n) {
            const V v = load_raw<V>(source + i * b.column_stride + n * W);
            std::memcpy(target + i * b.pitch + n * W, &v, sizeof v);
        }
    pack_scalars(b, source, target, i, width);
}

template <class T>
void pack(const PackBlock<T>& b) {
    int64_t height = b.height, width = b.width;
    if (b.left == 0 && b.right == 0 && b.row_stride == width * b.column_stride) {
        width *= height;
        height = 1;
    }
    T* target = b.target;
    for (int64_t y = 0; y < height; ++y) {
        const T* source = b.source + y * b.row_stride;
        std::memset(target, 0, b.left * b.pitch * sizeof(T));
        target += b.left * b.pitch;
        if (b.channel_stride == 1)
            pack_row_copied(b, source, target, width);
        else if (b.column_stride == 1)
            pack_row_transposed(b, source, target, width);
        else
            pack_scalars(b, source, target, 0, width);
        target += width * b.pitch;
        std::memset(target, 0, b.right * b.pitch * sizeof(T));
        target += b.right * b.pitch;
    }
}

}  // namespace
}  // namespace SVAG_SIMD
}  // namespace svag
