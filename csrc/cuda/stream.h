// Features of CUDA that the persistent kernel uses: the barrier of a grid, and copies to shared memory that arrive in the
// background. Without nvcc they run on fibers, see emulation/fibers.h.
#pragma once

#include "device.h"

namespace starflow::cuda {

// One per stage of the ring. A copy completes a phase; phases have alternating parities, the first one 0.
using Arrival = uint64_t;

#ifdef __CUDACC__
STARFLOW_DEVICE uint32_t shared_address(const void* at) { return uint32_t(__cvta_generic_to_shared(at)); }

// Adds 1 to a counter in device memory and returns what it held. Orders memory as a release and an acquire.
STARFLOW_DEVICE int count_up(int* counter) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}
STARFLOW_DEVICE void wait_for_count(const int* counter, int least) {
    int count;
    do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
    while (count < least);
}

// Asks for a line of memory to be brought into the L2 cache.
STARFLOW_DEVICE void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int COPYING_THREADS = 1;
#else
constexpr int COPYING_THREADS = 256;
#endif

STARFLOW_DEVICE void begin_arrivals(Arrival* arrival) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(arrival)), "r"(COPYING_THREADS) : "memory");
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Starts a copy of whole 16 bytes to shared memory. All threads of the thread block must call it.
STARFLOW_DEVICE void copy_in_background(Arrival* arrival, void* to, const void* from, int bytes) {
    uint32_t bar = shared_address(arrival), there = shared_address(to);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (thread_index()) return;
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(there),
                 "l"(from), "r"(bytes), "r"(bar)
                 : "memory");
#else
    for (int i = 16 * thread_index(); i < bytes; i += 16 * COPYING_THREADS)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(there + i),
                     "l"(static_cast<const char*>(from) + i)
                     : "memory");
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(bar) : "memory");
#endif
}

// Waits for the copy that completes the phase of this parity.
STARFLOW_DEVICE void wait_for_copy(const Arrival* arrival, int parity) {
    uint32_t done, bar = shared_address(arrival);
    do {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        asm volatile(
            "{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
            : "=r"(done)
            : "r"(bar), "r"(parity)
            : "memory");
#else
        asm volatile(
            "{\n\t.reg .pred p;\n\tmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
            : "=r"(done)
            : "r"(bar), "r"(parity)
            : "memory");
#endif
    } while (!done);
}
#else
using emulation::begin_arrivals;
using emulation::copy_in_background;
using emulation::count_up;
using emulation::prefetch;
using emulation::wait_for_copy;
using emulation::wait_for_count;
#endif

}  // namespace starflow::cuda
