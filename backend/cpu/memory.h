// Memory of one thread, kept from call to call: fresh pages cost more than the arithmetic on them.

#pragma once
#include <stdint.h>
#include <stdlib.h>

namespace {

struct Memory {
  char* at = nullptr;
  size_t size = 0;
  char* take(size_t bytes) {
    if (bytes > size || !at) {
      free(at);
      size = (bytes / 4096 + 1) * 4096;
      at = (char*)aligned_alloc(64, size);
      if (!at) size = 0;
    }
    return at;
  }
  ~Memory() { free(at); }
};

}  // namespace
