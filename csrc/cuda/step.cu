#include "cuda/step.h"

#include <algorithm>
#include <limits>

#include "cuda/common.cuh"

namespace svag {
namespace {

// A block's span of one tensor. Short spans share a small list out over the GPU, long ones keep the partial sums of a
// large list few. Chosen by the list alone, so the bits do not depend on the device.
constexpr int64_t kShortSpan = 4096;
constexpr int64_t kLongSpan = 32768;
constexpr int64_t kManyBlocks = 8192;

struct Pass {
    StepCoefficients<double> coefficients;
    MomentumFactors momentum;
    const double* device_coefficients;           // as CudaStepOptions has them, instead of the above where not null
    bool has_second, compensated, has_momentum;  // all tensors of the list, or none
    bool weights;                                // read the params, and update them
    const double* finite;                        // update only where this is 1; null: always
    const float* scale;                          // as CudaStepOptions has it
    int64_t span;
    int64_t partial_stride;
    double* partials;  // [replicas][kStatCount][partial_stride]
    int replicas;
};

static_assert(sizeof(Table<kSmallTable>) + sizeof(Pass) <= 4096 && sizeof(Table<kLargeTable>) + sizeof(Pass) <= 32764,
              "the tables must fit into the kernel's parameters");

// Of the coefficients on the device, if there are any, one replica's row of seven.
template <bool kReplicas>
__device__ __forceinline__ const double* row_of(const Pass& pass, [[maybe_unused]] int64_t replica) {
    if constexpr (kReplicas) return pass.device_coefficients + 7 * replica;
    return pass.device_coefficients;
}

__device__ __forceinline__ StepCoefficients<double> coefficients_of(const Pass& pass, const double* from) {
    return from == nullptr ? pass.coefficients : StepCoefficients<double>{from[0] / from[1], from[2], from[3], from[4]};
}

__device__ __forceinline__ MomentumFactors momentum_of(const Pass& pass, const double* from) {
    return from == nullptr ? pass.momentum : MomentumFactors{from[5], from[6]};
}


// A block's part of one tensor, its pointers moved to the part's start. kScaled: there is a scale to divide by.
template <class P, class G, class A, bool kScaled>
struct Part {
    P* param;
    const G* grad1;
    const G* grad2;
    G* last;  // the gradient that the user sees after the step: where kScaled it is to be divided too
    float* compensation;
    A* momentum;
    A unscale;
    StepCoefficients<A> c;
    Momentum<A> mu;
    const Pass& pass;
    bool update;

    // Elements i to i + V: statistics, and the update where it is asked for.
    template <int V>
    __device__ __forceinline__ void run(int i, Moments<A>& moments) const {
        Pack<G, V> g1 = load<V>(grad1 + i);
        Pack<G, V> g2{};
        Pack<P, V> x{};
        Pack<float, V> e{};
        Pack<A, V> v{};
        if (pass.has_second) g2 = load<V>(grad2 + i);
        if (pass.weights) {
            x = load<V>(param + i);
            if (pass.compensated) e = load<V>(compensation + i);
            if (pass.has_momentum) v = load<V>(momentum + i);
        }
#pragma unroll
        for (int j = 0; j < V; ++j) {
            A a1 = widen(g1.v[j]), a2 = widen(g2.v[j]);
            const A value = widen(x.v[j]);
            if constexpr (kScaled) {
                a1 *= unscale;
                a2 *= unscale;
                g1.v[j] = narrow<G, A>(pass.has_second ? a2 : a1);
            }
            moments.add(value, a1, a2);
            // At l = 1 an inf in the second gradient must not reach the param.
            const A used2 = c.c2 == 0 ? A(0) : a2;
            if constexpr (sizeof(A) == sizeof(float)) {
                if (pass.compensated) {
                    // The param's value is x + e; e holds what rounding x to its dtype has lost so far.
                    A sum, error;
                    two_sum(value, e.v[j] - decrement_at(value + e.v[j], a1, used2, v.v[j]), sum, error);
                    x.v[j] = narrow<P, A>(sum);
                    e.v[j] = (sum - widen(x.v[j])) + error;
                    continue;
                }
            }
            x.v[j] = narrow<P, A>(value - decrement_at(value, a1, used2, v.v[j]));
        }
        if (update) {
            store<V>(param + i, x);
            if (pass.compensated) store<V>(compensation + i, e);
            if (pass.has_momentum) store<V>(momentum + i, v);
            if constexpr (kScaled) store<V>(last + i, g1);
        }
    }

