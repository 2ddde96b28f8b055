// Checks of cpu/team.cpp on threads that a race detector sees: members leave at drawn barriers, and callers run at the
// same time. Ends with status 1 if a result is wrong. scripts/check_sanitizers.sh builds and runs it.
#include "../cpu/team.h"

#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

using namespace starflow;

constexpr int64_t VALUES = 23, PHASES = 200;

void on_threads(int64_t n, int64_t, RangeFunction function, void* context) {
    std::vector<std::thread> threads;
    for (int64_t i = 1; i < n; ++i) threads.emplace_back([=] { function(i, i + 1, context); });
    function(0, 1, context);
    for (std::thread& thread : threads) thread.join();
}

// Every phase replaces each value by a function of all values of the phase before.
struct Work {
    std::vector<int64_t> values, sums;

    explicit Work(int64_t pieces) : values(pieces * VALUES, 1), sums(pieces * VALUES) {}
    void run(int64_t piece, Team& team) {
        int64_t *value = &values[piece * VALUES], *sum = &sums[piece * VALUES];
        for (int64_t phase = 0; phase < PHASES; ++phase) {
            for (int64_t i = team.begin(VALUES); i < team.end(VALUES); ++i) {
                sum[i] = i;
                for (int64_t j = 0; j < VALUES; ++j) sum[i] = sum[i] * 31 % 1000003 + value[j];
            }
            team.wait();
            for (int64_t i = team.begin(VALUES); i < team.end(VALUES); ++i) value[i] = sum[VALUES - 1 - i];
            team.wait();
        }
    }
    static void run(int64_t piece, int, int, Team& team, void* context) {
        static_cast<Work*>(context)->run(piece, team);
    }
};

void check(int threads, int64_t pieces) {
    Work expected(pieces), found(pieces);
    run_pieces(on_threads, 1, pieces, Work::run, &expected);
    run_pieces(on_threads, threads, pieces, Work::run, &found);
    if (found.values == expected.values) return;
    fprintf(stderr, "%d threads, %lld pieces: wrong\n", threads, static_cast<long long>(pieces));
    exit(1);
}

}  // namespace

int main() {
    int64_t left = 0;
    for (int64_t seed = 0; seed < 20; ++seed) {
        left += rehearse(seed);
        for (int threads = 2; threads <= 5; ++threads)
            for (int64_t pieces = 1; pieces <= 6; ++pieces) check(threads, pieces);
        std::thread other([] { check(3, 2); });
        check(4, 1);
        other.join();
    }
    rehearse(-1);
    for (int i = 0; i < 20; ++i) check(4, 1 + i % 2);
    printf("%lld members left\n", static_cast<long long>(left));
    return left == 0;
}
