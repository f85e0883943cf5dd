// Runs a CUDA kernel's blocks on the CPU: one after the other, each thread of a block as a fiber that runs until it
// reaches a barrier or a shuffle. The order in which fibers and blocks run is chosen by the test, so a result that
// depends on it shows. Reported, and answered with cudaErrorLaunchFailure:
//   - barriers and shuffles that not every thread reaches (divergence);
//   - compiled with -fsanitize=thread, whose calls are answered here instead of by libtsan: two threads of a block
//     on one address, at least one of them writing, without a barrier between (missing __syncthreads or __syncwarp);
//     two blocks of a launch likewise; shared memory read before it is written; misaligned accesses;
//     one thread's local memory touched by another.
// Accesses out of bounds are AddressSanitizer's, in a build of its own.
#include <cuda_runtime.h>
#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <map>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_host {
namespace {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStackBytes = 256 << 10;
constexpr int kDevices = 2;

enum class Order { forward = 0, reversed = 1, shuffled = 2 };
enum class State { ready, at_block_barrier, at_warp_barrier, at_shuffle, done };

using Triple = std::array<unsigned, 3>;  // x, y, z

// Where a suspended fiber, or the scheduler, continues. swapcontext would do, but for its system call at every switch.
using Jump = void* [5];

struct Fiber {
    ucontext_t context;  // of its first start
    Jump jump;
    bool started;
    State state;
    unsigned thread;
    Triple index;
    // Where it waits, and what it hands in and wants of a shuffle.
    const char* file;
    int line;
    unsigned mask;
    unsigned source_lane;
    uint64_t value, result;
    // Counts the barriers passed: what comes before an equal count is ordered.
    uint64_t block_epoch, warp_epoch;
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack;
#endif
};

struct LaunchRecord {
    int64_t device, stream, grid, block;
};

struct Machine {
    std::vector<Fiber> fibers = std::vector<Fiber>(kMaxThreads);
    char* stacks = nullptr;
    Jump scheduler;
#if defined(__SANITIZE_ADDRESS__)
    void* scheduler_fake_stack = nullptr;
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_size = 0;
#endif
    Fiber* current = nullptr;
    bool aborted = false;
    unsigned threads = 0;
    Triple grid, block, block_index;
    Entry entry = nullptr;
    void* arguments = nullptr;
    int device = 0;
    Order order = Order::forward;
    std::mt19937_64 random;
    std::vector<LaunchRecord> launches;
    std::map<std::string, std::string> faults;  // the first of each kind at each place
    std::string report;
};

Machine& machine() {
    static auto* m = new Machine;
    return *m;
}

void fault(const std::string& kind, const std::string& text, const std::string& where = "") {
    machine().faults.emplace(kind + where, kind + ": " + text + where);
}

// GCC wants __builtin_setjmp and __builtin_longjmp in different functions.
[[noreturn]] __attribute__((noinline, no_sanitize("address"))) void jump(Jump& to) { __builtin_longjmp(to, 1); }

__attribute__((noinline, no_sanitize("address"))) void suspend(Jump& here, Jump& there) {
    if (__builtin_setjmp(here) == 0) jump(there);
}

__attribute__((noinline, no_sanitize("address"))) void suspend_and_start(Jump& here, ucontext_t& there) {
    if (__builtin_setjmp(here) == 0) setcontext(&there);
}

void to_scheduler(Fiber& f, [[maybe_unused]] bool for_ever) {
    Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_ever ? nullptr : &f.fake_stack, m.scheduler_stack, m.scheduler_stack_size);
#endif
    suspend(f.jump, m.scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(f.fake_stack, &m.scheduler_stack, &m.scheduler_stack_size);
#endif
}

void fiber_main() {
    Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack, &m.scheduler_stack_size);
#endif
    Fiber& f = *m.current;
    m.entry(m.arguments);
    f.state = State::done;
    to_scheduler(f, true);
}

void start(Fiber& f, unsigned thread) {
    Machine& m = machine();
    char* stack = m.stacks + thread * kStackBytes;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, kStackBytes);
    f.fake_stack = nullptr;
