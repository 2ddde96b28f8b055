#include "team.h"

#include <mutex>
#include <thread>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace starflow {

namespace {

constexpr int SPINS = 4000;

void relax(int& spins) {
    if (++spins > SPINS) std::this_thread::yield();
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

struct Gathering {
    MemberFunction member;
    void* context;
    int64_t places;
    std::atomic<int> members{0};
    std::atomic<int64_t> joined{0};
};

}  // namespace

void Barrier::wait(int size) {
    uint32_t epoch = epoch_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
        arrived_.store(0, std::memory_order_relaxed);
        epoch_.store(epoch + 1, std::memory_order_release);
        return;
    }
    int spins = 0;
    while (epoch_.load(std::memory_order_acquire) == epoch) relax(spins);
}

void run_together(ParallelFor parallel_for, int threads, MemberFunction member, void* context) {
    // One team at a time: two that wait for members in one pool could wait for each other.
    static std::mutex one_team;
    std::lock_guard<std::mutex> lock(one_team);
    Gathering gathering{member, context, threads};
    auto join = [](int64_t begin, int64_t end, void* context) {
        auto& all = *static_cast<Gathering*>(context);
        int thread = all.members.fetch_add(1);
        all.joined.fetch_add(end - begin);
        // A pool may give fewer threads than places, each a larger range: all places taken means all threads are here.
        int spins = 0;
        while (all.joined.load() < all.places) relax(spins);
        all.member(thread, all.members.load(), all.context);
    };
    parallel_for(threads, join, &gathering);
}

}  // namespace starflow
