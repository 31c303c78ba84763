// Blocks of a range handed to threads. The size of a block is the caller's and never depends on the number of threads,
// so that a kernel whose blocks own their outputs gives the same bits on any number of them.
#pragma once

#include <algorithm>
#include <cstdint>

namespace gcng {

// Runs body(context, block) once for every block in [0, num_blocks), on at most num_threads threads, and returns when
// all are done. Serial in a child of fork, inside another parallel loop, and while another thread uses the pool.
void run_blocks(int64_t num_blocks, int num_threads, void (*body)(const void* context, int64_t block) noexcept,
                const void* context);

inline int64_t num_blocks(int64_t length, int64_t block_size) { return (length + block_size - 1) / block_size; }

// body(begin, end) for consecutive blocks of block_size indices that cover [0, length). A body neither throws nor
// allocates; block begin / block_size of a scratch buffer is where it leaves partial sums, which the caller then adds
// in the order of the blocks.
template <class Body>
void parallel_for(int64_t length, int64_t block_size, int num_threads, const Body& body) {
  struct Context {
    const Body* body;
    int64_t length, block_size;
  } const context{&body, length, block_size};
  run_blocks(
      num_blocks(length, block_size), num_threads,
      [](const void* opaque, int64_t block) noexcept {
        const auto& c = *static_cast<const Context*>(opaque);
        const int64_t begin = block * c.block_size;
        (*c.body)(begin, std::min(c.length, begin + c.block_size));
      },
      &context);
}

}  // namespace gcng
