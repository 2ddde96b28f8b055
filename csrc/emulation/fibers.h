// CUDA threads as fibers of one CPU thread. Each runs until it waits, in forward or in reverse order: a missing barrier
// that one order hides shows in the other. A thread block of a cluster runs until it waits for the others, then the
// next one runs, so that reading or overwriting too early gives a wrong result. Barriers that not all threads reach are
// errors.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

namespace starflow::emulation {

class Cluster {
public:
    // Takes the thread blocks first .. first + blocks - 1 of count. The shared memory of each holds NaN at first.
    Cluster(int first, int blocks, int count, int threads, int bytes)
        : first(first), count(count), threads(threads), fibers(blocks * threads), exchanged(blocks * threads) {
        for (int i = 0; i < blocks; ++i) memories.emplace_back(bytes / sizeof(Word), Word{{~0u, ~0u, ~0u, ~0u}});
    }

    // Calls body(shared memory) once per thread. Throws std::logic_error if threads deadlock.
    void run(bool reverse, std::function<void(char*)> body) {
        this->body = std::move(body);
        running() = this;
        int blocks = int(memories.size()), all_threads = int(fibers.size());
        for (Fiber& fiber : fibers) start(fiber);
        while (true) {
            for (int i = 0; i < blocks; ++i) run_block(reverse ? blocks - 1 - i : i, reverse);
            if (all(0, all_threads, State::done)) break;
            if (!release(0, all_threads, State::at_cluster))
                throw std::logic_error("threads wait at different barriers");
        }
        running() = nullptr;
    }

    static Cluster*& running() {
        static Cluster* cluster = nullptr;
        return cluster;
    }

    const int first, count, threads;
    // The running fiber, its index in its thread block, and the rank of that block.
    int current = 0, thread = 0, rank = 0;

    enum class State { ready, at_cluster, at_block, at_warp, done };

    void wait(State where) {
        Fiber& fiber = fibers[current];
        fiber.state = where;
        swapcontext(&fiber.context, &scheduler);
    }

    // Returns function(of), where of(lane) is the value that this lane of the warp has given. All lanes must call it.
    template <class Function>
    void with_warp(const void* given, Function function) {
        exchanged[current] = given;
        wait(State::at_warp);
        function([&](int lane) { return exchanged[current / WARP * WARP + lane]; });
        wait(State::at_warp);
    }

    // Returns the address in another thread block's shared memory that corresponds to `here` in that of the running
    // one.
    char* mapped(const void* here, int other) {
        return memory(other) + (static_cast<const char*>(here) - memory(rank));
    }

private:
    static constexpr int STACK = 64 * 1024, WARP = 32;
    struct Fiber {
        ucontext_t context;
        std::unique_ptr<char[]> stack{new char[STACK]};
        State state = State::ready;
    };

    struct alignas(16) Word {
        uint32_t values[4];
    };

    static void enter() {
        Cluster* cluster = running();
        cluster->body(cluster->memory(cluster->rank));
        cluster->wait(State::done);
    }

    char* memory(int rank) { return reinterpret_cast<char*>(memories[rank].data()); }

    void start(Fiber& fiber) {
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        makecontext(&fiber.context, enter, 0);
    }

    void resume(int fiber) {
        if (fibers[fiber].state != State::ready) return;
        current = fiber, thread = fiber % threads, rank = fiber / threads;
        swapcontext(&scheduler, &fibers[fiber].context);
    }

    bool all(int first, int last, State state) const {
        for (int i = first; i < last; ++i)
            if (fibers[i].state != state) return false;
        return true;
    }

    bool release(int first, int last, State from) {
        if (!all(first, last, from)) return false;
        for (int i = first; i < last; ++i) fibers[i].state = State::ready;
        return true;
    }

    // Runs a thread block until its threads wait for other thread blocks, deadlock, or are done.
    void run_block(int rank, bool reverse) {
        int begin = rank * threads, end = begin + threads;
        for (bool any = true; any;) {
            for (int i = 0; i < threads; ++i) resume(reverse ? end - 1 - i : begin + i);
            any = release(begin, end, State::at_block);
            for (int warp = begin; warp < end; warp += WARP) any |= release(warp, warp + WARP, State::at_warp);
        }
    }

    std::vector<std::vector<Word>> memories;
    std::function<void(char*)> body;
    std::vector<Fiber> fibers;
    std::vector<const void*> exchanged;
    ucontext_t scheduler;
};

inline int thread_index() { return Cluster::running()->thread; }
inline int cluster_rank() { return Cluster::running()->rank; }
inline int block_index() { return Cluster::running()->first + cluster_rank(); }
inline int block_count() { return Cluster::running()->count; }
inline void cluster_barrier() { Cluster::running()->wait(Cluster::State::at_cluster); }
inline void block_barrier() { Cluster::running()->wait(Cluster::State::at_block); }
inline void warp_barrier() { Cluster::running()->wait(Cluster::State::at_warp); }

inline void store_at(int rank, float* at, float value) {
    *reinterpret_cast<float*>(Cluster::running()->mapped(at, rank)) = value;
}

template <class T, class Function>
void with_warp(const T& given, Function function) {
    Cluster::running()->with_warp(
        &given, [&](auto of) { function([&](int lane) -> const T& { return *static_cast<const T*>(of(lane)); }); });
}

inline float shuffle_xor(float value, int mask) {
    float other;
    with_warp(value, [&](auto of) { other = of(thread_index() % 32 ^ mask); });
    return other;
}

}  // namespace starflow::emulation
