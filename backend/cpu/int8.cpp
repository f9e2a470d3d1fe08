// Integer linear layers for CPUs with AVX512-VNNI: u8 activations times s8 weights, exact in int32, with a fused epilogue.
//
// A plain C interface without PyTorch's headers: it compiles in seconds, depends on no PyTorch version, and is called through
// ctypes. OpenMP symbols are left undefined on purpose: they resolve to the runtime that PyTorch loaded, so there is one thread
// pool, and torch.set_num_threads counts. Integer sums are exact, so results do not depend on the number of threads.
//
// Weights come as panels of 64 outputs: packed[N/64][K/4][64][4], what one vpdpbusd step of four registers eats. K is padded to a
// multiple of 4 with zeros, N to a multiple of 64.

#include "simd.h"

namespace {

enum Activation { NONE = 0, GELU = 1, GELU_TANH = 2, SILU = 3, RELU = 4 };

constexpr int PANEL = 64, ROWS = 6;

// ---- activations --------------------------------------------------------------------------------------------------------------

inline __m512 sigmoid(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// 1 + erf(x / sqrt 2), by Abramowitz and Stegun 7.1.26: absolute error below 1.5e-7.
inline __m512 one_plus_erf(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  __m512 z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.70710678f));
  __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), one));
  __m512 p = _mm512_set1_ps(1.061405429f);
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-1.453152027f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.421413741f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.284496736f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.254829592f));
  __m512 rest = _mm512_mul_ps(_mm512_mul_ps(p, t), exponential(_mm512_fnmadd_ps(z, z, _mm512_setzero_ps())));  // 1 - erf(|.|)
  __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  return _mm512_mask_mov_ps(_mm512_sub_ps(_mm512_set1_ps(2.0f), rest), negative, rest);
}

inline __m512 activate(__m512 x, int activation) {
  switch (activation) {
    case GELU: return _mm512_mul_ps(_mm512_mul_ps(x, _mm512_set1_ps(0.5f)), one_plus_erf(x));
    case GELU_TANH: {  // x * sigmoid(2 u), u = sqrt(2/pi) (x + 0.044715 x^3)
      __m512 u = _mm512_mul_ps(x, _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.0713548163f), _mm512_set1_ps(1.59576912f)));
      return _mm512_mul_ps(x, sigmoid(u));
    }
    case SILU: return _mm512_mul_ps(x, sigmoid(x));
    case RELU: return _mm512_max_ps(_mm512_setzero_ps(), x);  // this order keeps a NaN in x
    default: return x;
  }
}

// ---- the product ----------------------------------------------------------------------------------------------------------------

struct Linear {
  const uint8_t* codes; int64_t stride;               // [M, stride], the first K of each row count
  const float* scale; const int32_t* zero; int64_t per_row;  // [M] each, or one for all rows (per_row = 0)
  const int8_t* weight; const float* weight_scale; const int32_t* sums;
  const char* bias; int bias_dtype;
  char* out; int dtype; int activation;
  int64_t M, N, K4;                                   // K4 = K / 4, padded
};

// MR rows times one panel of 64 outputs.
template <int MR>
void block(const Linear& a, int64_t m, int64_t panel) {
  __m512i sum[MR][4];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++) sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = _mm512_setzero_si512();
  const int8_t* w = a.weight + panel * a.K4 * 4 * PANEL;
  const uint8_t* x = a.codes + m * a.stride;
  for (int64_t k = 0; k < a.K4; k++, w += 4 * PANEL) {
    __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 64), w2 = _mm512_loadu_si512(w + 128), w3 = _mm512_loadu_si512(w + 192);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      int32_t four;
      memcpy(&four, x + i * a.stride + 4 * k, 4);
      __m512i q = _mm512_set1_epi32(four);
      sum[i][0] = _mm512_dpbusd_epi32(sum[i][0], q, w0);
      sum[i][1] = _mm512_dpbusd_epi32(sum[i][1], q, w1);
      sum[i][2] = _mm512_dpbusd_epi32(sum[i][2], q, w2);
      sum[i][3] = _mm512_dpbusd_epi32(sum[i][3], q, w3);
    }
  }
  // Through memory, so that the loop above keeps every sum in a register: an index the compiler cannot unroll would spill them all.
  alignas(64) int32_t exact[MR][PANEL];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++) {
    _mm512_store_si512(exact[i], sum[i][0]);
    _mm512_store_si512(exact[i] + 16, sum[i][1]);
    _mm512_store_si512(exact[i] + 32, sum[i][2]);
    _mm512_store_si512(exact[i] + 48, sum[i][3]);
  }
  const int size = element_size(a.dtype);
  for (int j = 0; j < 4; j++) {
    int64_t n = panel * PANEL + j * LANES;
    if (n >= a.N) break;
    __mmask16 mask = tail(a.N - n);
    __m512 ws = _mm512_maskz_loadu_ps(mask, a.weight_scale + n);
    __m512i total = _mm512_maskz_loadu_epi32(mask, a.sums + n);
    __m512 bias = a.bias ? load(a.bias + n * element_size(a.bias_dtype), a.bias_dtype, mask) : _mm512_setzero_ps();
    for (int i = 0; i < MR; i++) {
      int64_t row = (m + i) * a.per_row;
      __m512i shift = _mm512_mullo_epi32(total, _mm512_set1_epi32(a.zero[row]));
      __m512i product = _mm512_sub_epi32(_mm512_load_si512(exact[i] + j * LANES), shift);
      __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(product), _mm512_set1_ps(a.scale[row]));
      y = activate(_mm512_add_ps(_mm512_mul_ps(y, ws), bias), a.activation);
      store(a.out + ((m + i) * a.N + n) * size, y, a.dtype, mask);
    }
  }
}

