// The on-chip inverse as a CUDA kernel.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "onchip.h"

namespace starflow::cuda {

namespace {

template <class Weight, bool CACHED_ON_CHIP>
__global__ void __launch_bounds__(THREADS, 1) onchip_kernel(const __grid_constant__ OnchipCall call) {
    extern __shared__ __align__(16) char shared[];
    run_onchip<Weight, CACHED_ON_CHIP>(call, shared);
}

void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string("block_inverse: ") + what + ": " + cudaGetErrorString(error));
}

}  // namespace

void launch_onchip(const OnchipCall& call, int64_t stream) {
    bool on_chip = call.plan.cached_on_chip;
    auto kernel = call.spec.bf16 ? (on_chip ? onchip_kernel<Bf16, true> : onchip_kernel<Bf16, false>)
                                 : (on_chip ? onchip_kernel<float, true> : onchip_kernel<float, false>);
    int bytes = call.plan.bytes;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory");
    kernel<<<call.blocks, THREADS, bytes, reinterpret_cast<cudaStream_t>(stream)>>>(call);
    check(cudaGetLastError(), "launch");
}

}  // namespace starflow::cuda
