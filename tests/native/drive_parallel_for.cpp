// Every index has one owner, whatever the sizes; loops inside loops run; exhausted blocks end.
#include "cpu/parallel_for.h"

#include "driver.h"

using namespace gcng;
using namespace gcng::driver;

GCNG_CASE(parallel_for) {
  const int64_t length = random.integer(0, 300), block_size = random.integer(1, 40);
  Buffer<int64_t> visits(length), partial(num_blocks(length, block_size));
  for (int64_t i = 0; i < length; ++i) visits[i] = 0;
  parallel_for(length, block_size, num_threads, [&](int64_t begin, int64_t end) {
    int64_t sum = 0;
    for (int64_t i = begin; i < end; ++i) {
      ++visits[i];
      int64_t parts[3];
      parallel_for(3, 1, num_threads, [&](int64_t from, int64_t to) { parts[from] = i * (to - from); });
      sum += parts[0] + parts[1] + parts[2];
    }
    partial[begin / block_size] = sum;
  });
  int64_t total = 0;
  for (int64_t b = 0; b < partial.size(); ++b) total += partial[b];
  for (int64_t i = 0; i < length; ++i) GCNG_CHECK(visits[i] == 1);
  GCNG_CHECK(total == 3 * length * (length - 1) / 2);
  outputs.add(visits);
  outputs.add(partial);
}
