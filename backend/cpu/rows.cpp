// One row: residual, LayerNorm or RMSNorm, codes. Sums are taken in one order, so the number of threads changes no bit.

#include "rows.h"

#include <type_traits>

namespace {

// As storing in DTYPE and loading again would round.
template <int DTYPE>
inline __m512 rounded(__m512 v) {
  if (DTYPE == F32) return v;
  alignas(64) char half[2 * LANES];
  store(half, v, DTYPE, 0xffff);
  return load(half, DTYPE, 0xffff);
}

struct Range {  // of the numbers seen, and of zero
  __m512 lows = _mm512_setzero_ps(), highs = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
  void see(__m512 v) {
    lows = _mm512_min_ps(lows, v);
    highs = _mm512_max_ps(highs, v);
    odd = _mm512_fmadd_ps(v, _mm512_setzero_ps(), odd);  // zero, unless one is infinite or NaN
  }
  void see(const Range& other) {
    lows = _mm512_min_ps(lows, other.lows);
    highs = _mm512_max_ps(highs, other.highs);
    odd = _mm512_add_ps(odd, other.odd);
  }
};

// Loop over a row of K numbers: `body` gets the offset, the lanes, and which of two sums they go to, so that none waits for itself.
template <typename Body>
inline void each(int64_t K, Body body) {
  int64_t k = 0;
  for (; k + 2 * LANES <= K; k += 2 * LANES) {
    body(k, (__mmask16)0xffff, std::integral_constant<int, 0>());
    body(k + LANES, (__mmask16)0xffff, std::integral_constant<int, 1>());
  }
  for (; k < K; k += LANES) body(k, tail(K - k), std::integral_constant<int, 0>());
}

inline __m512 both(const __m512 (&sum)[2]) { return _mm512_add_ps(sum[0], sum[1]); }

// The numbers in `space` become their norm: less their mean, by the root of their mean square, times the gain and plus the shift.
template <int DTYPE, int GAIN>
Range normalize(const Rows& r, float* space, __m512 mean, int64_t m) {
  const int64_t K = r.K;
  const int gain_size = element_size(GAIN);
  const char *gain = r.gain, *shift = r.shift;
  char* normed = r.normed ? r.normed + m * K * element_size(DTYPE) : nullptr;
  __m512 squares[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  each(K, [&](int64_t k, __mmask16 lanes, auto half) {
    __m512 d = _mm512_maskz_sub_ps(lanes, _mm512_load_ps(space + k), mean);
    squares[half] = _mm512_fmadd_ps(d, d, squares[half]);
  });
  const __m512 by = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(both(squares)) / (float)K + r.eps));
  Range range[2];
  each(K, [&](int64_t k, __mmask16 lanes, auto half) {
    __m512 v = _mm512_mul_ps(_mm512_maskz_sub_ps(lanes, _mm512_load_ps(space + k), mean), by);
    const __m512 add = shift ? load(shift + k * gain_size, GAIN, lanes) : _mm512_setzero_ps();
    v = gain ? _mm512_fmadd_ps(v, load(gain + k * gain_size, GAIN, lanes), add) : _mm512_add_ps(v, add);
    if (normed) store(normed + k * element_size(DTYPE), v, DTYPE, lanes);
    v = rounded<DTYPE>(v);
    _mm512_store_ps(space + k, v);
    range[half].see(v);
  });
  range[0].see(range[1]);
  return range[0];
}

