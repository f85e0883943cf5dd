// Runs independent chunks of one kernel on a few threads. Chunks are handed out in order to whoever is free,
// the caller included, so a thread that gets less of a core does less. The threads are those of the OpenMP runtime
// that PyTorch has loaded, otherwise a pool of our own.
// Results must depend on the chunk alone, not on the thread: that makes them the same for any thread count.
#pragma once

#include <cstdint>

namespace svag {

using ChunkFunction = void (*)(void* context, int64_t chunk);

// Call function(context, i) for each i in [0, chunks), on at most `threads` threads. Safe after fork(). Where threads
// can't be started the caller's does the work; so it never throws, and kernels need no code that unwinds.
void parallel_chunks(int64_t chunks, int threads, ChunkFunction function, void* context) noexcept;

}  // namespace svag