#endif
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stack;
    f.context.uc_stack.ss_size = kStackBytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
    f.state = State::ready;
    f.started = false;
    f.thread = thread;
    f.index = {thread % m.block[0], thread / m.block[0] % m.block[1], thread / (m.block[0] * m.block[1])};
    f.block_epoch = f.warp_epoch = 0;
}

void resume(Fiber& f) {
    Machine& m = machine();
    m.current = &f;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&m.scheduler_fake_stack, m.stacks + f.thread * kStackBytes, kStackBytes);
#endif
    if (f.started) {
        suspend(m.scheduler, f.jump);
    } else {
        f.started = true;
        suspend_and_start(m.scheduler, f.context);
    }
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(m.scheduler_fake_stack, nullptr, nullptr);
#endif
    m.current = nullptr;
}

void wait(State state, const char* file, int line, unsigned mask) {
    Fiber& f = *machine().current;
    f.state = state;
    f.file = file;
    f.line = line;
    f.mask = mask;
    to_scheduler(f, false);
}

bool same_place(const Fiber& a, const Fiber& b) {
    return a.state == b.state && a.line == b.line && std::strcmp(a.file, b.file) == 0 && a.mask == b.mask;
}

std::string waiting_place(const Fiber& f) { return ", at " + std::string(f.file) + ":" + std::to_string(f.line); }

// Let a warp's lanes continue once all that `first`'s mask names wait at its place.
bool release_warp(unsigned warp, Fiber& first) {
    Machine& m = machine();
    for (unsigned lane = 0; lane < kWarp; ++lane) {
        if (!(first.mask >> lane & 1)) continue;
        const unsigned thread = warp * kWarp + lane;
        // Lanes past the block's end do not exist; a full mask may name them.
        if (thread < m.threads && !same_place(m.fibers[thread], first)) return false;
    }
    for (unsigned lane = 0; lane < kWarp; ++lane) {
        const unsigned thread = warp * kWarp + lane;
        if (!(first.mask >> lane & 1) || thread >= m.threads) continue;
        Fiber& f = m.fibers[thread];
        if (f.state == State::at_shuffle) {
            const unsigned source = warp * kWarp + f.source_lane;
            if (source >= m.threads || !(first.mask >> f.source_lane & 1))
                fault("shuffle", "thread " + std::to_string(thread) + " reads lane " + std::to_string(f.source_lane) +
                                     ", which takes no part", waiting_place(f));
            else
                f.result = m.fibers[source].value;
        }
    }
    const State kind = first.state;
    const unsigned mask = first.mask;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
        const unsigned thread = warp * kWarp + lane;
        if (!(mask >> lane & 1) || thread >= m.threads) continue;
        // A shuffle exchanges registers only: it orders no memory access.
        if (kind == State::at_warp_barrier) ++m.fibers[thread].warp_epoch;
        m.fibers[thread].state = State::ready;
    }
    return true;
}

bool release() {
    Machine& m = machine();
    bool any = false, all_at_barrier = true;
    for (unsigned t = 0; t < m.threads; ++t) {
        Fiber& f = m.fibers[t];
        if (f.state == State::at_warp_barrier || f.state == State::at_shuffle) {
            const unsigned lane = t % kWarp;
            if (!(f.mask >> lane & 1)) {
                fault("divergence", "thread " + std::to_string(t) + " is not in its own mask", waiting_place(f));
                return false;
            }
            any |= release_warp(t / kWarp, f);
        }
        all_at_barrier = all_at_barrier && f.state == State::at_block_barrier && same_place(f, m.fibers[0]);
    }
    if (!all_at_barrier) return any;
    for (unsigned t = 0; t < m.threads; ++t) {
        m.fibers[t].state = State::ready;
        ++m.fibers[t].block_epoch;
    }
    return true;
}

uint64_t linear_block() {
    const Machine& m = machine();
    return m.block_index[0] +
           static_cast<uint64_t>(m.grid[0]) * (m.block_index[1] + static_cast<uint64_t>(m.grid[1]) * m.block_index[2]);
}

