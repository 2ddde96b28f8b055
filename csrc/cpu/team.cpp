#include "team.h"

#include <pthread.h>
#include <time.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

namespace starflow {

namespace {

// Threads of equal work wait less than this number of nanoseconds for each other if each has a core. A thread that waits
// longer sleeps, so that other threads can use its core.
constexpr int64_t SPIN = 20'000;
// Time that a call waits for its threads to start. One that has no core may take milliseconds.
constexpr std::chrono::microseconds START(500);
// Losses of fewer nanoseconds do not count. After a loss, calls use fewer threads for BACKOFF times as long, so that it
// costs little to try again, and if that fails for twice as long as before, up to LONGEST.
constexpr int64_t NOTABLE = 1'000'000, BACKOFF = 16, LONGEST = 500'000'000;

int64_t nanoseconds(clockid_t clock) {
    timespec time;
    clock_gettime(clock, &time);
    return time.tv_sec * int64_t(1'000'000'000) + time.tv_nsec;
}

int64_t now() { return nanoseconds(CLOCK_MONOTONIC); }

// Returns whether `fewer` threads would need less time than `threads`, which have lost `lost` of `time` nanoseconds, if a
// thread saves half of what it would save at best.
bool better_with(int fewer, int threads, int64_t lost, int64_t time) {
    return lost > NOTABLE && lost * 2 * threads > time * (threads - fewer);
}

// What the process knows about its cores: until `retry_at`, calls use up to `limit` threads. backoff: for how long.
// scarce: whether the last call that could use all its threads lost time.
std::atomic<int> cores_allowed{INT_MAX}, limit{1};
std::atomic<bool> scarce{false};
std::atomic<int64_t> retry_at{0}, backoff{0}, rehearsal{-1}, rehearsed{0};

// One call at a time has threads: callers that run at the same time would take each other's cores.
std::mutex threads_taken;

// Makes the next calls use `fewer` threads than this one, which holds `threads_taken`.
void learn(int fewer, int threads, int64_t lost, int64_t start) {
    int64_t longer = BACKOFF * std::max(lost, NOTABLE) / (threads - fewer);
    if (start - retry_at < LONGEST) longer = std::max(longer, 2 * backoff);
    backoff = std::min(longer, LONGEST);
    limit = fewer;
    retry_at = now() + backoff;
    scarce = true;
}

// The threads of OpenMP do not exist in a forked process, where its parallel regions wait for them forever.
std::atomic<bool> forked{false};
[[maybe_unused]] const int watched = pthread_atfork(nullptr, nullptr, [] { forked = true; });

int cores() {
    int found = int(std::thread::hardware_concurrency());
#if defined(__linux__)
    cpu_set_t set;
    if (!sched_getaffinity(0, sizeof set, &set)) found = CPU_COUNT(&set);
#endif
    return std::max(1, std::min(found, cores_allowed.load(std::memory_order_relaxed)));
}

// Returns how many of `threads` threads a call should use now.
int useful(int threads) {
    if (threads == 1 || forked.load(std::memory_order_relaxed)) return 1;
    if (rehearsal.load(std::memory_order_relaxed) >= 0) return threads;
    if (now() < retry_at.load(std::memory_order_relaxed))
        threads = std::min(threads, limit.load(std::memory_order_relaxed));
    return threads == 1 ? 1 : std::min(threads, cores());
}

// Threads that sleep while they have no work, for calls on scarce cores: those of OpenMP spin for milliseconds after each
// call, and take cores from the next one. Used by the call that holds `threads_taken`. Never destroyed, since its threads
// sleep until the process ends.
class Sleepers {
public:
    void run(int threads, RangeFunction function, void* context) {
        std::unique_lock<std::mutex> lock(mutex_);
        function_ = function, context_ = context, wanted_ = busy_ = threads - 1;
        for (; count_ < wanted_; ++count_) std::thread([this, i = count_] { serve(i); }).detach();
        ++number_;
        begins_.notify_all();
        lock.unlock();
        function(0, 1, context);
        lock.lock();
        ended_.wait(lock, [&] { return !busy_; });
    }

private:
    void serve(int index) {
        std::unique_lock<std::mutex> lock(mutex_);
        for (int64_t seen = 0;;) {
            begins_.wait(lock, [&] { return number_ != seen && index < wanted_; });
            seen = number_;
            lock.unlock();
            function_(index + 1, index + 2, context_);
            lock.lock();
            if (!--busy_) ended_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable begins_, ended_;
    RangeFunction function_ = nullptr;
    void* context_ = nullptr;
    int count_ = 0, wanted_ = 0, busy_ = 0;
    int64_t number_ = 0;
};

// Time that a thread spends without a core.
struct Pace {
    int64_t asleep = 0;  // time in which it had nothing to do

    // Returns the nanoseconds since the last call in which the thread could have run, but had no core.
    int64_t off_core() {
        int64_t idle = now() - nanoseconds(CLOCK_THREAD_CPUTIME_ID) - asleep, since = idle - idle_;
        idle_ = idle;
        return std::max<int64_t>(0, since);
    }

private:
    int64_t idle_ = 0;
};
thread_local Pace pace;

// Waits for `done` until the thread should sleep. Returns 0, or the time at which a wait without success began.
template <class Done>
int64_t spin(Done done) {
    int64_t start = 0;
    do {
        for (int i = 0; i < 32; ++i) {
            if (done()) return 0;
#if defined(__x86_64__)
            _mm_pause();
#elif defined(__aarch64__)
            asm volatile("yield");
#endif
        }
        if (!start) start = now();
    } while (now() - start < SPIN);
    return start;
}

template <class T>
int64_t spin_while(const std::atomic<T>& value, T old) {
    return spin([&] { return value.load(std::memory_order_acquire) != old; });
}

// Thrown through the work of a member that leaves its team.
struct Leaves {};

}  // namespace

// Spin barrier, about 0.1 us. If the others had to sleep since the last one that arrives had no core, that one leaves.
class Barrier {
public:
    void wait(Team& team) {
        uint32_t epoch = epoch_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == team.size) {
            bool leaves = waited_since_.load(std::memory_order_relaxed) && gives_up(team.size, epoch);
            gone_ = leaves ? team.rank : -1;
            arrived_.store(0, std::memory_order_relaxed);
            epoch_.store(epoch + 1, std::memory_order_release);
            epoch_.notify_all();
            if (leaves) throw Leaves{};
            return;
        }
        if (int64_t start = spin_while(epoch_, epoch)) sleep(epoch, start);
        if (gone_ < 0) return;
        if (team.rank == --team.size) team.rank = gone_;
    }

    // Returns the time for which the others waited for members without a core, and how many left.
    int64_t lost() const { return lost_ + lost_before_; }
    int left() const { return left_; }

private:
    void sleep(uint32_t epoch, int64_t waiting) {
        int64_t start = now(), none = 0;
        waited_since_.compare_exchange_strong(none, waiting, std::memory_order_relaxed);
        epoch_.wait(epoch, std::memory_order_acquire);
        // From the end of the epoch on, this thread wants a core.
        pace.asleep += std::max<int64_t>(0, ended_ - start);
    }

    bool gives_up(int size, uint32_t epoch) {
        if (int64_t seed = rehearsal.load(std::memory_order_relaxed); seed >= 0) {
            bool leaves = seed && (epoch + uint32_t(seed)) * 2654435761u < 1u << 27;
            rehearsed += leaves;
            return leaves;
        }
        int64_t time = now(), since = waited_since_.exchange(0, std::memory_order_relaxed);
        ended_ = time;
        lost_ += std::min(time - since, pace.off_core());
        if (!better_with(size - 1, size, lost_, time - start_)) return false;
        lost_before_ += lost_;
        lost_ = 0;
        start_ = time;
        ++left_;
        return true;
    }

    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> epoch_{0};
    int gone_ = -1;  // rank of the member that left when the epoch began
    // When the first member that sleeps began to wait, or 0. In a rehearsal, it is never 0.
    alignas(64) std::atomic<int64_t> waited_since_{rehearsal.load(std::memory_order_relaxed) >= 0};
    // Used by the last member that arrives.
    int64_t start_ = now(), lost_ = 0, lost_before_ = 0, ended_ = 0;
    int left_ = 0;
};

void Team::wait_for_others() { barrier->wait(*this); }

namespace {

// Parts of a call that have not ended. Each thread sleeps until all n have; OpenMP would spin for milliseconds.
class Ending {
public:
    explicit Ending(int64_t n) : left_(n) {}

    void done(int64_t count) {
        if (left_.fetch_sub(count, std::memory_order_acq_rel) == count) return left_.notify_all();
        int64_t start = now();
        while (int64_t left = left_.load(std::memory_order_acquire))
            if (spin_while(left_, left)) left_.wait(left, std::memory_order_acquire);
        if (std::this_thread::get_id() == caller_) waited_ = now() - start;
    }
    int64_t waited() const { return waited_; }

private:
    std::thread::id caller_ = std::this_thread::get_id();
    std::atomic<int64_t> left_;
    int64_t waited_ = 0;
};

// Threads that run at the same time. A pool may give fewer threads than places, each with a larger range of places.
class Gathering {
public:
    explicit Gathering(int places) : missing_(places) {}

    // Returns the number of this thread, or -1 if it starts too late. Afterwards, `size` is final.
    int join(int places) {
        std::unique_lock<std::mutex> lock(mutex_);
        if (closed_) return -1;
        int thread = size_++;
        missing_ -= places;
        if (missing_) {
            lock.unlock();
            auto closed = [&] { return closed_.load(std::memory_order_acquire); };
            if (!spin(closed)) return thread;
            lock.lock();
            auto limit = rehearsal >= 0 ? std::chrono::minutes(1) : START;
            changed_.wait_until(lock, std::chrono::system_clock::now() + limit, closed);
        }
        closed_.store(true, std::memory_order_release);
        changed_.notify_all();
        return thread;
    }
    int size() const { return size_; }

private:
    std::mutex mutex_;
    std::condition_variable changed_;
    std::atomic<bool> closed_{false};
    int missing_, size_ = 0;
};

struct Call {
    int64_t pieces;
    PieceFunction run;
    void* context;
    int threads;
    int64_t start = now();
    bool in_teams = pieces < threads;
    std::vector<Barrier> barriers = std::vector<Barrier>(in_teams ? pieces : 0);
    Gathering gathering{threads};
    Ending ending{threads};
    std::atomic<int64_t> next{0}, off_core{0};
    std::atomic<int> started{0};

    // Runs pieces that no other thread has taken.
    void run_alone(int thread) {
        Team team{0, 1, nullptr};
        for (int64_t piece; (piece = next.fetch_add(1, std::memory_order_relaxed)) < pieces;)
            run(piece, thread, thread, team, context);
    }

    void run_in_team(int thread, int threads) {
        auto leader = [&](int64_t team) { return int((team * threads + pieces - 1) / pieces); };
        int64_t piece = thread * pieces / threads;
        int first = leader(piece);
        Team team{thread - first, leader(piece + 1) - first, &barriers[piece]};
        try {
            run(piece, thread, first, team, context);
        } catch (Leaves) {
        }
    }

    void take_part(int places) {
        int64_t late = now() - start;
        int thread = in_teams ? gathering.join(places) : started.fetch_add(1, std::memory_order_relaxed);
        pace.off_core();
        if (thread >= 0) {
            if (in_teams && gathering.size() > pieces)
                run_in_team(thread, gathering.size());
            else
                run_alone(thread);
        }
        late += pace.off_core();
        for (int64_t most = off_core.load(std::memory_order_relaxed);
             most < late && !off_core.compare_exchange_weak(most, late, std::memory_order_relaxed);) {
        }
        ending.done(places);
    }

    void learn_from_losses() {
        int64_t lost = std::min(ending.waited(), off_core.load());
        int with_cores = in_teams ? gathering.size() : threads;
        for (const Barrier& barrier : barriers) lost += barrier.lost(), with_cores -= barrier.left();
        if (with_cores < threads || better_with(threads - 1, threads, lost, now() - start))
            learn(std::min(with_cores, threads - 1), threads, lost, start);
        else if (start > retry_at)
            scarce = false;
    }
};

}  // namespace

void run_pieces(ParallelFor parallel_for, int threads, int64_t pieces, PieceFunction run, void* context) {
    std::unique_lock<std::mutex> lock(threads_taken, std::defer_lock);
    threads = useful(threads);
    if (threads > 1 && !lock.try_lock()) threads = 1;
    Call call{pieces, run, context, threads};
    if (threads == 1) return call.run_alone(0);
    auto take_part = [](int64_t begin, int64_t end, void* context) {
        static_cast<Call*>(context)->take_part(int(end - begin));
    };
    if (scarce) {
        static Sleepers& sleepers = *new Sleepers;
        sleepers.run(threads, take_part, &call);
    } else {
        parallel_for(threads, 1, take_part, &call);
    }
    call.learn_from_losses();
}

void share(ParallelFor parallel_for, int64_t n, int64_t grain, RangeFunction function, void* context) {
    if (n <= 0) return;
    if (n <= grain || forked.load(std::memory_order_relaxed) || cores() == 1) return function(0, n, context);
    parallel_for(n, grain, function, context);
}

void limit_cores(int64_t cores) { cores_allowed = int(std::clamp<int64_t>(cores, 1, INT_MAX)); }

int64_t rehearse(int64_t seed) {
    rehearsal = seed;
    return rehearsed.exchange(0);
}

}  // namespace starflow
