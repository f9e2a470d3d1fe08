// Integer linear layers for CPUs with AVX512-VNNI: u8 activations times s8 weights, exact in int32, with a fused epilogue.
//
// A plain C interface without PyTorch's headers: it compiles in seconds, depends on no PyTorch version, and is called through
// ctypes. OpenMP symbols are left undefined on purpose: they resolve to the runtime that PyTorch loaded, so there is one thread
// pool, and torch.set_num_threads counts. Integer sums are exact, so results do not depend on the number of threads.
//
// Rows are cut into bands for the threads; a band's product runs on AMX (int8_amx.cpp) or here, on AVX512-VNNI.

#include "linear.h"

namespace {

constexpr int ROWS = 6, FEWEST_ROWS_OF_AMX = 16;

// MR rows times one panel of 64 outputs.
template <int MR, int ACTIVATION>
void block(const Linear& a, int64_t m, int64_t panel) {
  __m512i sum[MR][4];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++) sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = _mm512_setzero_si512();
  const int8_t* w = a.weight + panel * a.K * PANEL;
  const uint8_t* x = a.codes + m * a.K;
  for (int64_t k = 0; k < a.K; k += 4, w += 4 * PANEL) {
    __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 64), w2 = _mm512_loadu_si512(w + 128), w3 = _mm512_loadu_si512(w + 192);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      int32_t four;
      memcpy(&four, x + i * a.K + k, 4);
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
  for (int j = 0; j < 4; j++) {
    const int64_t n = panel * PANEL + j * LANES;
    if (n >= a.N) break;
    const Columns c = columns(a, n);
    for (int i = 0; i < MR; i++) finish<ACTIVATION>(a, _mm512_load_si512(exact[i] + j * LANES), m + i, n, c);
  }
}

template <int ACTIVATION>
void rows(const Linear& a, int64_t m, int64_t count, int64_t panel) {
  for (; count >= ROWS; m += ROWS, count -= ROWS) block<ROWS, ACTIVATION>(a, m, panel);
  switch (count) {
    case 5: return block<5, ACTIVATION>(a, m, panel);
    case 4: return block<4, ACTIVATION>(a, m, panel);
    case 3: return block<3, ACTIVATION>(a, m, panel);
    case 2: return block<2, ACTIVATION>(a, m, panel);
    case 1: return block<1, ACTIVATION>(a, m, panel);
  }
}

void vnni_band(const Linear& a, int64_t m, int64_t count, int64_t first, int64_t last) {
  for (int64_t panel = first; panel < last; panel++) WITH_ACTIVATION(a.activation, rows<A>(a, m, count, panel));
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

// `amx` asks for tiles, which pay from FEWEST_ROWS_OF_AMX rows; the weights are packed alike, and the results are the same.
void linear(const uint8_t* codes, const float* scale, const int32_t* zero, int64_t per_row, const int8_t* weight,
            const float* weight_scale, const int32_t* sums, const char* bias, int bias_dtype, char* out, int dtype, int activation,
            int64_t M, int64_t N, int64_t K, int amx, int threads) {
  if (M == 0) return;
  const Linear a = {codes, scale, zero, per_row, weight, weight_scale, sums, bias, bias_dtype, out, dtype, activation, M, N, K};
  auto band = vnni_band;
  int64_t step = ROWS, tallest = 8 * ROWS, flat = 4 * ROWS;
#ifdef WITH_AMX
  if (amx && M >= FEWEST_ROWS_OF_AMX) {
    band = amx_band;
    step = 32, tallest = 128, flat = 31;
  }
#endif
  const int64_t panels = (N + PANEL - 1) / PANEL;
  // Tall products are cut along M, so that a block of activations stays near; flat ones along N, so that each weight is read once.
  int64_t height = tallest, wide = panels;
  while (height > step && (M + height - 1) / height < 2 * threads) height = (height / 2 + step - 1) / step * step;
  if (M <= flat) height = M, wide = (panels + threads - 1) / threads;
  const int64_t bands = (M + height - 1) / height;
  while (wide > 1 && M > flat && bands * ((panels + wide - 1) / wide) < 4 * threads) wide = (wide + 1) / 2;
  const int64_t strips = (panels + wide - 1) / wide;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (M * N * K > 32768)
  for (int64_t task = 0; task < bands * strips; task++) {
    const int64_t m = task / strips * height, first = task % strips * wide;
    band(a, m, m + height < M ? height : M - m, first, first + wide < panels ? first + wide : panels);
  }
}
}