void report_divergence() {
    Machine& m = machine();
    std::string text = "in block " + std::to_string(linear_block());
    for (unsigned t = 0; t < m.threads;) {
        const Fiber& f = m.fibers[t];
        unsigned end = t + 1;
        while (end < m.threads &&
               (f.state == State::done ? m.fibers[end].state == State::done : same_place(m.fibers[end], f)))
            ++end;
        text += "; threads " + std::to_string(t) + "-" + std::to_string(end - 1);
        text += f.state == State::done               ? " have ended"
                : f.state == State::at_block_barrier ? " wait at __syncthreads" + waiting_place(f)
                : f.state == State::at_warp_barrier  ? " wait at __syncwarp" + waiting_place(f)
                                                     : " wait at a shuffle" + waiting_place(f);
        t = end;
    }
    fault("divergence", text);
}

void forget_shared_memory();
void forget_launch();

bool run_block() {
    Machine& m = machine();
    forget_shared_memory();
    m.aborted = false;
    std::vector<unsigned> turn(m.threads);
    for (unsigned t = 0; t < m.threads; ++t) {
        turn[t] = t;
        start(m.fibers[t], t);
    }
    if (m.order == Order::reversed) std::reverse(turn.begin(), turn.end());
    for (;;) {
        if (m.order == Order::shuffled) std::shuffle(turn.begin(), turn.end(), m.random);
        for (const unsigned t : turn)
            if (m.fibers[t].state == State::ready && !m.aborted) resume(m.fibers[t]);
        if (m.aborted) return false;
        const bool done = std::all_of(m.fibers.begin(), m.fibers.begin() + m.threads,
                                      [](const Fiber& f) { return f.state == State::done; });
        if (done) return true;
        if (!release()) {
            report_divergence();
            return false;
        }
    }
}

}  // namespace

unsigned thread_index(int axis) { return machine().current->index[axis]; }
unsigned block_index(int axis) { return machine().block_index[axis]; }
unsigned block_size(int axis) { return machine().block[axis]; }
unsigned grid_size(int axis) { return machine().grid[axis]; }
unsigned lane() { return machine().current->thread % kWarp; }

void sync_threads(const char* file, int line) { wait(State::at_block_barrier, file, line, 0xffffffffu); }
void sync_warp(const char* file, int line, unsigned mask) { wait(State::at_warp_barrier, file, line, mask); }

uint64_t exchange(const char* file, int line, unsigned mask, uint64_t value, unsigned source_lane) {
    Fiber& f = *machine().current;
    f.value = value;
    f.source_lane = source_lane;
    wait(State::at_shuffle, file, line, mask);
    return f.result;
}

