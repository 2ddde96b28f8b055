// The on-chip inverse as a CUDA kernel.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "onchip.h"

namespace starflow::cuda {

namespace {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool HAS_CLUSTERS = false;
#else
constexpr bool HAS_CLUSTERS = true;
#endif

template <class Weight, bool CACHED_ON_CHIP, bool CLUSTERED>
__global__ void __launch_bounds__(THREADS, 1) onchip_kernel(const __grid_constant__ OnchipCall call) {
    extern __shared__ __align__(16) char shared[];
    if constexpr (HAS_CLUSTERS || !CLUSTERED) run_onchip<Weight, CACHED_ON_CHIP, CLUSTERED>(call, shared);
}

void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string("block_inverse: ") + what + ": " + cudaGetErrorString(error));
}

template <class Weight, bool CACHED_ON_CHIP, bool CLUSTERED>
void launch(const OnchipCall& call, cudaStream_t stream) {
    auto kernel = onchip_kernel<Weight, CACHED_ON_CHIP, CLUSTERED>;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(call.plan.cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = unsigned(call.blocks);
    config.blockDim = THREADS;
    config.dynamicSmemBytes = size_t(call.plan.bytes);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = CLUSTERED;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, call.plan.bytes), "shared memory");
    if (CLUSTERED) {
        // A cluster lies within one group of processors of the chip, so fewer clusters may be resident than the
        // processors could hold. More clusters than that would only start late.
        int resident = 0;
        check(cudaOccupancyMaxActiveClusters(&resident, kernel, &config), "clusters");
        if (!resident) throw std::runtime_error("block_inverse: no cluster fits on the GPU");
        int most = resident * call.plan.cluster;
        config.gridDim = unsigned(call.blocks < most ? call.blocks : most);
    }
    check(cudaLaunchKernelEx(&config, kernel, call), "launch");
}

template <class Weight>
void launch(const OnchipCall& call, cudaStream_t stream) {
    bool on_chip = call.plan.cached_on_chip;
    if (call.plan.cluster > 1)
        on_chip ? launch<Weight, true, true>(call, stream) : launch<Weight, false, true>(call, stream);
    else
        on_chip ? launch<Weight, true, false>(call, stream) : launch<Weight, false, false>(call, stream);
}

}  // namespace

void launch_onchip(const OnchipCall& call, int64_t stream) {
    auto on = reinterpret_cast<cudaStream_t>(stream);
    call.spec.bf16 ? launch<Bf16>(call, on) : launch<float>(call, on);
}

}  // namespace starflow::cuda
