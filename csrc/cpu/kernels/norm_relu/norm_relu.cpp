#include "cpu/kernels/norm_relu/backward.h"
#include "cpu/kernels/norm_relu/forward.h"
#include "cpu/scratch_memory.h"
#include "cpu/thread_pool.h"
#include "tensor_list.h"

namespace svag {
namespace SVAG_SIMD {
namespace {

// Calls f(call, i) for every block, `per_chunk` of them at a time.
template <class T, void (*f)(const Call<T>&, int64_t)>
void for_blocks(void* context, int64_t chunk) {
    const Call<T>& call = *static_cast<const Call<T>*>(context);
    const int64_t end = (chunk + 1) * call.per_chunk;
    for (int64_t i = chunk * call.per_chunk; i < end && i < call.blocks.count; ++i) f(call, i);
}

template <class T, void (*f)(const Call<T>&, int64_t)>
void run(Call<T>& call) {
    const NormShape& s = call.shape;
    const int threads = s.samples * s.channels * s.pixels < kSerial ? 1 : s.threads;
    parallel_chunks((call.blocks.count + call.per_chunk - 1) / call.per_chunk, threads, for_blocks<T, f>, &call);
}

// GroupNorm's block is a whole sample, whose values are still in the cache for the second walk.
template <class T, bool kResidual>
void sample_forward(const Call<T>& call, int64_t i) {
    block_moments<T>(call, i);
    line_moments<T>(call, i);
    block_apply<T, kResidual>(call, i);
}

template <class T, bool kKept>
void sample_backward(const Call<T>& call, int64_t i) {
    set_lines<T>(call, i, call.backward->mean, call.backward->var, call.backward->weight, call.backward->bias);
    block_grad_sums<T, kKept>(call, i);
    line_grads<T>(call, i);
    block_grads<T, kKept>(call, i);
}

template <class T, bool kResidual>
void forward(Call<T>& call) {
    if (call.shape.groups > 0) return run<T, sample_forward<T, kResidual>>(call);
    run<T, block_moments<T>>(call);
    for (int64_t line = 0; line < call.shape.segments; ++line) line_moments<T>(call, line);
    run<T, block_apply<T, kResidual>>(call);
}

template <class T, bool kKept>
void backward(Call<T>& call) {
    const NormBackward& g = *call.backward;
    if (call.shape.groups > 0) {
        run<T, sample_backward<T, kKept>>(call);
    } else {
        const int64_t lines = call.shape.segments;
        for (int64_t line = 0; line < lines; ++line) set_lines<T>(call, line, g.mean, g.var, g.weight, g.bias);
        run<T, block_grad_sums<T, kKept>>(call);
        for (int64_t line = 0; line < lines; ++line) line_grads<T>(call, line);
        run<T, block_grads<T, kKept>>(call);
    }
    const int64_t C = call.shape.channels;
    const double* cells[] = {call.second, call.first};
    double* sums[] = {g.weight_grad, g.bias_grad};
    for (int k = 0; k < 2; ++k) {
        if (sums[k] == nullptr) continue;
        for (int64_t c = 0; c < C; ++c) sums[k][c] = 0;
        for (int64_t i = 0; i < call.blocks.count; ++i)
            for (int64_t c = 0; c < C; ++c) sums[k][c] += cells[k][i * C + c];
    }
}

template <class T>
int serve(const NormShape& shape, const NormForward* f, const NormBackward* g) {
    Call<T> call{shape, Blocks(shape), f, g, nullptr, nullptr, nullptr, 1};
    const int64_t C = shape.channels, cells = call.blocks.count * C;
    ScratchMemory memory;
    const auto first = memory.reserve<double>(cells), second = memory.reserve<double>(cells);
    const auto lines = memory.reserve<T>((shape.groups > 0 ? shape.samples : shape.segments) * 5 * C);
    if (!memory.allocate()) return kOutOfMemory;
    call.first = memory.at(first);
    call.second = memory.at(second);
    call.lines = memory.at(lines);
    const int64_t block = call.blocks.rows * C;
    if (block < kChunk) call.per_chunk = kChunk / block;
    if (f != nullptr)
        f->residual == nullptr ? forward<T, false>(call) : forward<T, true>(call);
    else
        g->y == nullptr ? backward<T, false>(call) : backward<T, true>(call);
    return kOk;
}

}  // namespace
}  // namespace SVAG_SIMD
}  // namespace svag

extern "C" int SVAG_ENTRY(svag_norm_relu)(const svag::NormShape& shape, const svag::NormForward& arrays) {
    using namespace svag::SVAG_SIMD;
    return shape.is_double ? serve<double>(shape, &arrays, nullptr) : serve<float>(shape, &arrays, nullptr);
}

extern "C" int SVAG_ENTRY(svag_norm_relu_grad)(const svag::NormShape& shape, const svag::NormBackward& arrays) {
    using namespace svag::SVAG_SIMD;
    return shape.is_double ? serve<double>(shape, nullptr, &arrays) : serve<float>(shape, nullptr, &arrays);
}
