#include "cuda/step_per_sample.h"

#include "cuda/common.cuh"

namespace svag {
namespace {

// Samples whose norms a block gathers between two barriers: a warp's lanes add them up.
constexpr int kGroup = 32;
// Samples whose loads are under way at once.
constexpr int kAhead = 4;

template <class T>
constexpr int kColumns = static_cast<int>(16 / sizeof(T));  // of a thread

struct Pass {
    StepCoefficients<double> coefficients;
    int64_t samples1, samples2;
    int64_t partial_stride;
    double* norm_partials;  // [samples1 + samples2][partial_stride]
    double* stat_partials;  // [kStatCount][partial_stride]
};

struct BlockShared {
    double norms[kWarps][kGroup];
    double of_warps[kWarps][kStatCount];
    bool overflow;
};

// The columns of one tensor that a block works on: kColumns<T> for each thread.
template <class T>
struct Columns {
    static constexpr int V = kColumns<T>;
    int64_t begin;
    int count;     // of the block
    bool aligned;  // every row is: the thread's columns are side by side, and move by 16 bytes

    __device__ __forceinline__ void read(const T* row, T* values) const {
        if (aligned) {
            Pack<T, V> pack{};
            if (static_cast<int>(threadIdx.x) * V < count) pack = load<V>(row + begin + threadIdx.x * V);
#pragma unroll
            for (int j = 0; j < V; ++j) values[j] = pack.v[j];
        } else {
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const int i = static_cast<int>(threadIdx.x) + j * kThreads;
                values[j] = i < count ? row[begin + i] : T{};
            }
        }
    }

    __device__ __forceinline__ void write(T* row, const T* values) const {
        if (aligned) {
            Pack<T, V> pack;
#pragma unroll
            for (int j = 0; j < V; ++j) pack.v[j] = values[j];
            if (static_cast<int>(threadIdx.x) * V < count) store<V>(row + begin + threadIdx.x * V, pack);
        } else {
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const int i = static_cast<int>(threadIdx.x) + j * kThreads;
                if (i < count) row[begin + i] = values[j];
            }
        }
    }
};

// The squared norms of `count` samples within the block's columns, a row of `norms` for each warp; S is the type in
// which a warp adds. Adds the samples to `sums`.
template <class S, class T, class A>
__device__ __forceinline__ void gather(const Columns<T>& columns, const T* rows, int64_t size, int count,
                                       double (*norms)[kGroup], A* sums) {
    constexpr int V = kColumns<T>;
#pragma unroll 1
    for (int first = 0; first < count; first += kAhead) {
        T values[kAhead][V];
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            // Past the end the last sample is read again, and not counted.
            const int sample = first + k < count ? first + k : count - 1;
            columns.read(rows + sample * size, values[k]);
        }
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
            S norm = 0;
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const A value = widen(values[k][j]);
                norm += static_cast<S>(value) * static_cast<S>(value);
                if (first + k < count) sums[j] += value;
            }
            norm = warp_sum(norm);
            if (threadIdx.x % 32 == 0 && first + k < count)
                norms[threadIdx.x / 32][first + k] = static_cast<double>(norm);
        }
    }
}

// Sum one batch's samples column by column, and write each sample's partial norm.
template <class T, class A>
__device__ __forceinline__ void run_batch(const Columns<T>& columns, const T* rows, int64_t size, int64_t samples,
                                          double* partials, int64_t partial_stride, BlockShared& shared, A* sums) {
    constexpr int V = kColumns<T>;
#pragma unroll 1
    for (int64_t first = 0; first < samples; first += kGroup) {
        const int count = static_cast<int>(samples - first < kGroup ? samples - first : kGroup);
        gather<A>(columns, rows + first * size, size, count, shared.norms, sums);
        __syncthreads();
        double norm = 0;
        if (threadIdx.x < static_cast<unsigned>(count)) {
#pragma unroll
            for (int w = 0; w < kWarps; ++w) norm += shared.norms[w][threadIdx.x];
        }
        if constexpr (sizeof(A) == sizeof(float)) {
            // Gradients above 1e19 are finite, but their squares overflow float32: add this group's in float64.
            if (threadIdx.x < kGroup) {
                const int beyond = warp_sum(norm - norm != 0 ? 1 : 0);
                if (threadIdx.x == 0) shared.overflow = beyond != 0;
            }
            __syncthreads();
            if (shared.overflow) {
                A unused[V] = {};
                gather<double>(columns, rows + first * size, size, count, shared.norms, unused);
                __syncthreads();
                norm = 0;
                if (threadIdx.x < static_cast<unsigned>(count)) {
#pragma unroll
                    for (int w = 0; w < kWarps; ++w) norm += shared.norms[w][threadIdx.x];
                }
            }
        }
        if (threadIdx.x < static_cast<unsigned>(count)) partials[(first + threadIdx.x) * partial_stride] = norm;
        __syncthreads();
    }
}

