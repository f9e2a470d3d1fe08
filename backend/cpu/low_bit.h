// What a linear layer of low-bit weights is given; low_bit.py has the layout of the weight.

#pragma once
#include "linear.h"

constexpr int depth(int bits) { return bits > 4 ? 4 : bits == 4 ? 8 : bits == 2 ? 16 : 32; }  // inputs of a block

constexpr int block_bytes(int bits) { return depth(bits) * PANEL / 8 * (bits > 4 ? 8 : bits); }

struct LowBit {
  const char* x; int x_dtype; int64_t x_stride;                // [M, K]; codes of u8, in rows of x_stride, or floats
  const float* scale; const int32_t* zero; int64_t per_row;    // of u8 rows: [M] each, or one for all (per_row = 0)
  const uint8_t* weight; const float* weight_scale; const int32_t* terms;  // [N/64][groups][...], and 64 numbers twice
  int bits; int64_t size, groups;                              // K = size * groups
  const char* bias; int bias_dtype;
  char* out; int dtype, activation;
  int64_t M, N;
  // Behind the weight of N gates, to which the activation goes, lie N more outputs, which they multiply; whole panels.
  bool gated;
};

// The weight alone, decoded as [K, N]. low_bit.cpp.
void low_bit_decode(const LowBit& a, int threads);

// Both return 0, or 1 if there was no memory. Whether there is AMX makes no difference to the results; AVX2 does, to those of floats.
int low_bit_integer(const LowBit& a, int isa, int threads);
int low_bit_float(const LowBit& a, int isa, int threads);
