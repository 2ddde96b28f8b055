// The persistent inverse executed on the CPU, thread by thread, in memory that holds NaN before it is written.
#include "../cuda/persistent.h"

namespace starflow::cuda {

// `stream` is the order of the threads.
void launch_persistent(const PersistentCall& call, int64_t stream) {
    emulation::Cluster grid(0, call.blocks, call.blocks, THREADS, call.schedule.bytes);
    choose_persistent(call, [&](auto kernel) {
        grid.run(emulation::Order(stream), [&](char* shared) { kernel.run(call, shared); });
    });
}

}  // namespace starflow::cuda
