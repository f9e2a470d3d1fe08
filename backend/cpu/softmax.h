// Scores of a query as they become probabilities.

#pragma once
#include "attention.h"

namespace {

// One row of scores becomes probabilities, zeros from `T` to the end of the row; a row that is masked throughout is all zeros.
inline void softmax(const Attention& a, float* s, const char* mask, int64_t T, int64_t padded) {
  Floats largest = all(-INFINITY);
  const Floats scale = all(a.scale);
  for (int64_t t = 0; t < T; t += LANES) {
    Lanes lanes = tail(T - t);
    Floats x = mul(floats_at(s + t), scale);
    if (mask) x = add(x, mask_of(a, mask, t, lanes));
    x = choose(lanes, x, all(-INFINITY));
    largest = higher(largest, x);
    write(s + t, x);
  }
  float top = highest_of(largest);
  Floats shift = all(top == -INFINITY ? 0.0f : top), total = zeros();
  for (int64_t t = 0; t < T; t += LANES) {
    Floats x = floats_at(s + t);
    x = choose(equal(x, all(-INFINITY)), zeros(), exponential(sub(x, shift)));
    total = add(total, x);
    write(s + t, x);
  }
  float sum = sum_of(total);
  Floats by = all(sum == 0 ? 0.0f : 1.0f / sum);
  int64_t t = 0;
  for (; t < T; t += LANES) write(s + t, mul(floats_at(s + t), by));
  for (; t < padded; t += LANES) write(s + t, zeros());
}

}  // namespace
