// What the CUDA kernels share: 16-byte packs, conversions to the arithmetic type, sums over a block, launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "svag_math.h"
#include "tensor_list.h"

namespace svag {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// V elements that move in one access, or in several of 16 bytes.
template <class T, int V>
struct alignas(V * sizeof(T) < 16 ? V * sizeof(T) : 16) Pack {
    T v[V];
};

// As many elements as fill 16 bytes of the wider type.
template <class T, class U>
constexpr int kPackSize = static_cast<int>(16 / (sizeof(T) > sizeof(U) ? sizeof(T) : sizeof(U)));

template <int V, class T>
__device__ __forceinline__ Pack<T, V> load(const T* p) {
    return *reinterpret_cast<const Pack<T, V>*>(p);
}

template <int V, class T>
__device__ __forceinline__ void store(T* p, const Pack<T, V>& pack) {
    *reinterpret_cast<Pack<T, V>*>(p) = pack;
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <class T, class A>
__device__ __forceinline__ T narrow(A x);
template <>
__device__ __forceinline__ float narrow<float, float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ double narrow<double, double>(double x) {
    return x;
}
template <>
__device__ __forceinline__ float narrow<float, double>(double x) {
    return static_cast<float>(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16, float>(float x) {
    return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half narrow<__half, float>(float x) {
    return __float2half_rn(x);
}

// The sum over the warp's lanes, the same bits on every lane.
template <class A>
__device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
    for (int other = 16; other > 0; other /= 2) x += __shfl_xor_sync(kAllLanes, x, other);
    return x;
}

// Make `device` the current one until the scope ends.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        status_ = cudaGetDevice(&previous_);
        if (status_ == cudaSuccess && previous_ != device) {
            status_ = cudaSetDevice(device);
            changed_ = status_ == cudaSuccess;
        }
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;
    cudaError_t status() const { return status_; }

  private:
    int previous_ = 0;
    bool changed_ = false;
    cudaError_t status_;
};

inline cudaLaunchConfig_t launch_config(int64_t blocks, cudaStream_t stream) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(kThreads);
    config.stream = stream;
    return config;
}

// Kernel parameters end at 4 KB before CUDA 12.1, at 32764 bytes since; a small table is cheaper to launch with.
constexpr int kSmallTable = 64;
#if CUDART_VERSION >= 12010
constexpr int kLargeTable = 540;
#else
constexpr int kLargeTable = kSmallTable;
#endif

// A list's descriptors, passed to a kernel by value.
template <int kCapacity>
struct Table {
    int count;
    int first_partial;           // of the table's first block
    int first_block[kCapacity];  // of each tensor, within the launch
    StepTensor tensors[kCapacity];

    // The tensor that a block works on: the last that starts at or before it.
    __device__ __forceinline__ int tensor_of(int block) const {
        int low = 0, high = count;
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (first_block[middle] <= block)
                low = middle;
            else
                high = middle;
        }
        return low;
    }
};

// Launch the kernel over the list, as many tensors at a time as a table holds; blocks(t) is a tensor's part of the grid,
// which every replica has once.
template <int kCapacity, class Pass, class Blocks>
cudaError_t launch_table(void (*kernel)(Table<kCapacity>, Pass), const StepTensor* tensors, int64_t count,
                         const Blocks& blocks, const Pass& pass, cudaStream_t stream, int64_t replicas = 1) {
    static_assert(sizeof(Table<kCapacity>) + sizeof(Pass) <= (kCapacity == kSmallTable ? 4096 : 32764),
                  "the table must fit into the kernel's parameters");
    Table<kCapacity> table;
    int64_t partial = 0;
    for (int64_t i = 0; i < count;) {
        table.count = 0;
        table.first_partial = static_cast<int>(partial);
        int64_t grid = 0;
        for (; i < count && table.count < kCapacity; ++i) {
            if (tensors[i].size == 0) continue;
            table.tensors[table.count] = tensors[i];
            table.first_block[table.count++] = static_cast<int>(grid);
            grid += blocks(tensors[i]);
        }
        if (grid == 0) break;
        const cudaLaunchConfig_t config = launch_config(grid * replicas, stream);
        const cudaError_t error = cudaLaunchKernelEx(&config, kernel, table, pass);
        if (error != cudaSuccess) return error;
        partial += grid;
    }
    return cudaSuccess;
}

constexpr unsigned kAllStats = (1u << kStatCount) - 1;

// Add the partial sums [replicas][kStatCount][count] of a replica's blocks in a fixed order, into those of its stats whose
// bit is set in `which`.
cudaError_t launch_finish(const double* partials, int64_t count, unsigned which, double* stats, cudaStream_t stream,
                          const float* found_inf = nullptr, int64_t replicas = 1);

// A status below zero is a CUDA error.
inline int status_of(cudaError_t error) { return error == cudaSuccess ? kOk : -static_cast<int>(error); }

}  // namespace svag
