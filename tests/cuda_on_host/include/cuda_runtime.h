// Stands before CUDA's own header on the include path, so that g++ compiles a .cu file as it is and the CPU runs it:
// each thread of a block is a fiber (runtime.cpp). What kernels of this project do not use is left out.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
// A block runs to its end before the next one starts, so blocks may share the storage.
#define __shared__ static
#define CUDART_VERSION 13000

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) double2 {
    double x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorLaunchFailure = 719,
};
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

namespace cuda_on_host {

using Entry = void (*)(void* arguments);

// The running fiber's place in the launch, along x, y or z.
unsigned thread_index(int axis);
unsigned block_index(int axis);
unsigned block_size(int axis);
unsigned grid_size(int axis);

void sync_threads(const char* file, int line);
void sync_warp(const char* file, int line, unsigned mask);
// The value that `source_lane` hands in; every lane of the mask has to come to the same place.
uint64_t exchange(const char* file, int line, unsigned mask, uint64_t value, unsigned source_lane);

cudaError_t launch(const cudaLaunchConfig_t& config, Entry entry, void* arguments);

unsigned lane();

template <class T>
T shuffle(const char* file, int line, unsigned mask, T value, unsigned source_lane) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves at most 8 bytes");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = exchange(file, line, mask, bits, source_lane);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

}  // namespace cuda_on_host

// Objects without data: cudaLaunchConfig_t has members of these names too, so macros would not do.
template <unsigned (*kGet)(int axis), int kAxis>
struct Coordinate {
    operator unsigned() const { return kGet(kAxis); }
};
template <unsigned (*kGet)(int axis)>
struct Coordinates {
    Coordinate<kGet, 0> x;
    Coordinate<kGet, 1> y;
    Coordinate<kGet, 2> z;
};
inline constexpr Coordinates<cuda_on_host::thread_index> threadIdx{};
inline constexpr Coordinates<cuda_on_host::block_index> blockIdx{};
inline constexpr Coordinates<cuda_on_host::block_size> blockDim{};
inline constexpr Coordinates<cuda_on_host::grid_size> gridDim{};

#define __syncthreads() ::cuda_on_host::sync_threads(__FILE__, __LINE__)
#define __syncwarp(...) ::cuda_on_host::sync_warp(__FILE__, __LINE__, 0xffffffffu __VA_OPT__(&) __VA_ARGS__)
#define __shfl_sync(mask, value, source) \
    ::cuda_on_host::shuffle(__FILE__, __LINE__, mask, value, (source) & 31u)
#define __shfl_xor_sync(mask, value, other) \
    ::cuda_on_host::shuffle(__FILE__, __LINE__, mask, value, ::cuda_on_host::lane() ^ (other))
// Past the warp's end a lane gets its own value back, as in CUDA.
#define __shfl_down_sync(mask, value, delta)                    \
    ::cuda_on_host::shuffle(__FILE__, __LINE__, mask, value,    \
                            ::cuda_on_host::lane() + (delta) < 32 ? ::cuda_on_host::lane() + (delta) \
                                                                  : ::cuda_on_host::lane())

inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);

// nvcc's cudaLaunchKernelEx: the arguments are copied at the launch, and once more for each thread.
template <class... Parameters, class... Arguments>
__attribute__((no_sanitize("thread"))) cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config,
                                                                      void (*kernel)(Parameters...),
                                                                      Arguments&&... arguments) {
    static_assert((sizeof(Parameters) + ... + 0) <= 32764, "kernel parameters are at most 32764 bytes");
    struct Call {
        void (*kernel)(Parameters...);
        std::tuple<std::decay_t<Parameters>...> parameters;
    } call{kernel, {std::forward<Arguments>(arguments)...}};
    const cuda_on_host::Entry entry = [](void* p) __attribute__((no_sanitize("thread"))) {
        auto* c = static_cast<Call*>(p);
        std::apply(c->kernel, c->parameters);
    };
    return cuda_on_host::launch(*config, entry, &call);
}
