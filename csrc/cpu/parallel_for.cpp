// The pool behind parallel_for: threads that sleep on a condition variable between loops, so that they never take cores
// from the threads of torch. They are started by the first loop that wants them and stay until the process ends.
#include "cpu/parallel_for.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace gcng {
namespace {

using Body = void (*)(const void*, int64_t) noexcept;

struct Loop {
  Body body;
  const void* context;
  int64_t num_blocks;
  std::atomic<int64_t> next{0};
  int free_places;  // helpers that may still join; guarded by Pool::mutex
  int helpers = 0;  // helpers inside; guarded by Pool::mutex
};

thread_local bool inside_loop = false;

void work(Loop& loop) {
  inside_loop = true;
  for (int64_t block; (block = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.num_blocks;)
    loop.body(loop.context, block);
  inside_loop = false;
}

class Pool {
 public:
  // A caller that finds the pool taken works alone: waiting would be slower than that.
  void run(Loop& loop, int num_helpers) {
    std::unique_lock owner(one_loop_, std::try_to_lock);
    if (!owner) return work(loop);
    grow(num_helpers);
    {
      std::lock_guard lock(mutex_);
      loop.free_places = std::min(num_helpers, num_threads_);
      current_ = &loop;
    }
    for (int i = 0; i < num_helpers; ++i) wake_.notify_one();
    work(loop);
    // A helper that has not woken by now never sees the loop; those inside are waited for.
    std::unique_lock lock(mutex_);
    current_ = nullptr;
    left_.wait(lock, [&] { return loop.helpers == 0; });
  }

 private:
  void grow(int num_helpers) {
    while (num_threads_ < num_helpers) {
      try {
        std::thread([this] { serve(); }).detach();
      } catch (const std::system_error&) {
        return;  // no more threads to be had: the loop runs on those that are there
      }
      ++num_threads_;
    }
  }

  [[noreturn]] void serve() {
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return current_ && current_->free_places > 0; });
      Loop& loop = *current_;
      --loop.free_places;
      ++loop.helpers;
      lock.unlock();
      work(loop);
      lock.lock();
      if (--loop.helpers == 0) left_.notify_one();
    }
  }

  std::mutex one_loop_;
  std::mutex mutex_;
  std::condition_variable wake_, left_;
  Loop* current_ = nullptr;
  int num_threads_ = 0;  // guarded by one_loop_
};

const pid_t first_process = getpid();

}  // namespace

void run_blocks(int64_t num_blocks, int num_threads, Body body, const void* context) {
  // The threads of the pool do not exist in a child of fork, and its locks may be held by them for ever.
  const bool serial = num_threads <= 1 || num_blocks <= 1 || inside_loop || getpid() != first_process;
  if (serial) {
    for (int64_t block = 0; block < num_blocks; ++block) body(context, block);
    return;
  }
  // Never destroyed: its threads use it until the process ends.
  static Pool& pool = *new Pool;
  Loop loop{.body = body, .context = context, .num_blocks = num_blocks, .free_places = 0};
  const int64_t helpers = std::min<int64_t>(num_threads, num_blocks) - 1;
  pool.run(loop, static_cast<int>(helpers));
}

}  // namespace gcng