    // rate * v after v's own update, or rate * u.
    __device__ __forceinline__ A decrement_at(A value, A g1, A g2, A& v) const {
        if (!pass.has_momentum) return decrement(value, g1, g2, c);
        v = mu.after(v, direction(value, g1, g2, c));
        return c.rate * v;
    }
};

struct BlockShared {
    double unscale;
    StepCoefficients<double> coefficients;
    MomentumFactors momentum;
    double of_warps[kWarps][kStatCount];
    double totals[kStatCount];
};

// Sum the block's moments in a fixed order: in the arithmetic type within a warp, in float64 across warps.
template <class A>
__device__ __forceinline__ void sum_block(const Moments<A>& m, BlockShared& block) {
    const A sums[kStatCount] = {warp_sum(m.sq_norm1), warp_sum(m.sq_norm2), warp_sum(m.inner),
                                warp_sum(m.weight_sq_norm), warp_sum(m.poison)};
    if (threadIdx.x % 32 == 0) {
#pragma unroll
        for (int k = 0; k < kStatCount; ++k) block.of_warps[threadIdx.x / 32][k] = static_cast<double>(sums[k]);
    }
    __syncthreads();
    if (threadIdx.x < kStatCount) {
        double total = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) total += block.of_warps[w][threadIdx.x];
        block.totals[threadIdx.x] = total;
    }
    __syncthreads();
}

__device__ __forceinline__ bool is_finite(double x) { return x - x == 0; }

// How many of the elements that an access of 16 bytes is made of, if they are the narrower ones.
template <class P, class G>
constexpr int64_t kNarrowPack = static_cast<int64_t>(16 / (sizeof(P) < sizeof(G) ? sizeof(P) : sizeof(G)));

template <class P, class G, class A, bool kScaled, bool kReplicas>
__device__ __forceinline__ void run_part(const StepTensor& t, int64_t begin, [[maybe_unused]] int64_t replica,
                                         const Pass& pass, int partial, BlockShared& block) {
    double* const totals = block.totals;
    constexpr int V = kPackSize<P, G>;
    const StepCoefficients<double>& c = block.coefficients;
    bool aligned = ((reinterpret_cast<uintptr_t>(t.param) | reinterpret_cast<uintptr_t>(t.grad1) |
                     reinterpret_cast<uintptr_t>(t.grad2) | reinterpret_cast<uintptr_t>(t.compensation) |
                     reinterpret_cast<uintptr_t>(t.momentum)) %
                    16) == 0;
    int64_t first = begin;
    const double* finite = pass.finite;
    if constexpr (kReplicas) {
        first += replica * t.size;
        aligned = aligned && first % kNarrowPack<P, G> == 0;
        if (finite != nullptr) finite += replica * kStatCount;
    }
    const int64_t left = t.size - begin;
    const int size = static_cast<int>(left < pass.span ? left : pass.span);
    void* const last = const_cast<void*>(pass.has_second ? t.grad2 : t.grad1);
    const Part<P, G, A, kScaled> part{static_cast<P*>(t.param) + first,
                                      static_cast<const G*>(t.grad1) + first,
                                      pass.has_second ? static_cast<const G*>(t.grad2) + first : nullptr,
                                      static_cast<G*>(last) + first,
                                      pass.compensated ? static_cast<float*>(t.compensation) + first : nullptr,
                                      pass.has_momentum ? static_cast<A*>(t.momentum) + first : nullptr,
                                      A(block.unscale),
                                      {A(c.rate), A(c.c1), A(c.c2), A(c.weight_decay)},
                                      Momentum<A>::of(block.momentum),
                                      pass,
                                      pass.weights && (finite == nullptr || *finite == 1)};
    Moments<A> moments{};
    const int packed = aligned || kReplicas ? size / V * V : 0;
    int i = static_cast<int>(threadIdx.x) * V;
    if constexpr (kReplicas) {
        // Packs all the same, one element at a time: each thread adds what it adds where they are aligned.
        if (!aligned)
#pragma unroll 1
            for (; i < packed; i += i % V < V - 1 ? 1 : (kThreads - 1) * V + 1) part.template run<1>(i, moments);
    }
    for (; i < packed; i += kThreads * V) part.template run<V>(i, moments);
#pragma unroll 1
    for (i = packed + static_cast<int>(threadIdx.x); i < size; i += kThreads) part.template run<1>(i, moments);
    sum_block(moments, block);

    if constexpr (sizeof(A) == sizeof(float)) {
        // Gradients above 1e19 are finite, but their squares overflow float32.
        if (totals[kFinite] == 0 && !is_finite(totals[kSqNorm1] + totals[kSqNorm2] + totals[kInner])) {
            Moments<double> wide{};
#pragma unroll 1
            for (int i = static_cast<int>(threadIdx.x); i < size; i += kThreads) {
                A a1 = widen(part.grad1[i]), a2 = pass.has_second ? widen(part.grad2[i]) : A(0);
                if constexpr (kScaled) {
                    a1 *= part.unscale;
                    a2 *= part.unscale;
                }
                wide.add(0.0, static_cast<double>(a1), static_cast<double>(a2));
            }
            const double weight_sq_norm = totals[kWeightSqNorm];
            __syncthreads();
            sum_block(wide, block);
            if (threadIdx.x == kWeightSqNorm) totals[kWeightSqNorm] = weight_sq_norm;
        }
    }
    double* partials = pass.partials;
    if constexpr (kReplicas) partials += replica * kStatCount * pass.partial_stride;
    if (threadIdx.x < kStatCount) partials[threadIdx.x * pass.partial_stride + partial] = totals[threadIdx.x];
}

__host__ __device__ constexpr int pair(DType param, DType grad) {
    return static_cast<int>(param) * 4 + static_cast<int>(grad);
}

// kReplicas: the grid has every replica's blocks, one replica after the other.
template <bool kScaled, bool kReplicas, int kCapacity>
__device__ __forceinline__ void run_block(const Table<kCapacity>& table, const Pass& pass, BlockShared& shared) {
    int64_t replica = 0;
    int before = 0;  // the blocks of the replicas before it
    if constexpr (kReplicas) {
        const int blocks = static_cast<int>(gridDim.x) / pass.replicas;
        replica = static_cast<int>(blockIdx.x) / blocks;
        before = static_cast<int>(replica) * blocks;
    }
    if (threadIdx.x == 0) {
        shared.coefficients = coefficients_of(pass, row_of<kReplicas>(pass, replica));
        shared.momentum = momentum_of(pass, row_of<kReplicas>(pass, replica));
        if constexpr (kScaled) shared.unscale = 1.0 / static_cast<double>(*pass.scale);
    }
    __syncthreads();
    const int block = static_cast<int>(blockIdx.x) - before;
    const int i = table.tensor_of(block);
    const StepTensor& t = table.tensors[i];
    const int64_t begin = (block - table.first_block[i]) * pass.span;
    const int partial = table.first_partial + block;
    switch (pair(t.param_dtype, t.grad_dtype)) {
#define SVAG_CASE(P, G, A, param, grad) \
    case pair(DType::param, DType::grad): \
        return run_part<P, G, A, kScaled, kReplicas>(t, begin, replica, pass, partial, shared)
        SVAG_CASE(float, float, float, float32, float32);
        SVAG_CASE(double, double, double, float64, float64);
        SVAG_CASE(double, float, double, float64, float32);
        SVAG_CASE(__nv_bfloat16, __nv_bfloat16, float, bfloat16, bfloat16);
        SVAG_CASE(__nv_bfloat16, float, float, bfloat16, float32);
        SVAG_CASE(__half, __half, float, float16, float16);
        SVAG_CASE(__half, float, float, float16, float32);
#undef SVAG_CASE
        default: return;  // refused on the host
    }
}

template <int kCapacity>
// Three blocks a multiprocessor have twice the loads under way that the bandwidth asks for (docs/roofline.md).
__global__ void __launch_bounds__(kThreads, 3)
    step_kernel(const __grid_constant__ Table<kCapacity> table, const __grid_constant__ Pass pass) {
    __shared__ BlockShared shared;
    run_block<false, false>(table, pass, shared);
}

template <int kCapacity>
// With a GradScaler's scale to divide by, three blocks' registers would spill.
__global__ void __launch_bounds__(kThreads, 2)
    scaled_step_kernel(const __grid_constant__ Table<kCapacity> table, const __grid_constant__ Pass pass) {
    __shared__ BlockShared shared;
    run_block<true, false>(table, pass, shared);
}

template <int kCapacity>
__global__ void __launch_bounds__(kThreads, 3)
    replicas_step_kernel(const __grid_constant__ Table<kCapacity> table, const __grid_constant__ Pass pass) {
    __shared__ BlockShared shared;
    run_block<false, true>(table, pass, shared);
}

// One block: adds the blocks' partial sums in a fixed order, and writes the stats whose bit is set in `which`. Not finite
// is also what a GradScaler has found an inf in.
__device__ __forceinline__ void finish(const double* partials, int64_t count, unsigned which, const float* found_inf,
                                       double* stats, double (&of_warps)[kWarps][kStatCount]) {
    double sums[kStatCount] = {};
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < count; i += kThreads)
#pragma unroll
        for (int k = 0; k < kStatCount; ++k) sums[k] += partials[k * count + i];
#pragma unroll
    for (int k = 0; k < kStatCount; ++k) {
        const double sum = warp_sum(sums[k]);
        if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32][k] = sum;
    }
    __syncthreads();
    const unsigned k = threadIdx.x;
    if (k < kStatCount && (which >> k & 1) != 0) {
        double total = 0;
        for (int w = 0; w < kWarps; ++w) total += of_warps[w][k];
        const bool taken = total == 0 && (found_inf == nullptr || *found_inf == 0);
        stats[k] = k == kFinite ? (taken ? 1 : 0) : total;
    }
}

