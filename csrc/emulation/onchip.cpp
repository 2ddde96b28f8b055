// The on-chip inverse executed on the CPU, thread by thread, in memory that holds NaN before it is written.
#include "../cuda/onchip.h"

namespace starflow::cuda {

namespace {

template <class Weight>
void run(const OnchipCall& call, char* shared) {
    bool on_chip = call.plan.cached_on_chip;
    if (call.plan.cluster > 1)
        on_chip ? run_onchip<Weight, true, true>(call, shared) : run_onchip<Weight, false, true>(call, shared);
    else
        on_chip ? run_onchip<Weight, true, false>(call, shared) : run_onchip<Weight, false, false>(call, shared);
}

}  // namespace

// `stream` is the order of the threads.
void launch_onchip(const OnchipCall& call, int64_t stream) {
    for (int first = 0; first < call.blocks; first += call.plan.cluster) {
        emulation::Cluster cluster(first, call.plan.cluster, call.blocks, THREADS, call.plan.bytes);
        cluster.run(emulation::Order(stream),
                    [&](char* shared) { call.spec.bf16 ? run<Bf16>(call, shared) : run<float>(call, shared); });
    }
}

}  // namespace starflow::cuda
