#include "cpu/thread_pool.h"

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>

#include "selftest.h"

namespace {

struct Counts {
    std::vector<std::atomic<int>> chunks;
    int nested = 0;  // chunks that each chunk runs in turn
    std::atomic<int> nested_calls{0};

    explicit Counts(int64_t n) : chunks(static_cast<size_t>(n)) {}
    bool each_once() const {
        for (const auto& c : chunks)
            if (c != 1) return false;
        return true;
    }
};

void count(void* context, int64_t i) {
    Counts& counts = *static_cast<Counts*>(context);
    ++counts.chunks[static_cast<size_t>(i)];
    if (counts.nested > 0)
        svag::parallel_chunks(
            counts.nested, 3, [](void* c, int64_t) { ++static_cast<Counts*>(c)->nested_calls; }, context);
}

// Threads whose stacks the C library can't all have kept from threads that ended before.
constexpr int kManyThreads = 64;

bool runs_each_chunk_once(int64_t n, int threads) {
    Counts counts(n);
    svag::parallel_chunks(n, threads, count, &counts);
    return counts.each_once();
}

// Forks, and runs 100 chunks in the child, which has no thread of a pool yet.
bool runs_in_a_child(bool has_memory_for_threads) {
    std::fflush(nullptr);
    const pid_t child = fork();
    if (child == 0) {
        const rlimit none{0, 0};
        if (!has_memory_for_threads && setrlimit(RLIMIT_AS, &none) != 0) _exit(2);
        // Twice: the first call must leave the pool as it should be.
        const int threads = has_memory_for_threads ? 2 : kManyThreads;
        _exit(runs_each_chunk_once(100, threads) && runs_each_chunk_once(100, threads) ? 0 : 1);
    }
    int status = -1;
    return waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

}  // namespace

SVAG_CHECK(pool_runs_each_chunk_once) {
    for (const int64_t n : {0, 1, 2, 3, 7, 64, 1000})
        for (const int threads : {0, 1, 2, 3, 8})
            for (int repeat = 0; repeat < 5; ++repeat) EXPECT(runs_each_chunk_once(n, threads));
}

SVAG_CHECK(pool_serves_a_kernel_that_calls_a_kernel) {
    Counts counts(20);
    counts.nested = 5;
    svag::parallel_chunks(20, 4, count, &counts);
    EXPECT(counts.each_once());
    EXPECT(counts.nested_calls == 100);
}

SVAG_CHECK(pool_serves_several_callers_at_once) {
    std::atomic<int> good{0};
    std::vector<std::thread> callers;
    for (int i = 0; i < 4; ++i)
        callers.emplace_back([&good] {
            for (int repeat = 0; repeat < 50; ++repeat) good += runs_each_chunk_once(50, 3);
        });
    for (auto& caller : callers) caller.join();
    EXPECT(good == 200);
}

SVAG_CHECK(pool_works_in_a_forked_child) {
    EXPECT(runs_each_chunk_once(100, 2));
    EXPECT(runs_in_a_child(true));
    EXPECT(runs_each_chunk_once(100, 2));
}

SVAG_CHECK(pool_without_threads_leaves_all_chunks_to_the_caller_in_a_forked_child) {
    EXPECT(runs_in_a_child(false));
}
