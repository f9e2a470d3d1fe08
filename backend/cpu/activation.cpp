// The curves of GELU, computed once as the library is loaded: interpolation at Chebyshev's nodes, in double.

#include "activation.h"

namespace {

double normal(double a) { return a * 0.5 * erfc(a * M_SQRT1_2); }

double logistic(double a) { return a / (1 + exp(2 * sqrt(2 / M_PI) * (a + 0.044715 * a * a * a))); }

// The polynomial through f at n nodes of [0, width], as coefficients of powers.
void interpolate(double (*f)(double), double from, double width, int n, double* power) {
  double node[Curve::TERMS], slope[Curve::TERMS];
  for (int i = 0; i < n; i++) {
    node[i] = width * (0.5 - 0.5 * cos(M_PI * (i + 0.5) / n));
    slope[i] = f(from + node[i]);
  }
  for (int j = 1; j < n; j++)  // Newton's divided differences
    for (int i = n - 1; i >= j; i--) slope[i] = (slope[i] - slope[i - 1]) / (node[i] - node[i - j]);
  for (int i = 0; i < n; i++) power[i] = 0;
  for (int j = n - 1; j >= 0; j--) {  // power = power (r - node[j]) + slope[j]
    for (int i = n - 1; i > 0; i--) power[i] = power[i - 1] - node[j] * power[i];
    power[0] = slope[j] - node[j] * power[0];
  }
}

template <double (*F)(double)>
double quotient(double a) { return F(a) / a; }

template <double (*F)(double)>
Curve curve() {
  Curve result;
  for (int piece = 0; piece < Curve::PIECES; piece++) {
    double power[Curve::TERMS] = {0};
    if (piece) interpolate(F, piece * (double)Curve::WIDTH, Curve::WIDTH, Curve::TERMS, power);
    else interpolate(quotient<F>, 0, Curve::WIDTH, Curve::TERMS - 1, power + 1);  // exactly 0 at 0, and good relatively
    for (int i = 0; i < Curve::TERMS; i++) result.c[i][piece] = (float)power[i];
  }
  return result;
}

}  // namespace

const Curve GELU_CURVE = curve<normal>(), GELU_TANH_CURVE = curve<logistic>();
