// Threads that work on one group together. They come from the caller's own pool, so that no core is oversubscribed and
// the caller's thread count is respected.
#pragma once

#include <atomic>
#include <cstdint>

namespace starflow {

// Spin barrier, about 0.1 us. A thread that has waited long goes to sleep, in case another thread has no core.
class Barrier {
public:
    void wait(int size);

private:
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> epoch_{0};
};

// One thread's place among `size` that share a barrier.
struct Team {
    int rank, size;
    Barrier* barrier;

    void wait() const {
        if (size > 1) barrier->wait(size);
    }
    // Return this member's share of [0, n), which is contiguous.
    int64_t begin(int64_t n) const { return n * rank / size; }
    int64_t end(int64_t n) const { return n * (rank + 1) / size; }
};

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);
// Runs function over [0, n) in ranges on up to `n` threads, all at once where it uses several (as OpenMP does).
using ParallelFor = void (*)(int64_t n, RangeFunction function, void* context);

using MemberFunction = void (*)(int thread, int threads, void* context);
// Calls member(i, n, context) on n threads that all run at the same time. The pool determines n <= threads; inside a
// parallel region n is 1.
void run_together(ParallelFor parallel_for, int threads, MemberFunction member, void* context);

}  // namespace starflow