void rows(const Linear& a, int64_t m, int64_t count, int64_t panel) {
  for (; count >= ROWS; m += ROWS, count -= ROWS) block<ROWS>(a, m, panel);
  switch (count) {
    case 5: return block<5>(a, m, panel);
    case 4: return block<4>(a, m, panel);
    case 3: return block<3>(a, m, panel);
    case 2: return block<2>(a, m, panel);
    case 1: return block<1>(a, m, panel);
  }
}

}  // namespace

extern "C" {

// One row of codes, a scale and a zero point per token (numerics/affine.py has the contract, to the last bit).
void quantize_rows(const char* x, int dtype, int64_t M, int64_t K, uint8_t* codes, int64_t stride, float* scale, int32_t* zero,
                   int largest, int symmetric, int threads) {
  const int size = element_size(dtype);
#pragma omp parallel for schedule(static) num_threads(threads) if (M * K > 16384)
  for (int64_t m = 0; m < M; m++) {
    const char* row = x + m * K * size;
    __m512 lows = _mm512_setzero_ps(), highs = _mm512_setzero_ps();  // the range holds zero
    __mmask16 bad = 0;
    for (int64_t k = 0; k < K; k += LANES) {
      __m512 v = load(row + k * size, dtype, tail(K - k));
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
    scale[m] = s;
    zero[m] = symmetric ? 128 : isnan(s) ? 0 : (int32_t)z;
    const __m512 by = _mm512_set1_ps(inverse), shift = _mm512_set1_ps((float)zero[m]);
    const __m512 least = _mm512_set1_ps(symmetric ? (float)(128 - largest) : 0.0f);
    const __m512 most = _mm512_set1_ps(symmetric ? (float)(128 + largest) : (float)largest);
    uint8_t* out = codes + m * stride;
    for (int64_t k = 0; k < stride; k += LANES) {
      __m512 v = k < K ? load(row + k * size, dtype, tail(K - k)) : _mm512_setzero_ps();
      __m512 q = _mm512_roundscale_ps(_mm512_mul_ps(v, by), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      q = _mm512_min_ps(_mm512_max_ps(_mm512_add_ps(q, shift), least), most);
      __m128i bytes = _mm_maskz_mov_epi8(k < K ? tail(K - k) : 0, _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(q)));
      _mm_mask_storeu_epi8(out + k, tail(stride - k), bytes);
    }
  }
}

void linear(const uint8_t* codes, int64_t stride, const float* scale, const int32_t* zero, int64_t per_row, const int8_t* weight,
            const float* weight_scale, const int32_t* sums, const char* bias, int bias_dtype, char* out, int dtype, int activation,
            int64_t M, int64_t N, int64_t K4, int threads) {
  const Linear a = {codes, stride, scale, zero, per_row, weight, weight_scale, sums, bias, bias_dtype, out, dtype, activation, M, N, K4};
  const int64_t panels = (N + PANEL - 1) / PANEL;
  // Tall products are cut along M, so that a block of activations stays near; flat ones along N, so that each weight is read once.
  int64_t height = 8 * ROWS;
  while (height > ROWS && (M + height - 1) / height < 2 * threads) height /= 2;
  const int64_t bands = (M + height - 1) / height;
  int64_t wide = panels;
  while (wide > 1 && bands * ((panels + wide - 1) / wide) < 4 * threads) wide = (wide + 1) / 2;
  if (M <= 4 * ROWS) wide = 1;
  const int64_t strips = (panels + wide - 1) / wide;
  if (M <= 4 * ROWS) {
#pragma omp parallel for schedule(static) num_threads(threads) if (M * N * K4 > 8192)
    for (int64_t panel = 0; panel < panels; panel++) rows(a, 0, M, panel);
    return;
  }
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t task = 0; task < bands * strips; task++) {
    const int64_t m = task / strips * height, first = task % strips * wide;
    const int64_t count = m + height < M ? height : M - m;
    const int64_t last = first + wide < panels ? first + wide : panels;
    for (int64_t panel = first; panel < last; panel++) rows(a, m, count, panel);
  }
}
}