// A scale and a zero point, and codes (numerics/affine.py has the contract, to the last bit).
template <int DTYPE>
void encode(const Rows& r, const char* x, const Range& range, int64_t m) {
  const int64_t K = r.K;
  const int size = element_size(DTYPE), largest = r.largest, symmetric = r.symmetric;
  const float lo = _mm512_reduce_min_ps(range.lows), hi = _mm512_reduce_max_ps(range.highs);
  const float extent = -lo > hi ? -lo : hi;
  float s = symmetric ? extent * (float)(1.0 / largest) : (hi / 2 - lo / 2) * (float)(2.0 / largest);
  s = s < FLT_MIN ? FLT_MIN : s > FLT_MAX ? FLT_MAX : s;
  if (extent == 0) s = 1;
  if (_mm512_reduce_add_ps(range.odd) != 0) s = NAN;  // it is NaN then
  const float inverse = 1.0f / s;
  float z = symmetric ? 128 : nearbyintf(-lo * inverse);
  if (!symmetric) z = z < 0 ? 0 : z > largest ? (float)largest : z;
  const int32_t zero = symmetric ? 128 : isnan(s) ? 0 : (int32_t)z;
  r.scale[m] = s;
  r.zero[m] = zero;
  const int least = symmetric ? 128 - largest : 0, most = symmetric ? 128 + largest : largest;
  const __m512 by = _mm512_set1_ps(inverse);
  uint8_t* out = r.codes + m * r.stride;
  int64_t k = 0;

  // Halves to even; what is NaN becomes the least integer, and stays the least.
  const auto whole = [&](int64_t at) { return _mm512_cvtps_epi32(_mm512_mul_ps(load(x + at * size, DTYPE, 0xffff), by)); };
  const __m512i shift = _mm512_set1_epi16((int16_t)zero), low = _mm512_set1_epi16((int16_t)least), high = _mm512_set1_epi16((int16_t)most);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);  // packing works in lanes of 128 bits
  const auto limit = [&](__m512i q) { return _mm512_min_epi16(_mm512_max_epi16(_mm512_adds_epi16(q, shift), low), high); };
  for (; k + 4 * LANES <= K; k += 4 * LANES) {
    const __m512i a = limit(_mm512_packs_epi32(whole(k), whole(k + LANES))), b = limit(_mm512_packs_epi32(whole(k + 2 * LANES), whole(k + 3 * LANES)));
    _mm512_storeu_si512(out + k, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(a, b)));
  }
  const __m512i shifts = _mm512_set1_epi32(zero), lows = _mm512_set1_epi32(least), highs = _mm512_set1_epi32(most);
  for (; k < r.stride; k += LANES) {
    __m512 v = k < K ? load(x + k * size, DTYPE, tail(K - k)) : _mm512_setzero_ps();
    __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(v, by)), shifts);
    q = _mm512_min_epi32(_mm512_max_epi32(q, lows), highs);
    __m128i bytes = _mm_maskz_mov_epi8(k < K ? tail(K - k) : 0, _mm512_cvtepi32_epi8(q));
    _mm_mask_storeu_epi8(out + k, tail(r.stride - k), bytes);
  }
}

template <int DTYPE>
void pass(const Rows& r, const char* x, int64_t m, float* space) {
  const int64_t K = r.K;
  const int size = element_size(DTYPE);
  const bool norms = r.norm != NO_NORM;
  Range range[2];
  if (!r.residual && !norms && !r.total && !r.normed) {
    each(K, [&](int64_t k, __mmask16 lanes, auto half) { range[half].see(load(x + k * size, DTYPE, lanes)); });
    range[0].see(range[1]);
    return encode<DTYPE>(r, x, range[0], m);
  }
  const char *residual = r.residual ? r.residual + m * K * size : nullptr, *scaled_by = r.scaled_by;
  char *total = r.total ? r.total + m * K * size : nullptr, *normed = r.normed && !norms ? r.normed + m * K * size : nullptr;
  __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  each(K, [&](int64_t k, __mmask16 lanes, auto half) {
    __m512 v = load(x + k * size, DTYPE, lanes);
    if (residual) {
      __m512 other = load(residual + k * size, DTYPE, lanes);
      if (scaled_by) other = rounded<DTYPE>(_mm512_mul_ps(other, load(scaled_by + k * size, DTYPE, lanes)));
      v = rounded<DTYPE>(_mm512_add_ps(v, other));
    }
    if (total) store(total + k * size, v, DTYPE, lanes);
    if (normed) store(normed + k * size, v, DTYPE, lanes);
    _mm512_store_ps(space + k, v);
    sum[half] = _mm512_add_ps(sum[half], v);
    if (!norms) range[half].see(v);
  });
  range[0].see(range[1]);
  if (norms) {
    const bool centered = r.norm == LAYER_NORM;
    const __m512 mean = centered ? _mm512_set1_ps(_mm512_reduce_add_ps(both(sum)) / (float)K) : _mm512_setzero_ps();
    range[0] = r.gain_dtype == F32 ? normalize<DTYPE, F32>(r, space, mean, m)
               : r.gain_dtype == BF16 ? normalize<DTYPE, BF16>(r, space, mean, m)
                                      : normalize<DTYPE, F16>(r, space, mean, m);
  }
  encode<F32>(r, (const char*)space, range[0], m);
}

template <int DTYPE>
void gate(char* x, int64_t count) {
  const int size = element_size(DTYPE);
  each(count, [&](int64_t k, __mmask16 lanes, auto) {
    store(x + k * size, _mm512_mul_ps(load(x + k * size, DTYPE, lanes), load(x + (count + k) * size, DTYPE, lanes)), DTYPE, lanes);
  });
}

}  // namespace

void gate_row(char* x, int64_t count, int dtype) {
  switch (dtype) {
    case F32: return gate<F32>(x, count);
    case BF16: return gate<BF16>(x, count);
    default: return gate<F16>(x, count);
  }
}

void pass_row(const Rows& r, const char* x, int64_t m, float* space) {
  switch (r.dtype) {
    case F32: return pass<F32>(r, x, m, space);
    case BF16: return pass<BF16>(r, x, m, space);
    default: return pass<F16>(r, x, m, space);
  }
}

int quantize_rows(const char* x, int64_t M, const Rows& r, int threads) {
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