__global__ void __launch_bounds__(kThreads)
    finish_kernel(const double* partials, int64_t count, unsigned which, const float* found_inf, double* stats) {
    __shared__ double of_warps[kWarps][kStatCount];
    finish(partials, count, which, found_inf, stats, of_warps);
}

// A block for each replica.
__global__ void __launch_bounds__(kThreads)
    replicas_finish_kernel(const double* partials, int64_t count, unsigned which, const float* found_inf, double* stats) {
    __shared__ double of_warps[kWarps][kStatCount];
    const int64_t replica = blockIdx.x;
    finish(partials + replica * kStatCount * count, count, which, found_inf, stats + replica * kStatCount, of_warps);
}

constexpr unsigned kWeightStats = 1u << kWeightSqNorm;
constexpr unsigned kGradientStats = kAllStats & ~kWeightStats;

bool supported(const StepTensor& t) {
    const bool dtypes = t.param_dtype == t.grad_dtype || t.grad_dtype == DType::float32;
    return dtypes && (t.compensation == nullptr || t.param_dtype != DType::float64);
}

int64_t blocks_of(int64_t size, int64_t span) { return (size + span - 1) / span; }

struct Partition {
    int64_t span, blocks;
};

template <class SizeOf>
Partition partition(int64_t count, SizeOf size_of) {
    Partition p{kShortSpan, 0};
    for (;; p.span *= 2) {
        p.blocks = 0;
        for (int64_t i = 0; i < count; ++i) p.blocks += blocks_of(size_of(i), p.span);
        if (p.blocks <= kManyBlocks || p.span == kLongSpan) return p;
    }
}

