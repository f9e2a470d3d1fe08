// Integer products on AVX2, which multiplies bytes only with saturation: both sides are widened to 16 bits, once for a band of rows,
// and products are summed two and two in 32 bits, exactly. So few rows are multiplied as their weights are read.

#include "linear.h"

namespace {

constexpr int ROWS = 2, TALL = 6, BAND = 96, DEEP = 512;  // rows in registers, more than are not widened, and at a time; inputs of a block

// MR rows times sixteen columns, in which four inputs of each column follow one another; K is a multiple of 4.
template <int MR>
void multiply(const int16_t* x, int64_t stride, const int16_t* w, int64_t K, int32_t* sums, bool first) {
  __m256i sum[MR][4];
#pragma GCC unroll 4
  for (int i = 0; i < MR; i++) sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = _mm256_setzero_si256();
  for (int64_t k = 0; k < K; k += 4, w += 4 * LANES) {
    __m256i q[MR];
#pragma GCC unroll 4
    for (int i = 0; i < MR; i++) {
      int64_t four;
      memcpy(&four, x + i * stride + k, 8);
      q[i] = _mm256_set1_epi64x(four);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const __m256i columns = _mm256_load_si256((const __m256i*)w + j);
#pragma GCC unroll 4
      for (int i = 0; i < MR; i++) add_products(sum[i][j], columns, q[i]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < MR; i++) {
    const Ints total = sums_of_pairs(sum[i]);
    write(sums + i * LANES, first ? total : add(total, ints_at(sums + i * LANES)));
  }
}

template <int ACTIVATION>
void columns_of(const Linear& a, int64_t m, int64_t count, int64_t n, const int16_t* x, int16_t* w, int32_t* sums) {
  const int8_t* from = a.weight + n / PANEL * a.K * PANEL + n % PANEL * 4;
  for (int64_t k = 0; k < a.K; k += DEEP) {
    const int64_t deep = a.K - k < DEEP ? a.K - k : DEEP;
    for (int64_t i = 0; i < deep; i += 4)
      for (int j = 0; j < 4; j++) widen(w + (i + j) * LANES, _mm_loadu_si128((const __m128i*)(from + (k + i) * PANEL) + j));
    int64_t i = 0;
    for (; i + ROWS <= count; i += ROWS) multiply<ROWS>(x + i * a.K + k, a.K, w, deep, sums + i * LANES, k == 0);
    if (i < count) multiply<1>(x + i * a.K + k, a.K, w, deep, sums + i * LANES, k == 0);
  }
  const Columns c = columns(a, n);
  for (int64_t i = 0; i < count; i++) finish<ACTIVATION>(a, ints_at(sums + i * LANES), m + i, n, c);
}

template <int ACTIVATION>
void few(const Linear& a, int64_t m, int64_t count, int64_t n) {
  const int8_t* w = a.weight + n / PANEL * a.K * PANEL + n % PANEL * 4;
  const Columns c = columns(a, n);
  multiply_quads(a.codes + m * a.K, a.K, count, w, 4 * PANEL, a.K, [&](int64_t i, Ints sum) { finish<ACTIVATION>(a, sum, m + i, n, c); });
}

}  // namespace

void avx2_band(const Linear& a, int64_t m, int64_t count, int64_t first, int64_t last) {
  for (; count > BAND; m += BAND, count -= BAND) avx2_band(a, m, BAND, first, last);  // of more the widened rows leave the cache
  const int64_t end = last * PANEL < a.N ? last * PANEL : a.N;
  thread_local Memory space;
  const int64_t rows = count * a.K * sizeof(int16_t);
  char* memory = count > TALL ? space.take(rows + DEEP * LANES * sizeof(int16_t) + count * LANES * sizeof(int32_t)) : nullptr;
  if (!memory) {  // or there is none
    for (; count > 0; m += TALL, count -= TALL)
      for (int64_t n = first * PANEL; n < end; n += LANES)
        WITH_ACTIVATION(a.activation, few<A>(a, m, count < TALL ? count : TALL, n));
    return;
  }
  int16_t *x = (int16_t*)memory, *w = (int16_t*)(memory + rows);
  int32_t* sums = (int32_t*)(w + DEEP * LANES);
  const uint8_t* codes = a.codes + m * a.K;
  for (int64_t i = 0; i < count * a.K; i += LANES) widen(x + i, codes + i);
  for (int64_t n = first * PANEL; n < end; n += LANES) WITH_ACTIVATION(a.activation, columns_of<A>(a, m, count, n, x, w, sums));
}
