// Blocks of a range handed to threads. The size of a block is the caller's and never depends on the number of threads,
// so that a kernel whose blocks own their outputs gives the same bits on any number of them.
#pragma once

#include <algorithm>
#include <cstdint>

namespace gcng {

// Runs body(context, block) once for every block in [0, num_blocks), on at most num_threads threads, and returns when
// all are done. Serial with one block, inside another loop, and in a child of fork.
void run_blocks(int64_t num_blocks, int num_threads, void (*body)(const void* context, int64_t block) noexcept,
                const void* context);

// Where threads come from: calls member(context) on up to num_threads threads, the caller's among them, and returns when
// all calls have. The extension installs torch's threads (csrc/register_threads.cpp), the stand-alone tests start theirs
// (tests/native/driver.cpp); without a source every loop is serial.
using ThreadSource = void (*)(int num_threads, void (*member)(void* context) noexcept, void* context);
void set_thread_source(ThreadSource source);

// Process that may use threads: the one that loaded the library, unless set. Any other is a child of fork, where
// the threads that a loop would wait for do not exist.
void set_home_process(int64_t process);

inline int64_t num_blocks(int64_t length, int64_t block_size) { return (length + block_size - 1) / block_size; }

// body(begin, end) for consecutive blocks of block_size indices that cover [0, length). Blocks are handed out as threads
// become free; a body neither throws nor allocates. Partial sums go to place begin / block_size of a scratch buffer, and
// the caller adds them in that order. A block should be 50 us of work or more: waking a sleeping thread takes as long.
template <class Body>
void parallel_for(int64_t length, int64_t block_size, int num_threads, const Body& body) {
  struct Context {
    const Body& body;
    int64_t length, block_size;
  } const context{body, length, block_size};
  run_blocks(
      num_blocks(length, block_size), num_threads,
      [](const void* opaque, int64_t block) noexcept {
        const auto& c = *static_cast<const Context*>(opaque);
        const int64_t begin = block * c.block_size;
        c.body(begin, std::min(c.length, begin + c.block_size));
      },
      &context);
}

}  // namespace gcng
