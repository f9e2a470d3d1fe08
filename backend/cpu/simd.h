// Sixteen floats at a time: loads and stores of any dtype, and the exponential. The instruction set is the header's below.

#pragma once
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#include "avx512.h"
#else
#include "avx2.h"
#endif

namespace {

enum Dtype { F32 = 0, BF16 = 1, F16 = 2 };
enum InstructionSet { ON_AVX2 = 0, ON_VNNI = 1, ON_BF16 = 2, ON_AMX = 3 };  // in the order of SOURCES in build.py

constexpr int LANES = 16;

inline int element_size(int dtype) { return dtype == F32 ? 4 : 2; }

inline Floats load(const char* p, int dtype, Lanes lanes) {
  if (dtype == F32) return floats_at(p, lanes);
  return dtype == F16 ? from_f16(p, lanes) : as_floats(shl(shorts_at(p, lanes), 16));
}

inline void store(char* p, Floats v, int dtype, Lanes lanes) {
  if (dtype == F32) return write(p, lanes, v);
  if (dtype == F16) return write_f16(p, lanes, v);
  // Round to nearest even by adding half of the last kept place; a NaN stays one.
  const Ints bits = as_ints(v), odd = bits_and(shr(bits, 16), all_ints(1));
  const Ints rounded = shr(add(bits, add(odd, all_ints(0x7fff))), 16);
  write_shorts(p, lanes, choose(nan_in(v), all_ints(0x7fc0), rounded));
}

inline Lanes tail(int64_t left) { return left >= LANES ? 0xffff : (Lanes)((1u << left) - 1); }

// exp(x) to 2 ulp: 2^n times a polynomial in the rest; saturates instead of overflowing.
inline Floats exponential(Floats x) {
  x = lower(all(88.37626f), higher(all(-87.33654f), x));  // in this order a NaN stays one
  const Floats n = whole(mul(x, all(1.44269504f)));
  Floats r = fnma(n, all(0.693359375f), x);
  r = fnma(n, all(-2.12194440e-4f), r);
  Floats p = all(1.9875691500e-4f);
  p = fma(p, r, all(1.3981999507e-3f));
  p = fma(p, r, all(8.3334519073e-3f));
  p = fma(p, r, all(4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f));
  p = fma(p, r, all(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, all(1.0f)));
  return times_power(p, n);
}

// 2^x to 2 ulp, in the range of exponents of floats.
inline Floats power_of_two(Floats x) {
  const Floats n = whole(x), r = sub(x, n);
  Floats p = all(1.535336188e-4f);
  p = fma(p, r, all(1.339887440e-3f));
  p = fma(p, r, all(9.618437357e-3f));
  p = fma(p, r, all(5.550332471e-2f));
  p = fma(p, r, all(2.402264791e-1f));
  p = fma(p, r, all(6.931472029e-1f));
  return times_power(fma(p, r, all(1.0f)), n);
}

// MR rows, `stride` apart, times NV * 16 columns of `count` rows that are `step` apart. use(row, which sixteen, sums).
template <int MR, int NV, class Use>
inline void multiply_floats(const float* x, int64_t stride, const float* w, int64_t step, int64_t count, Use use) {
  Floats sum[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) sum[i][j] = zeros();
  for (int64_t k = 0; k < count; k++, w += step) {
    Floats columns[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) columns[j] = floats_at(w + j * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      const Floats q = all(x[i * stride + k]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) sum[i][j] = fma(q, columns[j], sum[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) use(i, j, sum[i][j]);
}

}  // namespace
