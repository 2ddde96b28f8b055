// CUDA threads as fibers of one CPU thread. Each runs until it waits, in an order that the caller chooses: a missing
// barrier that one order hides shows in another. A thread block of a cluster, or of a grid whose thread blocks wait for
// each other, runs until it waits for the others, then the next one runs, so that reading or overwriting too early
// gives a wrong result. Copies in the background destroy what they will overwrite when they start, and arrive as late
// as possible or at any time. Barriers that not all threads reach, and waiting for what does not happen, are errors.
// Under ThreadSanitizer, only barriers, atomic operations and arrivals order the memory of threads, shuffles do not.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#define STARFLOW_UNSEEN __attribute__((no_sanitize("thread"), noinline))
#else
#define STARFLOW_UNSEEN
inline void* __tsan_get_current_fiber() { return nullptr; }
inline void* __tsan_create_fiber(unsigned) { return nullptr; }
inline void __tsan_destroy_fiber(void*) {}
inline void __tsan_switch_to_fiber(void*, unsigned) {}
inline void __tsan_acquire(void*) {}
inline void __tsan_release(void*) {}
#endif

namespace starflow::emulation {

// Order of fibers and of arrivals: forward, in reverse, or, from 2 on, the seed of a random one.
using Order = unsigned;

// A value that fibers share without an order of their memory, and without a report of a race.
template <class T>
class Relaxed {
public:
    Relaxed(T value = T{}) : value(value) {}
    operator T() const { return value.load(std::memory_order_relaxed); }
    void operator=(T to) { value.store(to, std::memory_order_relaxed); }

private:
    std::atomic<T> value;
};

struct Context {
    ucontext_t first;  // where it starts
    void* registers[5];
    bool started = false;
};

// Continues at `to` and keeps this place in `from`. swapcontext, which the sanitizers know, takes two system calls.
__attribute__((noinline)) inline void swap(Context& from, Context& to) {
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
    swapcontext(&from.first, &to.first);
#else
    from.started = true;
    if (__builtin_setjmp(from.registers)) return;
    if (to.started) __builtin_longjmp(to.registers, 1);
    setcontext(&to.first);
#endif
}

class Cluster {
public:
    // Takes the thread blocks first .. first + blocks - 1 of count. The shared memory of each holds NaN at first.
    Cluster(int first, int blocks, int count, int threads, int bytes)
        : first(first),
          count(count),
          threads(threads),
          fibers(blocks * threads),
          exchanged(blocks * threads),
          copies(blocks * MOST_COPIES) {
        for (int i = 0; i < blocks; ++i) memories.emplace_back(bytes / sizeof(Word), Word{{~0u, ~0u, ~0u, ~0u}});
    }

    // Calls body(shared memory) once per thread. Throws std::logic_error if threads deadlock.
    void run(Order order, std::function<void(char*)> body) {
        this->body = std::move(body), this->order = order;
        random.seed(order);
        running() = this;
        own = __tsan_get_current_fiber();
        int blocks = int(memories.size()), all_threads = int(fibers.size());
        for (Fiber& fiber : fibers) start(fiber);
        while (!all(0, all_threads, State::done)) {
            bool any = false;
            for (int i : ordered(blocks)) any |= run_block(i);
            any |= deliver();
            if (!any && !release(0, all_threads, State::at_cluster))
                throw std::logic_error("threads wait at different barriers");
        }
        __tsan_acquire(&this->body);
        for (Fiber& fiber : fibers) __tsan_destroy_fiber(fiber.races);
        running() = nullptr;
    }

    static Relaxed<Cluster*>& running() {
        static Relaxed<Cluster*> cluster;
        return cluster;
    }

    const int first, count, threads;
    // The running fiber, its index in its thread block, and the rank of that block.
    Relaxed<int> current, thread, rank;

    enum class State { at_warp, at_block, at_cluster, ready, polling, done };

    void wait(State where, bool orders = true) {
        Fiber& fiber = fibers[current];
        char* meeting = where <= State::at_cluster && orders ? &fiber.meet(where, *this) : nullptr;
        void* main = own;
        fiber.state = where;
        if (meeting) __tsan_release(meeting);
        if (where == State::done) __tsan_release(&body);
        __tsan_switch_to_fiber(main, 1);
        swap(fiber.context, scheduler);
        if (meeting) __tsan_acquire(meeting);
    }

