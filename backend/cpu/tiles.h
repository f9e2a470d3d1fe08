// The shapes of AMX's eight tiles, which a thread loads before it uses them.

#pragma once
#include <immintrin.h>
#include <stdint.h>

namespace {

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {0};
  uint16_t bytes[16] = {0};
  uint8_t rows[16] = {0};
};

inline void configure(const int (&rows)[8]) {
  Config config;
  for (int i = 0; i < 8; i++) {
    config.bytes[i] = 64;
    config.rows[i] = rows[i];
  }
  asm volatile("" ::: "memory");  // the intrinsic does not say that it reads all of it
  _tile_loadconfig(&config);
}

}  // namespace
