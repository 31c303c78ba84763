// Lets the kernels run on torch's own threads. A second pool would compete with them: after a matrix product they spin
// for milliseconds before they sleep, and a kernel on other threads then gets half of every core.
#include <unistd.h>

#include "cpu/parallel_for.h"
#include "tensor_access.h"

namespace gcng {
namespace {

void torch_thread_source(int num_threads, void (*member)(void*) noexcept, void* context) {
  // Each index is one member; where torch runs several in one call (nested, fewer threads), the first takes every block.
  torch::stable::parallel_for(0, num_threads, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) member(context);
  });
}

[[maybe_unused]] const bool installed = (set_thread_source(torch_thread_source), true);

}  // namespace
}  // namespace gcng

// Called by gcng/ops/native.py with the process that imported it: a worker that was forked before the library was loaded
// must not wait for its parent's threads.
extern "C" __attribute__((visibility("default"))) void gcng_set_home_process(int64_t process) {
  gcng::set_home_process(process);
}
