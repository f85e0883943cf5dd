// Kernels with one fault each, and their sound forms: the harness must catch every fault and pass the sound ones, and so
// must the simulator of what nvcc makes of them.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace {

constexpr int kThreads = 96;

// Each thread writes its own slot and reads its neighbour's in the next warp.
template <bool kBarrier>
__global__ void rotate_block(const float* in, float* out) {
    __shared__ float slots[kThreads];
    const unsigned t = threadIdx.x;
    slots[t] = in[t];
    if (kBarrier) __syncthreads();
    out[t] = slots[(t + 32) % kThreads];
}

// Within a warp, where only __syncwarp is needed.
template <bool kBarrier>
__global__ void rotate_warp(const float* in, float* out) {
    __shared__ float slots[kThreads];
    const unsigned t = threadIdx.x;
    slots[t] = in[t];
    if (kBarrier) __syncwarp();
    out[t] = slots[t / 32 * 32 + (t + 1) % 32];
}

// The barrier that is missing stands between a read and the next write.
template <bool kBarrier>
__global__ void write_after_read(const float* in, float* out) {
    __shared__ float slot;
    for (int i = 0; i < 2; ++i) {
        if (threadIdx.x == 0) slot = in[i];
        __syncthreads();
        out[i * kThreads + threadIdx.x] = slot;
        if (kBarrier) __syncthreads();
    }
}

template <bool kFault>
__global__ void off_by_one(const float* in, float* out) {
    for (int i = threadIdx.x; i < kThreads + kFault; i += kThreads) out[i] = in[i];
}

template <bool kFault>
__global__ void shared_off_by_one(const float* in, float* out) {
    __shared__ float slots[kThreads];
    const unsigned t = threadIdx.x;
    slots[t + kFault] = in[t];
    __syncthreads();
    out[t] = slots[t + kFault];
}

template <bool kFault>
__global__ void divergent_barrier(const float* in, float* out) {
    if (!kFault || threadIdx.x < 40) __syncthreads();
    out[threadIdx.x] = in[threadIdx.x];
}

template <bool kFault>
__global__ void divergent_shuffle(const float* in, float* out) {
    float value = in[threadIdx.x];
    if (!kFault || threadIdx.x % 32 < 16) value = __shfl_xor_sync(0xffffffffu, value, 1);
    out[threadIdx.x] = value;
}

template <bool kFault>
__global__ void unwritten_shared(const float* in, float* out) {
    __shared__ float slots[kThreads];
    if (!kFault || threadIdx.x > 0) slots[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = slots[threadIdx.x];
}

// All blocks write the same address.
template <bool kFault>
__global__ void racing_blocks(const float* in, float* out) {
    if (threadIdx.x == 0) out[kFault ? 0 : blockIdx.x] = in[blockIdx.x];
}

template <bool kFault>
__global__ void misaligned(const float* in, float* out) {
    const float* from = in + kFault;
    if (threadIdx.x == 0) *reinterpret_cast<float4*>(out) = *reinterpret_cast<const float4*>(from);
}

// Down and xor shuffles, both checked against the plain sum by the caller.
__global__ void warp_sums(const float* in, float* out) {
    float down = in[threadIdx.x], both = in[threadIdx.x];
    for (int offset = 16; offset > 0; offset /= 2) {
        down += __shfl_down_sync(0xffffffffu, down, offset);
        both += __shfl_xor_sync(0xffffffffu, both, offset);
    }
    const float first = __shfl_sync(0xffffffffu, down, 0);
    out[threadIdx.x] = first;
    out[kThreads + threadIdx.x] = both;
}

int launch(void (*kernel)(const float*, float*), const float* in, float* out, int blocks = 1) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(kThreads);
    return cudaLaunchKernelEx(&config, kernel, in, out);
}

}  // namespace

extern "C" int run_fault(const char* name, int fault, const float* in, float* out) {
    const struct {
        const char* name;
        void (*sound)(const float*, float*);
        void (*faulty)(const float*, float*);
        int blocks;
    } table[] = {
        {"missing_block_barrier", rotate_block<true>, rotate_block<false>, 1},
        {"missing_warp_barrier", rotate_warp<true>, rotate_warp<false>, 1},
        {"write_after_read", write_after_read<true>, write_after_read<false>, 1},
        {"off_by_one", off_by_one<false>, off_by_one<true>, 1},
        {"shared_off_by_one", shared_off_by_one<false>, shared_off_by_one<true>, 1},
        {"divergent_barrier", divergent_barrier<false>, divergent_barrier<true>, 1},
        {"divergent_shuffle", divergent_shuffle<false>, divergent_shuffle<true>, 1},
        {"unwritten_shared", unwritten_shared<false>, unwritten_shared<true>, 1},
        {"racing_blocks", racing_blocks<false>, racing_blocks<true>, 3},
        {"misaligned", misaligned<false>, misaligned<true>, 1},
        {"warp_sums", warp_sums, warp_sums, 1},
    };
    for (const auto& row : table)
        if (std::strcmp(row.name, name) == 0) return launch(fault ? row.faulty : row.sound, in, out, row.blocks);
    return -1;
}

#if !defined(__CUDACC__)
// The harness's own conversions, to be compared with another library's.
extern "C" void convert_to_float(const uint16_t* in, float* half, float* bfloat, int count) {
    for (int i = 0; i < count; ++i) {
        half[i] = __half2float(__half{in[i]});
        bfloat[i] = __bfloat162float(__nv_bfloat16{in[i]});
    }
}

extern "C" void convert_from_float(const float* in, uint16_t* half, uint16_t* bfloat, int count) {
    for (int i = 0; i < count; ++i) {
        half[i] = __float2half_rn(in[i]).bits;
        bfloat[i] = __float2bfloat16_rn(in[i]).bits;
    }
}
#endif
