// The on-chip inverse executed on the CPU, thread by thread, in memory that holds NaN before it is written.
#include "../cuda/onchip.h"

namespace starflow::cuda {

// `stream` is the order of the threads: 0 forward, 1 in reverse.
void launch_onchip(const OnchipCall& call, int64_t stream) {
    for (int index = 0; index < call.blocks; ++index) {
        std::vector<Quad<uint32_t>> shared(call.plan.bytes / 16, Quad<uint32_t>{{~0u, ~0u, ~0u, ~0u}});
        emulation::ThreadBlock block(index, call.blocks, THREADS);
        block.run(stream == 1, [&] {
            auto memory = reinterpret_cast<char*>(shared.data());
            if (call.plan.cached_on_chip)
                call.spec.bf16 ? run_onchip<Bf16, true>(call, memory) : run_onchip<float, true>(call, memory);
            else
                call.spec.bf16 ? run_onchip<Bf16, false>(call, memory) : run_onchip<float, false>(call, memory);
        });
    }
}

}  // namespace starflow::cuda
