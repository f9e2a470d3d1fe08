// One row: residual, LayerNorm or RMSNorm, codes. Sums are taken in one order, so the number of threads changes no bit.

#include "rows.h"

#include <type_traits>

namespace {

// As storing in DTYPE and loading again would round.
template <int DTYPE>
inline Floats rounded(Floats v) {
  if (DTYPE == F32) return v;
  alignas(64) char half[2 * LANES];
  store(half, v, DTYPE, 0xffff);
  return load(half, DTYPE, 0xffff);
}

struct Range {  // of the numbers seen, and of zero
  Floats lows = zeros(), highs = zeros(), odd = zeros();
  void see(Floats v) {
    lows = lower(lows, v);
    highs = higher(highs, v);
    odd = fma(v, zeros(), odd);  // zero, unless one is infinite or NaN
  }
  void see(const Range& other) {
    lows = lower(lows, other.lows);
    highs = higher(highs, other.highs);
    odd = add(odd, other.odd);
  }
};

// Loop over a row of K numbers: `body` gets the offset, the lanes, and which of two sums they go to, so that none waits for itself.
template <typename Body>
inline void each(int64_t K, Body body) {
  int64_t k = 0;
  for (; k + 2 * LANES <= K; k += 2 * LANES) {
    body(k, (Lanes)0xffff, std::integral_constant<int, 0>());
    body(k + LANES, (Lanes)0xffff, std::integral_constant<int, 1>());
  }
  for (; k < K; k += LANES) body(k, tail(K - k), std::integral_constant<int, 0>());
}

inline Floats both(const Floats (&sum)[2]) { return add(sum[0], sum[1]); }

// The numbers in `space` become their norm: less their mean, by the root of their mean square, times the gain and plus the shift.
template <int DTYPE, int GAIN>
Range normalize(const Rows& r, float* space, Floats mean, int64_t m) {
  const int64_t K = r.K;
  const int gain_size = element_size(GAIN);
  const char *gain = r.gain, *shift = r.shift;
  char* normed = r.normed ? r.normed + m * K * element_size(DTYPE) : nullptr;
  Floats squares[2] = {zeros(), zeros()};
  each(K, [&](int64_t k, Lanes lanes, auto half) {
    Floats d = only(lanes, sub(floats_at(space + k), mean));
    squares[half] = fma(d, d, squares[half]);
  });
  const Floats by = all(1.0f / sqrtf(sum_of(both(squares)) / (float)K + r.eps));
  Range range[2];
  each(K, [&](int64_t k, Lanes lanes, auto half) {
    Floats v = mul(only(lanes, sub(floats_at(space + k), mean)), by);
    const Floats offset = shift ? load(shift + k * gain_size, GAIN, lanes) : zeros();
    v = gain ? fma(v, load(gain + k * gain_size, GAIN, lanes), offset) : add(v, offset);
    if (normed) store(normed + k * element_size(DTYPE), v, DTYPE, lanes);
    v = rounded<DTYPE>(v);
    write(space + k, v);
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
  const float lo = lowest_of(range.lows), hi = highest_of(range.highs);
  const float extent = -lo > hi ? -lo : hi;
  float s = symmetric ? extent * (float)(1.0 / largest) : (hi / 2 - lo / 2) * (float)(2.0 / largest);
  s = s < FLT_MIN ? FLT_MIN : s > FLT_MAX ? FLT_MAX : s;
  if (extent == 0) s = 1;
  if (sum_of(range.odd) != 0) s = NAN;  // it is NaN then
  const float inverse = 1.0f / s;
  float z = symmetric ? 128 : nearbyintf(-lo * inverse);
  if (!symmetric) z = z < 0 ? 0 : z > largest ? (float)largest : z;
  const int32_t zero = symmetric ? 128 : isnan(s) ? 0 : (int32_t)z;
  r.scale[m] = s;
  r.zero[m] = zero;
  const int least = symmetric ? 128 - largest : 0, most = symmetric ? 128 + largest : largest;
  const Floats by = all(inverse);
  uint8_t* out = r.codes + m * r.stride;
  int64_t k = 0;

  // Halves to even; what is NaN becomes the least integer, and stays the least.
  const auto whole = [&](int64_t at) { return nearest(mul(load(x + at * size, DTYPE, 0xffff), by)); };
  for (; k + 4 * LANES <= K; k += 4 * LANES)
    write_codes(out + k, whole(k), whole(k + LANES), whole(k + 2 * LANES), whole(k + 3 * LANES), zero, least, most);
  const Ints shifts = all_ints(zero), lows = all_ints(least), highs = all_ints(most);
  for (; k < r.stride; k += LANES) {
    Floats v = k < K ? load(x + k * size, DTYPE, tail(K - k)) : zeros();
    Ints q = add(nearest(mul(v, by)), shifts);
    q = lower(higher(q, lows), highs);
    write_bytes(out + k, tail(r.stride - k), only(k < K ? tail(K - k) : 0, q));
  }
}

template <int DTYPE>
void pass(const Rows& r, const char* x, int64_t m, float* space) {
  const int64_t K = r.K;
  const int size = element_size(DTYPE);
  const bool norms = r.norm != NO_NORM;
  Range range[2];
  if (!r.residual && !norms && !r.total && !r.normed) {
    each(K, [&](int64_t k, Lanes lanes, auto half) { range[half].see(load(x + k * size, DTYPE, lanes)); });
    range[0].see(range[1]);
    return encode<DTYPE>(r, x, range[0], m);
  }
  const char *residual = r.residual ? r.residual + m * K * size : nullptr, *scaled_by = r.scaled_by;
  char *total = r.total ? r.total + m * K * size : nullptr, *normed = r.normed && !norms ? r.normed + m * K * size : nullptr;
  Floats sum[2] = {zeros(), zeros()};
  each(K, [&](int64_t k, Lanes lanes, auto half) {
    Floats v = load(x + k * size, DTYPE, lanes);
    if (residual) {
      Floats other = load(residual + k * size, DTYPE, lanes);
      if (scaled_by) other = rounded<DTYPE>(mul(other, load(scaled_by + k * size, DTYPE, lanes)));
      v = rounded<DTYPE>(add(v, other));
    }
    if (total) store(total + k * size, v, DTYPE, lanes);
    if (normed) store(normed + k * size, v, DTYPE, lanes);
    write(space + k, v);
    sum[half] = add(sum[half], v);
    if (!norms) range[half].see(v);
  });
  range[0].see(range[1]);
  if (norms) {
    const bool centered = r.norm == LAYER_NORM;
    const Floats mean = centered ? all(sum_of(both(sum)) / (float)K) : zeros();
    range[0] = r.gain_dtype == F32 ? normalize<DTYPE, F32>(r, space, mean, m)
               : r.gain_dtype == BF16 ? normalize<DTYPE, BF16>(r, space, mean, m)
                                      : normalize<DTYPE, F16>(r, space, mean, m);
  }
  encode<F32>(r, (const char*)space, range[0], m);
}

template <int DTYPE>
void gate(char* x, int64_t count) {
  const int size = element_size(DTYPE);
  each(count, [&](int64_t k, Lanes lanes, auto) {
    store(x + k * size, mul(load(x + k * size, DTYPE, lanes), load(x + (count + k) * size, DTYPE, lanes)), DTYPE, lanes);
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