cudaError_t launch(const cudaLaunchConfig_t& config, Entry entry, void* arguments) {
    Machine& m = machine();
    const dim3 g = config.gridDim, b = config.blockDim;
    const uint64_t threads = static_cast<uint64_t>(b.x) * b.y * b.z;
    m.launches.push_back({m.device, static_cast<int64_t>(reinterpret_cast<uintptr_t>(config.stream)),
                          static_cast<int64_t>(g.x) * g.y * g.z, static_cast<int64_t>(threads)});
    if (g.x == 0 || g.y == 0 || g.z == 0 || g.x > 0x7fffffff || g.y > 65535 || g.z > 65535 || threads == 0 ||
        threads > kMaxThreads)
        return cudaErrorInvalidConfiguration;
    if (m.stacks == nullptr) {
        void* stacks = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stacks == MAP_FAILED) return cudaErrorLaunchFailure;
        m.stacks = static_cast<char*>(stacks);
    }
    m.grid = {g.x, g.y, g.z};
    m.block = {b.x, b.y, b.z};
    m.threads = static_cast<unsigned>(threads);
    m.entry = entry;
    m.arguments = arguments;
    forget_launch();
    std::vector<uint64_t> blocks(static_cast<uint64_t>(g.x) * g.y * g.z);
    for (uint64_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
    if (m.order == Order::reversed) std::reverse(blocks.begin(), blocks.end());
    if (m.order == Order::shuffled) std::shuffle(blocks.begin(), blocks.end(), m.random);
    for (const uint64_t i : blocks) {
        m.block_index = {static_cast<unsigned>(i % g.x), static_cast<unsigned>(i / g.x % g.y),
                         static_cast<unsigned>(i / g.x / g.y)};
        if (!run_block()) break;
    }
    return m.faults.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

namespace {

// What is known of one byte-range of at most 8 bytes that starts at the key.
struct Access {
    unsigned thread;
    uint64_t block, block_epoch, warp_epoch;
};
struct Cell {
    bool written = false;
    Access writer{};
    std::vector<Access> readers;  // since the last write
};

struct Range {
    uintptr_t begin = 0, end = 0;
    bool holds(uintptr_t a) const { return begin <= a && a < end; }
};

struct Shadow {
    std::unordered_map<uintptr_t, Cell> shared, global;
    Range module_data, module_code;
};

Shadow& shadow() {
    static auto* s = [] {
        auto* fresh = new Shadow;
        dl_iterate_phdr(
            [](dl_phdr_info* info, size_t, void* p) {
                auto* out = static_cast<Shadow*>(p);
                const auto here = reinterpret_cast<uintptr_t>(&machine);
                bool mine = false;
                for (int i = 0; i < info->dlpi_phnum; ++i) {
                    const auto& h = info->dlpi_phdr[i];
                    const Range range{info->dlpi_addr + h.p_vaddr, info->dlpi_addr + h.p_vaddr + h.p_memsz};
                    mine |= h.p_type == PT_LOAD && range.holds(here);
                }
                if (!mine) return 0;
                out->module_code.begin = info->dlpi_addr;
                for (int i = 0; i < info->dlpi_phnum; ++i) {
                    const auto& h = info->dlpi_phdr[i];
                    if (h.p_type == PT_LOAD && (h.p_flags & PF_W))
                        out->module_data = {info->dlpi_addr + h.p_vaddr, info->dlpi_addr + h.p_vaddr + h.p_memsz};
                }
                return 1;
            },
            fresh);
        return fresh;
    }();
    return *s;
}

void forget_shared_memory() { shadow().shared.clear(); }
void forget_launch() { shadow().global.clear(); }

std::string place(void* return_address) {
    char text[32];
    std::snprintf(text, sizeof text, ", at @0x%lx",
                  static_cast<unsigned long>(reinterpret_cast<uintptr_t>(return_address) - 1 -
                                             shadow().module_code.begin));
    return text;
}

// Whether a happened before what `f` does now.
bool ordered(const Access& a, const Fiber& f, uint64_t block) {
    if (a.block != block) return false;
    if (a.thread == f.thread || a.block_epoch < f.block_epoch) return true;
    return a.thread / kWarp == f.thread / kWarp && a.warp_epoch < f.warp_epoch;
}

void race(const char* memory, const Access& a, const char* first, const Fiber& f, uint64_t block, const char* second,
          void* where) {
    fault(std::string("race on ") + memory + " memory",
          "thread " + std::to_string(a.thread) + " of block " + std::to_string(a.block) + " " + first + ", thread " +
              std::to_string(f.thread) + " of block " + std::to_string(block) + " " + second +
              " with no barrier between",
          place(where));
}

void on_piece(uintptr_t address, bool write, void* where) {
    Machine& m = machine();
    Shadow& s = shadow();
    const Fiber& f = *m.current;
    const bool shared = s.module_data.holds(address);
    const char* memory = shared ? "shared" : "global";
    const uint64_t block = linear_block();
    Cell& cell = (shared ? s.shared : s.global)[address];
    if (shared && !write && !cell.written)
        fault("shared memory read before it is written", "thread " + std::to_string(f.thread), place(where));
    if (cell.written && !ordered(cell.writer, f, block))
        race(memory, cell.writer, "writes", f, block, write ? "writes" : "reads", where);
    const Access now{f.thread, block, f.block_epoch, f.warp_epoch};
    if (!write) {
        if (cell.readers.empty() || cell.readers.back().thread != f.thread || cell.readers.back().block != block)
            cell.readers.push_back(now);
        else
            cell.readers.back() = now;
        return;
    }
    for (const Access& reader : cell.readers)
        if (!ordered(reader, f, block)) race(memory, reader, "reads", f, block, "writes", where);
    cell.readers.clear();
    cell.written = true;
    cell.writer = now;
}

void on_access(void* p, size_t bytes, bool write, void* where) {
    Machine& m = machine();
    if (m.current == nullptr) return;  // host code around the launch
    const auto address = reinterpret_cast<uintptr_t>(p);
    const auto stacks = reinterpret_cast<uintptr_t>(m.stacks);
    if (address - stacks < kMaxThreads * kStackBytes) {
        const auto owner = (address - stacks) / kStackBytes;
        if (owner != m.current->thread)
            fault("another thread's local memory",
                  "thread " + std::to_string(m.current->thread) + " touches that of " + std::to_string(owner),
                  place(where));
        return;
    }
    // Two-byte pieces: the smallest elements that these kernels share.
    for (uintptr_t a = address & ~uintptr_t{1}; a < address + bytes; a += 2) on_piece(a, write, where);
}

void on_aligned(void* p, size_t bytes, bool write, void* where) {
    Machine& m = machine();
    if (m.current != nullptr && reinterpret_cast<uintptr_t>(p) % bytes != 0) {
        fault("misaligned access", std::to_string(bytes) + " bytes by thread " + std::to_string(m.current->thread),
              place(where));
        m.aborted = true;  // the processor would trap next
        to_scheduler(*m.current, true);
    }
    on_access(p, bytes, write, where);
}

}  // namespace
}  // namespace cuda_on_host

