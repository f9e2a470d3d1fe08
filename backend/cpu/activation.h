// The functions that an epilogue applies to sixteen numbers at a time.

#pragma once
#include "simd.h"

enum Activation { NONE = 0, GELU = 1, GELU_TANH = 2, SILU = 3, RELU = 4 };

// a (1 - P(a)) for a >= 0, where P is the normal distribution (or the logistic curve that GELU's "tanh" puts in its place): what
// lies between GELU and ReLU, on both sides of zero alike. Polynomials of degree 5 on 16 pieces, zero (below 1e-8) beyond the last.
struct Curve {
  static constexpr int PIECES = 16, TERMS = 6;
  static constexpr float WIDTH = 0.375f, END = 5.99f;
  float c[TERMS][PIECES];
};

extern const Curve GELU_CURVE, GELU_TANH_CURVE;  // activation.cpp

namespace {

inline __m512 sigmoid(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// GELU(x) = max(x, 0) - curve(|x|): no exponential, no division, and nothing cancels where GELU is small.
inline __m512 gelu(__m512 x, const Curve& curve) {
  __m512 a = _mm512_min_ps(_mm512_set1_ps(Curve::END), _mm512_abs_ps(x));  // in this order a NaN stays one
  __m512i piece = _mm512_cvttps_epi32(_mm512_mul_ps(a, _mm512_set1_ps(1 / Curve::WIDTH)));
  __m512 r = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(piece), _mm512_set1_ps(Curve::WIDTH), a);
  __m512 y = _mm512_permutexvar_ps(piece, _mm512_loadu_ps(curve.c[Curve::TERMS - 1]));
#pragma GCC unroll 8
  for (int i = Curve::TERMS - 2; i >= 0; i--) y = _mm512_fmadd_ps(y, r, _mm512_permutexvar_ps(piece, _mm512_loadu_ps(curve.c[i])));
  return _mm512_sub_ps(_mm512_max_ps(_mm512_setzero_ps(), x), y);
}

template <int ACTIVATION>
inline __m512 activate(__m512 x) {
  switch (ACTIVATION) {
    case GELU: return gelu(x, GELU_CURVE);
    case GELU_TANH: return gelu(x, GELU_TANH_CURVE);
    case SILU: return _mm512_mul_ps(x, sigmoid(x));
    case RELU: return _mm512_max_ps(_mm512_setzero_ps(), x);  // this order keeps a NaN in x
    default: return x;
  }
}

}  // namespace
