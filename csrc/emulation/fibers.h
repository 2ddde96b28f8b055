// CUDA threads as fibers of one CPU thread, each running until it waits: forward or in reverse order, so that a barrier
// that one order hides is missed in the other. Barriers that not all threads reach are errors.
#pragma once

#include <ucontext.h>

#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

namespace starflow::emulation {

class ThreadBlock {
public:
    ThreadBlock(int index, int count, int threads) : index(index), count(count), fibers(threads), exchanged(threads) {}

    // `body` once a thread. Throws std::logic_error where threads wait for each other in vain.
    void run(bool reverse, std::function<void()> body) {
        this->body = std::move(body);
        running() = this;
        int threads = int(fibers.size());
        for (int i = 0; i < threads; ++i) start(fibers[i]);
        while (true) {
            for (int i = 0; i < threads; ++i) resume(reverse ? threads - 1 - i : i);
            if (all(0, threads, State::done)) break;
            if (!release(threads)) throw std::logic_error("threads of a block wait at different barriers");
        }
        running() = nullptr;
    }

    static ThreadBlock*& running() {
        static ThreadBlock* block = nullptr;
        return block;
    }

    const int index, count;
    int current = 0;

    enum class State { ready, at_block, at_warp, done };

    void wait(State where) {
        Fiber& fiber = fibers[current];
        fiber.state = where;
        swapcontext(&fiber.context, &scheduler);
    }

    // function(of), where of(lane) is what that lane of the warp has given; every lane of it must come.
    template <class Function>
    void with_warp(const void* given, Function function) {
        exchanged[current] = given;
        wait(State::at_warp);
        function([&](int lane) { return exchanged[current / WARP * WARP + lane]; });
        wait(State::at_warp);
    }

private:
    static constexpr int STACK = 64 * 1024, WARP = 32;
    struct Fiber {
        ucontext_t context;
        std::unique_ptr<char[]> stack{new char[STACK]};
        State state = State::ready;
    };

    static void enter() {
        ThreadBlock* block = running();
        block->body();
        block->wait(State::done);
    }

    void start(Fiber& fiber) {
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        makecontext(&fiber.context, enter, 0);
    }

    void resume(int thread) {
        if (fibers[thread].state != State::ready) return;
        current = thread;
        swapcontext(&scheduler, &fibers[thread].context);
    }

    bool all(int first, int last, State state) const {
        for (int i = first; i < last; ++i)
            if (fibers[i].state != state) return false;
        return true;
    }

    // Let the threads go that wait where all of their block or warp do.
    bool release(int threads) {
        bool whole = all(0, threads, State::at_block), any = whole;
        for (int first = 0; first < threads; first += WARP)
            if (whole || all(first, first + WARP, State::at_warp)) {
                for (int i = first; i < first + WARP; ++i) fibers[i].state = State::ready;
                any = true;
            }
        return any;
    }

    std::function<void()> body;
    std::vector<Fiber> fibers;
    std::vector<const void*> exchanged;
    ucontext_t scheduler;
};

inline int thread_index() { return ThreadBlock::running()->current; }
inline int block_index() { return ThreadBlock::running()->index; }
inline int block_count() { return ThreadBlock::running()->count; }
inline void block_barrier() { ThreadBlock::running()->wait(ThreadBlock::State::at_block); }
inline void warp_barrier() { ThreadBlock::running()->wait(ThreadBlock::State::at_warp); }

template <class T, class Function>
void with_warp(const T& given, Function function) {
    ThreadBlock::running()->with_warp(&given, [&](auto of) {
        function([&](int lane) -> const T& { return *static_cast<const T*>(of(lane)); });
    });
}

inline float shuffle_xor(float value, int mask) {
    float other;
    with_warp(value, [&](auto of) { other = of(thread_index() % 32 ^ mask); });
    return other;
}

}  // namespace starflow::emulation
