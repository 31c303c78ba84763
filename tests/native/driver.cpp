// driver ROUNDS: runs every case on 1, 2, 3 and 8 threads for so many seeds.
// driver overrun | overflow | race: makes that mistake on purpose; the sanitizer has to report it.
#include "driver.h"

#include <atomic>
#include <barrier>
#include <climits>
#include <string>
#include <thread>

#include "cpu/parallel_for.h"

namespace {

using namespace gcng;
using namespace gcng::driver;

// All threads start at once: in loops this short, the first would otherwise be done before the second exists.
void start_threads(int num_threads, void (*member)(void*) noexcept, void* context) {
  std::barrier<> start(num_threads);
  std::vector<std::thread> threads;
  const auto enter = [&] {
    start.arrive_and_wait();
    member(context);
  };
  for (int i = 1; i < num_threads; ++i) threads.emplace_back(enter);
  enter();
  for (std::thread& thread : threads) thread.join();
}

void overrun(int64_t beyond) {
  Buffer<float> row(16);
  parallel_for(4, 1, 1, [&](int64_t begin, int64_t) { row.data()[12 + begin + beyond] = 1.0f; });
}

int overflow(int one) {
  int sum = INT_MAX;
  parallel_for(1, 1, 1, [&](int64_t, int64_t) { sum += one; });
  return sum;
}

double race(int num_threads) {
  double sum = 0;
  std::atomic<int> arrived{0};
  parallel_for(num_threads, 1, num_threads, [&](int64_t, int64_t) {
    arrived.fetch_add(1, std::memory_order_relaxed);
    while (arrived.load(std::memory_order_relaxed) < num_threads) std::this_thread::yield();
    sum += 1.0;  // every thread writes one place
  });
  return sum;
}

void run_cases(int rounds) {
  for (const Case& one : cases()) {
    for (int round = 0; round < rounds; ++round) {
      const uint64_t seed = static_cast<uint64_t>(round) * 1000003 + 17;
      Outputs expected;
      Random first(seed);
      one.run(first, 1, expected);
      for (const int num_threads : {2, 3, 8}) {
        Outputs outputs;
        Random again(seed);
        one.run(again, num_threads, outputs);
        if (!(outputs == expected)) std::fprintf(stderr, "%s, round %d, %d threads:\n", one.name, round, num_threads);
        GCNG_CHECK(outputs == expected);
      }
    }
    std::printf("%s: %d rounds on 1, 2, 3 and 8 threads\n", one.name, rounds);
  }
}

}  // namespace

int main(int argc, char** argv) {
  gcng::set_thread_source(start_threads);
  const std::string word = argc > 1 ? argv[1] : "1";
  if (word == "overrun") overrun(argc);  // argc is 2: not a constant to the compiler
  else if (word == "overflow") std::printf("%d\n", overflow(argc - 1));
  else if (word == "race") std::printf("%f\n", race(2 * argc));
  else run_cases(std::atoi(word.c_str()));
  return 0;
}
