#include "cpu/thread_pool.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <fstream>
#include <mutex>
#include <sstream>
#include <string>
#include <system_error>
#include <thread>

namespace svag {
namespace {

// Chunks that several threads take from.
struct Chunks {
    ChunkFunction function;
    void* context;
    int64_t count;
    std::atomic<int64_t> next{0};

    void work() {
        for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) function(context, i);
    }
};

struct Job {
    Chunks& chunks;
    int helpers_wanted;   // guarded by the pool's mutex
    int helpers_running;  // guarded by the pool's mutex
};

class Pool {
  public:
    void run(Chunks& chunks, int threads) {
        // A second caller, or a kernel that calls a kernel, does its own work rather than wait.
        if (busy_.exchange(true)) {
            chunks.work();
            return;
        }
        const int helpers = static_cast<int>(chunks.count < threads ? chunks.count : threads) - 1;
        Job job{chunks, helpers, 0};
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (workers_ < helpers && start_worker()) ++workers_;
            job_ = &job;
        }
        if (helpers == 1)
            wake_.notify_one();
        else
            wake_.notify_all();
        chunks.work();
        std::unique_lock<std::mutex> lock(mutex_);
        job_ = nullptr;  // a helper that has not woken yet is no longer waited for
        done_.wait(lock, [&job] { return job.helpers_running == 0; });
        busy_ = false;
    }

  private:
    bool start_worker() {
        try {
            std::thread([this] { serve(); }).detach();
            return true;
        } catch (const std::system_error&) {
            return false;  // no memory or no thread left: the caller's own thread does all the work
        }
    }

    [[noreturn]] void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return job_ != nullptr && job_->helpers_wanted > 0; });
            Job* job = job_;
            --job->helpers_wanted;
            ++job->helpers_running;
            lock.unlock();
            job->chunks.work();
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

// Never destroyed: detached threads wait in it until the process ends.
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
    Pool* existing = the_pool.load();
    if (existing == nullptr) {
        Pool* fresh = new Pool;
        if (the_pool.compare_exchange_strong(existing, fresh)) return *fresh;
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

// Whether this process, before it loaded this module, was made by a fork and has not replaced its program since: Linux
// says so by PF_FORKNOEXEC, 0x40, in the ninth field of /proc/self/stat.
bool loaded_in_a_fork() {
    std::ifstream file("/proc/self/stat");
    std::string line;
    std::getline(file, line);
    std::istringstream fields(line.substr(line.rfind(')') + 1));  // the second field, a name, may hold anything
    std::string skipped;
    for (int field = 3; field < 9; ++field) fields >> skipped;
    unsigned long flags = 0;
    fields >> flags;
    return (flags & 0x40) != 0;
}

// A forked child has neither its parent's pool threads, so it starts a pool of its own, nor the team's: the runtime
// would wait there for them for ever if the parent used them.
std::atomic<bool> forked{loaded_in_a_fork()};
const bool forks_are_seen = pthread_atfork(nullptr, nullptr, [] {
                                forked = true;
                                the_pool = nullptr;
                            }) == 0;

}  // namespace

void parallel_chunks(int64_t chunks, int threads, ChunkFunction function, void* context) noexcept {
    Chunks shared{function, context, chunks};
    const OpenMpParallel parallel = openmp();
    if (threads <= 1 || chunks <= 1)
        shared.work();
    else if (parallel != nullptr && forks_are_seen && !forked)
        // The team has the size that PyTorch gives it, whatever the chunks: another size would start new threads.
        parallel([](void* data) { static_cast<Chunks*>(data)->work(); }, &shared, static_cast<unsigned>(threads), 0);
    else
        pool().run(shared, threads);
}

}  // namespace svag