template <class T, class A>
__device__ __forceinline__ void run_columns(const StepTensor& t, int64_t begin, const Pass& pass, int partial,
                                            BlockShared& shared) {
    constexpr int V = kColumns<T>;
    const int64_t left = t.size - begin;
    const bool aligned = ((reinterpret_cast<uintptr_t>(t.param) | reinterpret_cast<uintptr_t>(t.grad1) |
                           reinterpret_cast<uintptr_t>(t.grad2)) %
                          16) == 0 &&
                         t.size % V == 0;
    const Columns<T> columns{begin, static_cast<int>(left < kThreads * V ? left : kThreads * V), aligned};
    A sum1[V] = {}, sum2[V] = {};
    double* const norms = pass.norm_partials + partial;
    run_batch(columns, static_cast<const T*>(t.grad1), t.size, pass.samples1, norms, pass.partial_stride, shared, sum1);
    run_batch(columns, static_cast<const T*>(t.grad2), t.size, pass.samples2,
              norms + pass.samples1 * pass.partial_stride, pass.partial_stride, shared, sum2);

    const StepCoefficients<A> c{A(pass.coefficients.rate), A(pass.coefficients.c1), A(pass.coefficients.c2),
                                A(pass.coefficients.weight_decay)};
    T x[V];
    columns.read(static_cast<const T*>(t.param), x);
    Moments<double> moments{};
#pragma unroll
    for (int j = 0; j < V; ++j) {
        const A mean1 = sum1[j] / static_cast<A>(pass.samples1);
        const A mean2 = pass.samples2 == 0 ? A(0) : sum2[j] / static_cast<A>(pass.samples2);
        const A value = widen(x[j]);
        moments.add(static_cast<double>(value), static_cast<double>(mean1), static_cast<double>(mean2));
        // At l = 1 an inf in the second batch must not reach the param.
        x[j] = narrow<T, A>(value - decrement(value, mean1, c.c2 == 0 ? A(0) : mean2, c));
    }
    columns.write(static_cast<T*>(t.param), x);

    const double sums[kStatCount] = {warp_sum(moments.sq_norm1), warp_sum(moments.sq_norm2), warp_sum(moments.inner),
                                     warp_sum(moments.weight_sq_norm), warp_sum(moments.poison)};
    if (threadIdx.x % 32 == 0) {
#pragma unroll
        for (int k = 0; k < kStatCount; ++k) shared.of_warps[threadIdx.x / 32][k] = sums[k];
    }
    __syncthreads();
    if (threadIdx.x < kStatCount) {
        double total = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) total += shared.of_warps[w][threadIdx.x];
        pass.stat_partials[threadIdx.x * pass.partial_stride + partial] = total;
    }
}

template <int kCapacity>
__global__ void __launch_bounds__(kThreads)
    per_sample_step_kernel(const __grid_constant__ Table<kCapacity> table, const __grid_constant__ Pass pass) {
    __shared__ BlockShared shared;
    const int block = static_cast<int>(blockIdx.x);
    const int i = table.tensor_of(block);
    const StepTensor& t = table.tensors[i];
    const int64_t index = block - table.first_block[i];
    const int partial = table.first_partial + block;
    switch (t.param_dtype) {
#define SVAG_CASE(T, A, dtype) \
    case DType::dtype: return run_columns<T, A>(t, index * kThreads * kColumns<T>, pass, partial, shared)
        SVAG_CASE(float, float, float32);
        SVAG_CASE(double, double, float64);
        SVAG_CASE(__nv_bfloat16, float, bfloat16);
        SVAG_CASE(__half, float, float16);
#undef SVAG_CASE
    }
}

// A block for each sample: adds its partial norms in a fixed order.
__global__ void __launch_bounds__(kThreads)
    finish_norms_kernel(const double* partials, int64_t partial_stride, double* sq_norms) {
    __shared__ double of_warps[kWarps];
    double sum = 0;
    for (int64_t i = threadIdx.x; i < partial_stride; i += kThreads) sum += partials[blockIdx.x * partial_stride + i];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        double total = 0;
        for (int w = 0; w < kWarps; ++w) total += of_warps[w];
        sq_norms[blockIdx.x] = total;
    }
}

constexpr int64_t element_bytes(DType dtype) {
    return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

int64_t blocks_of(int64_t size, DType dtype) {
    const int64_t columns = kThreads * (16 / element_bytes(dtype));
    return (size + columns - 1) / columns;
}

cudaError_t run(const StepTensor* tensors, int64_t count, const CudaPerSampleOptions& o) {
    const DeviceGuard guard(o.device);
    if (guard.status() != cudaSuccess) return guard.status();
    const auto stream = static_cast<cudaStream_t>(o.stream);
    const int64_t samples = o.samples1 + o.samples2;
    const auto blocks = [](const StepTensor& t) { return blocks_of(t.size, t.param_dtype); };
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) total += blocks(tensors[i]);
    const Pass pass{o.coefficients, o.samples1, o.samples2, total, o.workspace, o.workspace + samples * total};
    cudaError_t error =
        launch_table(per_sample_step_kernel<kSmallTable>, tensors, count, blocks, pass, stream);
    if (error != cudaSuccess) return error;
    const cudaLaunchConfig_t config = launch_config(samples, stream);
    error = cudaLaunchKernelEx(&config, finish_norms_kernel, static_cast<const double*>(pass.norm_partials), total,
                               o.sq_norms);
    if (error != cudaSuccess) return error;
    return launch_finish(pass.stat_partials, total, kAllStats, o.stats, stream);
}

}  // namespace
}  // namespace svag

extern "C" int64_t svag_step_per_sample_cuda_workspace(const int64_t* sizes, const int* dtypes, int64_t count,
                                                       int64_t samples) {
    int64_t blocks = 0;
    for (int64_t i = 0; i < count; ++i) blocks += svag::blocks_of(sizes[i], static_cast<svag::DType>(dtypes[i]));
    return (samples + svag::kStatCount) * blocks;
}

extern "C" int svag_step_per_sample_cuda(const svag::StepTensor* tensors, int64_t count,
                                         const svag::CudaPerSampleOptions& options) {
    for (int64_t i = 0; i < count; ++i)
        if (tensors[i].param_dtype != tensors[i].grad_dtype || tensors[i].compensation != nullptr)
            return svag::kUnsupportedDType;
    return svag::status_of(svag::run(tensors, count, options));
}
