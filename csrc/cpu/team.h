// Threads that work on one call together. They come from the caller's own pool, so that no core is oversubscribed and
// the caller's thread count is respected. A call of run_pieces uses fewer threads while other programs take their
// cores: a thread that keeps the others waiting leaves its team, and the next such calls start with fewer, which then are
// threads of this library.
#pragma once

#include <atomic>
#include <cstdint>

namespace starflow {

class Barrier;

// One thread's place among `size` that share a barrier. Both numbers can change at a barrier, when a member leaves.
struct Team {
    int rank, size;
    Barrier* barrier;

    void wait() {
        if (size > 1) wait_for_others();
    }
    // Return this member's share of [0, n), which is contiguous.
    int64_t begin(int64_t n) const { return n * rank / size; }
    int64_t end(int64_t n) const { return n * (rank + 1) / size; }

private:
    // Leaves the calling function by an exception if this member leaves the team.
    void wait_for_others();
};

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);
// Runs function over [0, n) in ranges of at least `grain`, all at once where it uses several threads (as OpenMP does).
using ParallelFor = void (*)(int64_t n, int64_t grain, RangeFunction function, void* context);

// Runs function over [0, n) as parallel_for does, in one range if the process has one core or was forked.
void share(ParallelFor parallel_for, int64_t n, int64_t grain, RangeFunction function, void* context);

// Runs one of the pieces of a call. thread: number of this thread. leader: that of the first thread of its team.
using PieceFunction = void (*)(int64_t piece, int thread, int leader, Team& team, void* context);
// Runs every piece on up to `threads` threads. If there are fewer pieces than threads, each piece gets a team of threads
// that run at the same time, as equal in size as possible.
void run_pieces(ParallelFor parallel_for, int threads, int64_t pieces, PieceFunction run, void* context);

// Sets a number of cores that calls do not exceed.
void limit_cores(int64_t cores);

// Makes calls use all threads asked for, whatever the cores, and lets members leave at barriers that `seed` determines
// (0: none leaves). A negative seed ends this. Returns how many have left since the last call. For tests.
int64_t rehearse(int64_t seed);

}  // namespace starflow
