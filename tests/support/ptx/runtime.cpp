// What nvcc's host code asks of the CUDA runtime: each launch goes to a callback, by the kernel's name in the PTX.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <map>

namespace {

using Launched = int (*)(const char* kernel, const unsigned* grid, const unsigned* block, int device, void* stream,
                         void** arguments);

struct Runtime {
    Launched launched = nullptr;
    int device = 0;
    std::map<const void*, const char*> kernels;
};

Runtime& runtime() {  // libraries register their kernels before main()
    static auto* r = new Runtime;
    return *r;
}

constexpr int kDevices = 2;

}  // namespace

extern "C" {

void set_launched(Launched launched) { runtime().launched = launched; }

cudaError_t cudaGetDevice(int* device) {
    *device = runtime().device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= kDevices) return cudaErrorInvalidDevice;
    runtime().device = device;
    return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
    Runtime& r = runtime();
    const auto found = r.kernels.find(function);
    if (found == r.kernels.end()) return cudaErrorInvalidDeviceFunction;
    const unsigned grid[] = {config->gridDim.x, config->gridDim.y, config->gridDim.z};
    const unsigned block[] = {config->blockDim.x, config->blockDim.y, config->blockDim.z};
    return static_cast<cudaError_t>(r.launched(found->second, grid, block, r.device, config->stream, arguments));
}

// nvcc's own functions, by which a library says what it holds.
void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
    runtime().kernels[function] = name;
}

// A launch by <<<...>>>, of which the project has none.
#define NEVER(name) \
    void name() { std::abort(); }
NEVER(__cudaPushCallConfiguration)
NEVER(__cudaPopCallConfiguration)
NEVER(__cudaGetKernel)
NEVER(__cudaLaunchKernel)
#undef NEVER
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { std::abort(); }
}