    // Waits until holds(at, value), which only reads Relaxed values.
    using Condition = bool (*)(const void* at, int value);
    void wait_until(Condition holds, const void* at, int value) {
        if (holds(at, value)) return;
        Fiber& fiber = fibers[current];
        fiber.condition = holds, fiber.condition_at = at, fiber.condition_value = value;
        wait(State::polling);
    }

    // Calls function(of), where of(lane, i) is word i that this lane of the warp has given. All lanes must call it.
    template <class Function>
    void with_warp(const uint32_t* given, int words, Function function) {
        int self = current, first = self / WARP * WARP;
        for (int i = 0; i < words; ++i) exchanged[self][i] = given[i];
        wait(State::at_warp, false);
        function([&](int lane, int i) -> uint32_t { return exchanged[first + lane][i]; });
        wait(State::at_warp, false);
    }

    // Returns the address in another thread block's shared memory that corresponds to `here` in that of the running
    // one.
    char* mapped(const void* here, int other) {
        return memory(other) + (static_cast<const char*>(here) - memory(rank));
    }

    // Starts a copy, at whose end the number of arrivals rises.
    void copy(Relaxed<uint64_t>* arrivals, void* to, const void* from, int bytes) {
        memset(to, 0xff, size_t(bytes));
        __tsan_release(arrivals);
        size_t slot = size_t(rank) * MOST_COPIES;
        while (copies[slot].bytes) ++slot;
        copies[slot].arrivals = arrivals, copies[slot].to = static_cast<char*>(to);
        copies[slot].from = static_cast<const char*>(from), copies[slot].bytes = bytes;
    }

private:
    static constexpr int STACK = 64 * 1024, WARP = 32, WORDS = 6;
    struct Fiber {
        Context context;
        std::unique_ptr<char[]> stack{new char[STACK]};
        Relaxed<State> state = State::ready;
        Relaxed<Condition> condition;
        Relaxed<const void*> condition_at;
        Relaxed<int> condition_value;
        void* races;
        unsigned met[3] = {};

        // Returns the object that stands for the next barrier of a kind. Two take turns, since a thread may already
        // be at the next barrier when another one leaves this one.
        char& meet(State where, Cluster& cluster) {
            int unit =
                where == State::at_cluster ? 0 : cluster.current / (where == State::at_block ? cluster.threads : WARP);
            return cluster.meetings[size_t(where)][2 * size_t(unit) + met[int(where)]++ % 2];
        }
    };

    struct alignas(16) Word {
        uint32_t values[4];
    };

    static constexpr int MOST_COPIES = 33;  // per thread block at a time, and one that stays free
    struct Copy {
        Relaxed<Relaxed<uint64_t>*> arrivals;
        Relaxed<char*> to;
        Relaxed<const char*> from;
        Relaxed<int> bytes;  // 0 for none
    };

    static void enter() {
        Cluster* cluster = running();
        cluster->body(cluster->memory(cluster->rank));
        cluster->wait(State::done);
    }

    char* memory(int rank) { return reinterpret_cast<char*>(memories[rank].data()); }

    void start(Fiber& fiber) {
        getcontext(&fiber.context.first);
        fiber.context.first.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.first.uc_stack.ss_size = STACK;
        makecontext(&fiber.context.first, enter, 0);
        fiber.races = __tsan_create_fiber(0);
    }

    // Returns 0 .. n - 1 in the order of the fibers.
    std::vector<int> ordered(int n) {
        std::vector<int> numbers(n);
        for (int i = 0; i < n; ++i) numbers[i] = order == 1 ? n - 1 - i : i;
        if (order > 1) std::shuffle(numbers.begin(), numbers.end(), random);
        return numbers;
    }