cudaError_t launch_pass(const StepTensor* tensors, int64_t count, const Pass& pass, unsigned which,
                        const CudaStepOptions& options) {
    const auto stream = static_cast<cudaStream_t>(options.stream);
    const auto blocks = [&pass](const StepTensor& t) { return blocks_of(t.size, pass.span); };
    const auto launch = [&](auto small_kernel, auto large_kernel) {
        return count <= kSmallTable
                   ? launch_table(small_kernel, tensors, count, blocks, pass, stream, options.replicas)
                   : launch_table(large_kernel, tensors, count, blocks, pass, stream, options.replicas);
    };
    const cudaError_t error =
        options.replicas > 1   ? launch(replicas_step_kernel<kSmallTable>, replicas_step_kernel<kLargeTable>)
        : pass.scale != nullptr ? launch(scaled_step_kernel<kSmallTable>, scaled_step_kernel<kLargeTable>)
                                : launch(step_kernel<kSmallTable>, step_kernel<kLargeTable>);
    return error != cudaSuccess ? error
                                : launch_finish(pass.partials, pass.partial_stride, which, options.stats, stream,
                                                options.found_inf, options.replicas);
}

cudaError_t run(const StepTensor* tensors, int64_t count, const CudaStepOptions& o) {
    const DeviceGuard guard(o.device);
    if (guard.status() != cudaSuccess) return guard.status();
    Pass pass{};
    pass.coefficients = o.coefficients;
    pass.momentum = o.momentum;
    pass.device_coefficients = o.device_coefficients;
    pass.scale = o.scale;
    for (int64_t i = 0; i < count; ++i) {  // an empty tensor's addresses may be null
        pass.has_second |= tensors[i].grad2 != nullptr;
        pass.compensated |= tensors[i].compensation != nullptr;
        pass.has_momentum |= tensors[i].momentum != nullptr;
    }
    pass.weights = true;
    const Partition parts = partition(count, [tensors](int64_t i) { return tensors[i].size; });
    pass.span = parts.span;
    pass.partial_stride = parts.blocks;
    pass.partials = o.workspace;
    const int64_t most = std::numeric_limits<int>::max();  // of a grid's blocks
    if (o.replicas < 1 || o.replicas > most / std::max<int64_t>(parts.blocks, 1)) return cudaErrorInvalidConfiguration;
    if (o.replicas > 1 && (o.device_coefficients == nullptr || o.scale != nullptr)) return cudaErrorInvalidValue;
    pass.replicas = static_cast<int>(o.replicas);
    if (!o.skip_nonfinite) return launch_pass(tensors, count, pass, kAllStats, o);
    // Whether to update is known only after all gradients were read: a pass over them alone goes before.
    pass.weights = false;
    const cudaError_t error = launch_pass(tensors, count, pass, kGradientStats, o);
    if (error != cudaSuccess) return error;
    pass.weights = true;
    pass.finite = o.stats + kFinite;
    return launch_pass(tensors, count, pass, kWeightStats, o);
}

}  // namespace

cudaError_t launch_finish(const double* partials, int64_t count, unsigned which, double* stats, cudaStream_t stream,
                          const float* found_inf, int64_t replicas) {
    const cudaLaunchConfig_t config = launch_config(replicas, stream);
    const auto kernel = replicas > 1 ? replicas_finish_kernel : finish_kernel;
    return cudaLaunchKernelEx(&config, kernel, partials, count, which, found_inf, stats);
}

}  // namespace svag

extern "C" int64_t svag_step_cuda_workspace(const int64_t* sizes, int64_t count) {
    return svag::kStatCount * svag::partition(count, [sizes](int64_t i) { return sizes[i]; }).blocks;
}

extern "C" int svag_step_cuda(const svag::StepTensor* tensors, int64_t count, const svag::CudaStepOptions& options) {
    for (int64_t i = 0; i < count; ++i)
        if (!svag::supported(tensors[i])) return svag::kUnsupportedDType;
    return svag::status_of(svag::run(tensors, count, options));
}