cudaError_t cudaGetDevice(int* device) {
    *device = cuda_on_host::machine().device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= cuda_on_host::kDevices) return cudaErrorInvalidDevice;
    cuda_on_host::machine().device = device;
    return cudaSuccess;
}

const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "cudaSuccess";
        case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
        case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
        case cudaErrorNoDevice: return "cudaErrorNoDevice";
        case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
        default: return "cudaErrorLaunchFailure";
    }
}

const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

// What the tests call.
extern "C" {

void cuda_on_host_set_order(int order, uint64_t seed) {
    cuda_on_host::machine().order = static_cast<cuda_on_host::Order>(order);
    cuda_on_host::machine().random.seed(seed);
}

void cuda_on_host_get_device(int* device) { cudaGetDevice(device); }

// The faults found since the last call, one a line.
const char* cuda_on_host_take_report() {
    auto& m = cuda_on_host::machine();
    m.report.clear();
    for (const auto& [key, text] : m.faults) m.report += text + "\n";
    m.faults.clear();
    return m.report.c_str();
}

// The launches since the last call as rows of device, stream, blocks, threads a block.
int64_t cuda_on_host_take_launches(int64_t* rows, int64_t capacity) {
    auto& m = cuda_on_host::machine();
    int64_t count = 0;
    for (const auto& launch : m.launches) {
        if (count == capacity) break;
        std::memcpy(rows + 4 * count++, &launch, sizeof launch);
    }
    m.launches.clear();
    return count;
}

#define ANSWER(bytes)                                                                                  \
    void __tsan_read##bytes(void* p) {                                                                 \
        cuda_on_host::on_aligned(p, bytes, false, __builtin_return_address(0));                        \
    }                                                                                                  \
    void __tsan_write##bytes(void* p) {                                                                \
        cuda_on_host::on_aligned(p, bytes, true, __builtin_return_address(0));                         \
    }                                                                                                  \
    void __tsan_unaligned_read##bytes(void* p) {                                                       \
        cuda_on_host::on_access(p, bytes, false, __builtin_return_address(0));                         \
    }                                                                                                  \
    void __tsan_unaligned_write##bytes(void* p) {                                                      \
        cuda_on_host::on_access(p, bytes, true, __builtin_return_address(0));                          \
    }
ANSWER(1)
ANSWER(2)
ANSWER(4)
ANSWER(8)
ANSWER(16)
#undef ANSWER

void __tsan_read_range(void* p, size_t bytes) {
    cuda_on_host::on_access(p, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
    cuda_on_host::on_access(p, bytes, true, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