    // Runs a fiber until it waits; returns false if it waits already.
    bool resume(int index) {
        Fiber& fiber = fibers[index];
        if (fiber.state == State::polling) {
            Condition holds = fiber.condition;
            if (!holds(fiber.condition_at, fiber.condition_value)) return false;
        } else if (fiber.state != State::ready) {
            return false;
        }
        current = index, thread = index % threads, rank = index / threads;
        fiber.state = State::ready;
        __tsan_switch_to_fiber(fiber.races, 1);
        swap(scheduler, fiber.context);
        return true;
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

    // Runs a thread block until its threads wait for other thread blocks or arrivals, deadlock, or are done. Returns
    // whether any ran. In a random order, each warp runs as far as it comes before the next one, and a thread block may
    // rest before it must.
    bool run_block(int rank) {
        int begin = rank * threads, end = begin + threads;
        bool ran = false;
        for (bool any = true; any; ran |= any) {
            any = false;
            for (int warp : ordered(threads / WARP)) {
                int lanes = begin + warp * WARP;
                bool more = true;
                while (more) {
                    for (int lane : ordered(WARP)) any |= resume(lanes + lane);
                    more = release(lanes, lanes + WARP, State::at_warp);
                    any |= more;
                    if (order <= 1) break;
                }
                if (order > 1 && any && random() % 32 == 0) return true;
            }
            any |= release(begin, end, State::at_block);
        }
        return ran;
    }

    STARFLOW_UNSEEN static void move(char* to, const char* from, int bytes) {
        for (int i = 0; i < bytes; ++i) static_cast<volatile char*>(to)[i] = from[i];
    }

    // Lets copies arrive: all of them, in a random order only some. Returns whether one did.
    bool deliver() {
        bool any = false;
        for (int i : ordered(int(copies.size()))) {
            Copy& copy = copies[size_t(i)];
            if (!copy.bytes || (any && order > 1 && random() % 2)) continue;
            move(copy.to, copy.from, copy.bytes);
            Relaxed<uint64_t>* arrivals = copy.arrivals;
            *arrivals = *arrivals + 1;
            copy.bytes = 0;
            any = true;
        }
        return any;
    }

    std::vector<std::vector<Word>> memories;
    std::function<void(char*)> body;
    std::vector<Fiber> fibers;
    std::vector<std::array<Relaxed<uint32_t>, WORDS>> exchanged;
    std::vector<Copy> copies;
    std::vector<char> meetings[3] = {std::vector<char>(2 * fibers.size()), std::vector<char>(2 * fibers.size()),
                                     std::vector<char>(2)};
    Order order = 0;
    std::mt19937 random;
    Context scheduler;
    void* own = nullptr;
};

inline Cluster* cluster() { return Cluster::running(); }
inline int thread_index() { return cluster()->thread; }
inline int cluster_rank() { return cluster()->rank; }
inline int block_index() { return cluster()->first + cluster_rank(); }
inline int block_count() { return cluster()->count; }
inline void cluster_barrier() { cluster()->wait(Cluster::State::at_cluster); }
inline void block_barrier() { cluster()->wait(Cluster::State::at_block); }
inline void warp_barrier() { cluster()->wait(Cluster::State::at_warp); }

inline void store_at(int rank, float* at, float value) {
    *reinterpret_cast<float*>(cluster()->mapped(at, rank)) = value;
}

template <int N, class Function>
void with_warp(const uint32_t (&given)[N], Function function) {
    cluster()->with_warp(given, N, function);
}

inline float shuffle_xor(float value, int mask) {
    uint32_t given[1];
    memcpy(given, &value, sizeof value);
    with_warp(given, [&](auto of) {
        uint32_t other = of(thread_index() % 32 ^ mask, 0);
        memcpy(&value, &other, sizeof value);
    });
    return value;
}

// An int of device memory, seen as an atomic one.
inline std::atomic<int>& atomic(const int* counter) {
    return *reinterpret_cast<std::atomic<int>*>(const_cast<int*>(counter));
}

inline int count_up(int* counter) { return atomic(counter).fetch_add(1, std::memory_order_acq_rel); }

inline void wait_for_count(const int* counter, int least) {
    auto reached = [](const void* at, int least) {
        return atomic(static_cast<const int*>(at)).load(std::memory_order_relaxed) >= least;
    };
    cluster()->wait_until(reached, counter, least);
    (void)atomic(counter).load(std::memory_order_acquire);
}

inline void prefetch(const void*) {}

// The arrivals at a place in shared memory count from 0.
inline Relaxed<uint64_t>* arrivals(const uint64_t* arrival) {
    return reinterpret_cast<Relaxed<uint64_t>*>(const_cast<uint64_t*>(arrival));
}

inline void begin_arrivals(uint64_t* arrival) { *arrivals(arrival) = 0; }

inline void copy_in_background(uint64_t* arrival, void* to, const void* from, int bytes) {
    // On some devices every thread copies a part.
    if (*arrivals(arrival) == ~uint64_t(0)) throw std::logic_error("a copy before its arrivals begin");
    if (thread_index() == 0) cluster()->copy(arrivals(arrival), to, from, bytes);
}

inline void wait_for_copy(const uint64_t* arrival, int parity) {
    auto arrived = [](const void* at, int parity) {
        return int(*arrivals(static_cast<const uint64_t*>(at)) % 2) != parity;
    };
    cluster()->wait_until(arrived, arrival, parity);
    __tsan_acquire(arrivals(arrival));
}

}  // namespace starflow::emulation
