// What happens to a whole row between two products: add the shortcut, normalise, quantize per token; each row is read once.

#pragma once
#include "memory.h"
#include "simd.h"

enum Norm { NO_NORM = 0, LAYER_NORM = 1, RMS_NORM = 2 };

struct Rows {
  const char *residual, *scaled_by;     // [M, K] and, in the same dtype, [K]; each may be null
  const char *gain, *shift;             // [K], each may be null
  int dtype, gain_dtype, norm;
  float eps;
  char *total, *normed;                 // [M, K], what others read too; each may be null
  uint8_t* codes;                       // [M, stride], zeros from K
  float* scale;
  int32_t* zero;
  int64_t K, stride;
  int largest, symmetric;
};

// All rows of x [M, K]; returns 0, or 1 if there was no memory. rows.cpp.
int quantize_rows(const char* x, int64_t M, const Rows& r, int threads);

// x[k] *= x[count + k], rounded to the dtype. rows.cpp.
void gate_row(char* x, int64_t count, int dtype);

// Row m, whose numbers (of r.dtype) are at x; `space` holds K floats, rounded up to 16. rows.cpp.
void pass_row(const Rows& r, const char* x, int64_t m, float* space);
