// Large results in few pages: the first write to 4 KiB of fresh memory costs more than any pass does with them.
#pragma once

#include <cstdint>

namespace gcng {

// Asks the system for huge pages where memory that nobody has written yet holds whole ones. Changes no byte, and does
// nothing where the system has none, or for what is too small.
void prefer_huge_pages(void* data, int64_t bytes);

}  // namespace gcng
