#include "team.h"

#include <mutex>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace starflow {

namespace {

// About 20 us: threads of equal work wait less than this for each other if each has a core. A thread that waits longer
// sleeps, so that other threads can use its core.
constexpr int SPINS = 1000;

// Returns once `value` is no longer `old`.
template <class T>
void wait_while(const std::atomic<T>& value, T old) {
    for (int spin = 0; spin < SPINS; ++spin) {
        if (value.load(std::memory_order_acquire) != old) return;
#if defined(__x86_64__)
        _mm_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }
    value.wait(old, std::memory_order_acquire);
}

struct Gathering {
    MemberFunction member;
    void* context;
    int places;
    std::atomic<int> members{0}, joined{0};
};

}  // namespace

void Barrier::wait(int size) {
    uint32_t epoch = epoch_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
        arrived_.store(0, std::memory_order_relaxed);
        epoch_.store(epoch + 1, std::memory_order_release);
        epoch_.notify_all();
        return;
    }
    wait_while(epoch_, epoch);
}

void run_together(ParallelFor parallel_for, int threads, MemberFunction member, void* context) {
    // Only one team runs at a time: two teams that wait for members from one pool could wait for each other.
    static std::mutex one_team;
    std::lock_guard<std::mutex> lock(one_team);
    Gathering gathering{member, context, threads};
    auto join = [](int64_t begin, int64_t end, void* context) {
        auto& all = *static_cast<Gathering*>(context);
        int thread = all.members.fetch_add(1);
        // A pool may give fewer threads than places, each with a larger range. Once all places are taken, all threads
        // are here.
        int joined = all.joined.fetch_add(int(end - begin)) + int(end - begin);
        all.joined.notify_all();
        for (; joined < all.places; joined = all.joined.load()) wait_while(all.joined, joined);
        all.member(thread, all.members.load(), all.context);
    };
    parallel_for(threads, join, &gathering);
}

}  // namespace starflow
