#include "cpu/thread_pool.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace svag {
namespace {

struct Job {
    ChunkFunction function;
    void* context;
    int64_t chunks;
    std::atomic<int64_t> next{0};
    int helpers_wanted;   // guarded by the pool's mutex
    int helpers_running;  // guarded by the pool's mutex

    void work() {
        for (int64_t i = next.fetch_add(1); i < chunks; i = next.fetch_add(1)) function(context, i);
    }
};

class Pool {
  public:
    void run(int64_t chunks, int threads, ChunkFunction function, void* context) {
        // A second caller, or a kernel that calls a kernel, does its own work rather than wait.
        if (busy_.exchange(true)) {
            for (int64_t i = 0; i < chunks; ++i) function(context, i);
            return;
        }
        Job job;
        job.function = function;
        job.context = context;
        job.chunks = chunks;
        const int helpers = static_cast<int>(chunks < threads ? chunks : threads) - 1;
        job.helpers_wanted = helpers;
        job.helpers_running = 0;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (workers_ < helpers) {
                std::thread([this] { serve(); }).detach();
                ++workers_;
            }
            job_ = &job;
        }
        if (helpers == 1)
            wake_.notify_one();
        else
            wake_.notify_all();
        job.work();
        std::unique_lock<std::mutex> lock(mutex_);
        job_ = nullptr;  // a helper that has not woken yet is no longer waited for
        done_.wait(lock, [&job] { return job.helpers_running == 0; });
        busy_ = false;
    }

  private:
    [[noreturn]] void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return job_ != nullptr && job_->helpers_wanted > 0; });
            Job* job = job_;
            --job->helpers_wanted;
            ++job->helpers_running;
            lock.unlock();
            job->work();
            lock.lock();
            if (--job->helpers_running == 0) done_.notify_one();
        }
    }

    std::atomic<bool> busy_{false};
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    Job* job_ = nullptr;
    int workers_ = 0;
};

// Never destroyed: detached threads wait in it until the process ends. A forked child has none of them, so it
// starts a pool of its own.
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
    Pool* existing = the_pool.load();
    if (existing == nullptr) {
        Pool* fresh = new Pool;
        if (the_pool.compare_exchange_strong(existing, fresh)) {
            pthread_atfork(nullptr, nullptr, [] { the_pool.store(new Pool); });
            return *fresh;
        }
        delete fresh;
    }
    return *existing;
}

// ---- the OpenMP team that PyTorch runs its own operators on

// An entry of the OpenMP runtime's binary interface, which GCC's, LLVM's and Intel's runtimes all export.
using OpenMpParallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// After an operator OpenMP's threads spin for some milliseconds, waiting for the next: a kernel on threads of its own
// would find the cores taken. Null where the process has loaded no OpenMP runtime for all to see, as PyTorch does.
OpenMpParallel openmp() {
    static const auto entry = reinterpret_cast<OpenMpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return entry;
}

// A forked child has none of the team's threads, and the runtime waits there for them for ever if its parent used them.
std::atomic<bool> forked{false};
const bool forks_are_seen = pthread_atfork(nullptr, nullptr, [] { forked = true; }) == 0;

struct Shared {
    ChunkFunction function;
    void* context;
    int64_t chunks;
    std::atomic<int64_t> next{0};
};

void run_on_team(OpenMpParallel parallel, int64_t chunks, int threads, ChunkFunction function, void* context) {
    Shared job{function, context, chunks};
    // The team has the size that PyTorch gives it, whatever the chunks: another size would start threads anew.
    parallel(
        [](void* data) {
            Shared& job = *static_cast<Shared*>(data);
            for (int64_t i = job.next.fetch_add(1); i < job.chunks; i = job.next.fetch_add(1)) job.function(job.context, i);
        },
        &job, static_cast<unsigned>(threads), 0);
}

}  // namespace

void parallel_chunks(int64_t chunks, int threads, ChunkFunction function, void* context) {
    if (threads <= 1 || chunks <= 1)
        for (int64_t i = 0; i < chunks; ++i) function(context, i);
    else if (const OpenMpParallel parallel = openmp(); parallel != nullptr && forks_are_seen && !forked)
        run_on_team(parallel, chunks, threads, function, context);
    else
        pool().run(chunks, threads, function, context);
}

}  // namespace svag
