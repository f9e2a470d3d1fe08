// Scores of a query as they become probabilities.

#pragma once
#include "attention.h"

namespace {

// One row of scores becomes probabilities, zeros from `T` to the end of the row; a row that is masked throughout is all zeros.
inline void softmax(const Attention& a, float* s, const char* mask, int64_t T, int64_t padded) {
  __m512 largest = _mm512_set1_ps(-INFINITY);
  const __m512 scale = _mm512_set1_ps(a.scale);
  for (int64_t t = 0; t < T; t += LANES) {
    __mmask16 lanes = tail(T - t);
    __m512 x = _mm512_mul_ps(_mm512_load_ps(s + t), scale);
    if (mask) x = _mm512_add_ps(x, mask_of(a, mask, t, lanes));
    x = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), lanes, x);
    largest = _mm512_max_ps(largest, x);
    _mm512_store_ps(s + t, x);
  }
  float top = _mm512_reduce_max_ps(largest);
  __m512 shift = _mm512_set1_ps(top == -INFINITY ? 0.0f : top), total = _mm512_setzero_ps();
  for (int64_t t = 0; t < T; t += LANES) {
    __m512 x = _mm512_load_ps(s + t);
    __mmask16 off = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-INFINITY), _CMP_EQ_OQ);
    x = _mm512_mask_mov_ps(exponential(_mm512_sub_ps(x, shift)), off, _mm512_setzero_ps());
    total = _mm512_add_ps(total, x);
    _mm512_store_ps(s + t, x);
  }
  float sum = _mm512_reduce_add_ps(total);
  __m512 by = _mm512_set1_ps(sum == 0 ? 0.0f : 1.0f / sum);
  int64_t t = 0;
  for (; t < T; t += LANES) _mm512_store_ps(s + t, _mm512_mul_ps(_mm512_load_ps(s + t), by));
  for (; t < padded; t += LANES) _mm512_store_ps(s + t, _mm512_setzero_ps());
}

}  // namespace
