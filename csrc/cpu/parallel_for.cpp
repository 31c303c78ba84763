#include "cpu/parallel_for.h"

#include <unistd.h>

#include <atomic>

namespace gcng {
namespace {

struct Loop {
  void (*body)(const void*, int64_t) noexcept;
  const void* context;
  int64_t num_blocks;
  std::atomic<int64_t> next{0};
};

thread_local bool inside_loop = false;

void take_blocks(void* opaque) noexcept {
  Loop& loop = *static_cast<Loop*>(opaque);
  inside_loop = true;
  for (int64_t block; (block = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.num_blocks;)
    loop.body(loop.context, block);
  inside_loop = false;
}

ThreadSource thread_source = nullptr;
int64_t home_process = getpid();

}  // namespace

void set_thread_source(ThreadSource source) { thread_source = source; }

void set_home_process(int64_t process) { home_process = process; }

void run_blocks(int64_t num_blocks, int num_threads, void (*body)(const void*, int64_t) noexcept,
                const void* context) {
  const bool alone = num_threads <= 1 || num_blocks <= 1 || inside_loop;
  if (alone || thread_source == nullptr || getpid() != home_process) {
    for (int64_t block = 0; block < num_blocks; ++block) body(context, block);
    return;
  }
  Loop loop{.body = body, .context = context, .num_blocks = num_blocks};
  thread_source(static_cast<int>(std::min<int64_t>(num_threads, num_blocks)), take_blocks, &loop);
}

}  // namespace gcng
