// The persistent inverse as a CUDA kernel.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "persistent.h"

namespace starflow::cuda {

namespace {

template <class Weight, int ROWS>
__global__ void __launch_bounds__(THREADS, 1) persistent_kernel(const __grid_constant__ PersistentCall call) {
    extern __shared__ __align__(16) char shared[];
    PersistentKernel<Weight, ROWS>::run(call, shared);
}

void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string("block_inverse: ") + what + ": " + cudaGetErrorString(error));
}

}  // namespace

void launch_persistent(const PersistentCall& call, int64_t stream) {
    choose_persistent(call, [&](auto chosen) {
        auto kernel = persistent_kernel<typename decltype(chosen)::Weight, decltype(chosen)::ROWS>;
        int bytes = call.schedule.bytes;
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory");
        PersistentCall copy = call;
        void* arguments[] = {&copy};
        // A cooperative launch fails unless all thread blocks run at once, as they must to wait for each other.
        auto on = reinterpret_cast<cudaStream_t>(stream);
        check(cudaLaunchCooperativeKernel(kernel, unsigned(call.blocks), THREADS, arguments, size_t(bytes), on),
              "launch");
    });
}

}  // namespace starflow::cuda
