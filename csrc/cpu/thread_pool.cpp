#include "cpu/thread_pool.h"

#include <pthread.h>
#include <unistd.h>

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
        if (threads <= 1 || chunks <= 1 || busy_.exchange(true)) {
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

}  // namespace

void parallel_chunks(int64_t chunks, int threads, ChunkFunction function, void* context) {
    if (chunks > 0) pool().run(chunks, threads, function, context);
}

}  // namespace svag
