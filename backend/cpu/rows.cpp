// One row: residual, LayerNorm or RMSNorm, codes. Sums are taken in one order, so the number of threads changes no bit.

#include "rows.h"

namespace {

// As storing in `dtype` and loading again would round.
inline __m512 rounded(__m512 v, int dtype) {
  if (dtype == F32) return v;
  alignas(64) char half[2 * LANES];
  store(half, v, dtype, 0xffff);
  return load(half, dtype, 0xffff);
}

void normalize(const Rows& r, float* y, int64_t m) {
  const int64_t K = r.K;
  const int size = element_size(r.dtype), gain_size = element_size(r.gain_dtype);
  __m512 mean = _mm512_setzero_ps();
  if (r.norm == LAYER_NORM) {
    __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t k = 0; k < K; k += LANES) sum[k / LANES % 2] = _mm512_add_ps(sum[k / LANES % 2], _mm512_load_ps(y + k));
    mean = _mm512_set1_ps(_mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1])) / (float)K);
  }
  __m512 squares = _mm512_setzero_ps();
  for (int64_t k = 0; k < K; k += LANES) {
    __m512 d = _mm512_maskz_sub_ps(tail(K - k), _mm512_load_ps(y + k), mean);
    squares = _mm512_fmadd_ps(d, d, squares);
  }
  const __m512 by = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)K + r.eps));
  for (int64_t k = 0; k < K; k += LANES) {
    const __mmask16 lanes = tail(K - k);
    __m512 v = _mm512_mul_ps(_mm512_maskz_sub_ps(lanes, _mm512_load_ps(y + k), mean), by);
    const __m512 shift = r.shift ? load(r.shift + k * gain_size, r.gain_dtype, lanes) : _mm512_setzero_ps();
    v = r.gain ? _mm512_fmadd_ps(v, load(r.gain + k * gain_size, r.gain_dtype, lanes), shift) : _mm512_add_ps(v, shift);
    if (r.normed) store(r.normed + (m * K + k) * size, v, r.dtype, lanes);
    _mm512_store_ps(y + k, rounded(v, r.dtype));
  }
}

// A scale and a zero point, and codes (numerics/affine.py has the contract, to the last bit).
void quantize(const Rows& r, const char* x, int dtype, int64_t m) {
  const int64_t K = r.K;
  const int size = element_size(dtype), largest = r.largest, symmetric = r.symmetric;
  __m512 lows = _mm512_setzero_ps(), highs = _mm512_setzero_ps();  // the range holds zero
  __mmask16 bad = 0;
  for (int64_t k = 0; k < K; k += LANES) {
    __m512 v = load(x + k * size, dtype, tail(K - k));
    bad |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    lows = _mm512_min_ps(lows, v);
    highs = _mm512_max_ps(highs, v);
  }
  const float lo = _mm512_reduce_min_ps(lows), hi = _mm512_reduce_max_ps(highs);
  const float extent = -lo > hi ? -lo : hi;
  float s = symmetric ? extent * (float)(1.0 / largest) : (hi / 2 - lo / 2) * (float)(2.0 / largest);
  s = s < FLT_MIN ? FLT_MIN : s > FLT_MAX ? FLT_MAX : s;
  if (extent == 0) s = 1;
  if (bad || !isfinite(extent)) s = NAN;
  const float inverse = 1.0f / s;
  float z = symmetric ? 128 : nearbyintf(-lo * inverse);
  if (!symmetric) z = z < 0 ? 0 : z > largest ? (float)largest : z;
  r.scale[m] = s;
  r.zero[m] = symmetric ? 128 : isnan(s) ? 0 : (int32_t)z;
  const __m512 by = _mm512_set1_ps(inverse);
  const __m512i shift = _mm512_set1_epi32(r.zero[m]);
  const __m512i least = _mm512_set1_epi32(symmetric ? 128 - largest : 0), most = _mm512_set1_epi32(symmetric ? 128 + largest : largest);
  uint8_t* out = r.codes + m * r.stride;
  for (int64_t k = 0; k < r.stride; k += LANES) {
    __m512 v = k < K ? load(x + k * size, dtype, tail(K - k)) : _mm512_setzero_ps();
    __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(v, by)), shift);  // halves to even; a NaN is the least integer
    q = _mm512_min_epi32(_mm512_max_epi32(q, least), most);
    __m128i bytes = _mm_maskz_mov_epi8(k < K ? tail(K - k) : 0, _mm512_cvtepi32_epi8(q));
    _mm_mask_storeu_epi8(out + k, tail(r.stride - k), bytes);
  }
}

}  // namespace

void pass_row(const Rows& r, const char* x, int64_t m, float* space) {
  if (!r.residual && r.norm == NO_NORM && !r.total && !r.normed) return quantize(r, x, r.dtype, m);
  const int size = element_size(r.dtype);
  for (int64_t k = 0; k < r.K; k += LANES) {
    const __mmask16 lanes = tail(r.K - k);
    __m512 v = load(x + k * size, r.dtype, lanes);
    if (r.residual) {
      __m512 other = load(r.residual + (m * r.K + k) * size, r.dtype, lanes);
      if (r.scaled_by) other = rounded(_mm512_mul_ps(other, load(r.scaled_by + k * size, r.dtype, lanes)), r.dtype);
      v = rounded(_mm512_add_ps(v, other), r.dtype);
    }
    if (r.total) store(r.total + (m * r.K + k) * size, v, r.dtype, lanes);
    if (r.normed && r.norm == NO_NORM) store(r.normed + (m * r.K + k) * size, v, r.dtype, lanes);
    _mm512_store_ps(space + k, v);
  }
  if (r.norm != NO_NORM) normalize(r, space, m);
  quantize(r, (const char*)space, F32, m);
}

// Rows [M, K] of x; returns 0, or 1 if there was no memory.
extern "C" int quantize_rows(const char* x, int64_t M, const Rows* rows, int threads) {
  const Rows& r = *rows;
  int failed = 0;
#pragma omp parallel num_threads(threads) if (M * r.K > 16384) reduction(| : failed)
  {
    thread_local Memory space;
    float* row = (float*)space.take((r.K + LANES) * sizeof(float));
    failed = row == nullptr;
#pragma omp for schedule(static)
    for (int64_t m = 0; m < M; m++)
      if (row) pass_row(r, x + m * r.K * element_size(r.dtype), m, row);
  }
  return failed;
}
