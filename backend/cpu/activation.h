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

inline Floats sigmoid(Floats x) {
  const Floats one = all(1.0f);
  return divide(one, add(one, exponential(sub(zeros(), x))));
}

// GELU(x) = max(x, 0) - curve(|x|): no exponential, no division, and nothing cancels where GELU is small.
inline Floats gelu(Floats x, const Curve& curve) {
  Floats a = lower(all(Curve::END), magnitude(x));  // in this order a NaN stays one
  Ints piece = truncated(mul(a, all(1 / Curve::WIDTH)));
  Floats r = fnma(to_floats(piece), all(Curve::WIDTH), a);
  Floats y = look_up(piece, curve.c[Curve::TERMS - 1]);
#pragma GCC unroll 8
  for (int i = Curve::TERMS - 2; i >= 0; i--) y = fma(y, r, look_up(piece, curve.c[i]));
  return sub(higher(zeros(), x), y);
}

template <int ACTIVATION>
inline Floats activate(Floats x) {
  switch (ACTIVATION) {
    case GELU: return gelu(x, GELU_CURVE);
    case GELU_TANH: return gelu(x, GELU_TANH_CURVE);
    case SILU: return mul(x, sigmoid(x));
    case RELU: return higher(zeros(), x);  // this order keeps a NaN in x
    default: return x;
  }
}

}  // namespace
