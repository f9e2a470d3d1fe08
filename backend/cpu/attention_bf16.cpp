// Attention on AVX512-BF16, for queries, keys and values that 8-bit products have made: all operands, the probabilities too, are
// rounded to bfloat16 (2^-9, where 8 bits leave 2^-8 of a row's largest), and summed in float32, 32 products an instruction.
//
// Six queries at a time meet all their keys, as in attention.cpp. Neighbours along a sum lie in one word of 32 bits: of a query's and
// a key's channels, of a query's probabilities, and of the values of two keys.

#include "attention.h"
#include "transpose.h"

namespace {

constexpr int QUERIES = 6, KEYS = 64;

struct Sizes {  // in words: channels in pairs, and rounded up to a register; keys rounded up to whole blocks, and in pairs
  int64_t pairs, depth, keys, width, chances;
  explicit Sizes(const Attention& a)
      : pairs((a.D + 1) / 2), depth((pairs + LANES - 1) / LANES * LANES), keys((a.T + KEYS - 1) / KEYS * KEYS),
        width((a.D + LANES - 1) / LANES * LANES), chances(keys / 2 + LANES) {}
};

struct Space {
  uint32_t *keys;     // [keys / KEYS][depth][KEYS]
  uint32_t *values;   // [keys / 2][width]
  uint32_t *queries;  // [QUERIES][depth]
  uint32_t *chances;  // [QUERIES][chances]: probabilities up to their sum
  float *scores, *mask;
};

inline __m512i words(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }  // neighbours in one word

inline __m512 dot(__m512 sum, __m512i x, __m512i y) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y); }

// 32 numbers of a row from column c on, zeros from D.
inline __m512i row_words(const Attention& a, const char* x, int64_t c) {
  const int64_t left = a.D - c, size = element_size(a.dtype);
  return words(load(x + c * size, a.dtype, tail(left)), left > LANES ? load(x + (c + LANES) * size, a.dtype, tail(left - LANES)) : _mm512_setzero_ps());
}

void take_keys(const Attention& a, const Sizes& sizes, const Space& space, const char* k, int64_t seen) {
  for (int64_t t = 0; t < (seen + LANES - 1) / LANES * LANES; t += LANES)
    for (int64_t p = 0; p < sizes.depth; p += LANES) {
      __m512i rows[LANES];
      for (int64_t i = 0; i < LANES; i++)
        rows[i] = t + i < seen ? row_words(a, k + (t + i) * a.kt * element_size(a.dtype), 2 * p) : _mm512_setzero_si512();
      transpose(rows, space.keys + (t / KEYS * sizes.depth + p) * KEYS + t % KEYS, KEYS);
    }
}

void take_values(const Attention& a, const Sizes& sizes, const Space& space, const char* v, int64_t seen) {
  const int64_t size = element_size(a.dtype), step = a.vt * size;
  for (int64_t t = 0; t < seen; t += 2)
    for (int64_t c = 0; c < sizes.width; c += LANES) {
      const char* x = v + t * step + c * size;
      const __mmask16 lanes = tail(a.D - c);
      const __m512i both = words(load(x, a.dtype, lanes), t + 1 < seen ? load(x + step, a.dtype, lanes) : _mm512_setzero_ps());
      const __m512i even = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)), odd = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1));
      _mm512_store_si512(space.values + t / 2 * sizes.width + c, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
}

// Scores of MR queries with KEYS keys, of which those that are not there get any number.
template <int MR>
void score(const Sizes& sizes, const uint32_t* q, const uint32_t* keys, float* s) {
  __m512 sum[MR][4];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++) sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = _mm512_setzero_ps();
  for (int64_t p = 0; p < sizes.pairs; p++, keys += KEYS) {
    const __m512i k0 = _mm512_load_si512(keys), k1 = _mm512_load_si512(keys + 16), k2 = _mm512_load_si512(keys + 32), k3 = _mm512_load_si512(keys + 48);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      const __m512i x = _mm512_set1_epi32(q[i * sizes.depth + p]);
      sum[i][0] = dot(sum[i][0], x, k0);
      sum[i][1] = dot(sum[i][1], x, k1);
      sum[i][2] = dot(sum[i][2], x, k2);
      sum[i][3] = dot(sum[i][3], x, k3);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++) {
    _mm512_store_ps(s + i * sizes.keys, sum[i][0]);
    _mm512_store_ps(s + i * sizes.keys + 16, sum[i][1]);
    _mm512_store_ps(s + i * sizes.keys + 32, sum[i][2]);
    _mm512_store_ps(s + i * sizes.keys + 48, sum[i][3]);
  }
}

// A row of scores becomes probabilities up to their sum, zeros from T to the next multiple of 32; returns 1 / sum, or 0 of a row
// that is masked throughout.
float soften(const Attention& a, float* s, const float* mask, int64_t T, uint32_t* chances) {
  const __m512 off = _mm512_set1_ps(-INFINITY), scale = _mm512_set1_ps(a.scale * 1.44269504f), least = _mm512_set1_ps(-200.0f);
  __m512 largest = off;
  int64_t t = 0;
  for (; t < T; t += LANES) {
    __m512 x = _mm512_load_ps(s + t);
    x = mask ? _mm512_fmadd_ps(x, scale, _mm512_load_ps(mask + t)) : _mm512_mul_ps(x, scale);
    if (t + LANES > T) x = _mm512_mask_mov_ps(off, tail(T - t), x);
    largest = _mm512_max_ps(largest, x);
    _mm512_store_ps(s + t, x);
  }
  if (t % (2 * LANES)) _mm512_store_ps(s + t, off);
  const float top = _mm512_reduce_max_ps(largest);
  const __m512 shift = _mm512_set1_ps(top == -INFINITY ? 0.0f : top);
  __m512 total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (t = 0; t < T; t += 2 * LANES) {
    const __m512 x = power_of_two(_mm512_max_ps(least, _mm512_sub_ps(_mm512_load_ps(s + t), shift)));  // a NaN stays one
    const __m512 y = power_of_two(_mm512_max_ps(least, _mm512_sub_ps(_mm512_load_ps(s + t + LANES), shift)));
    total[0] = _mm512_add_ps(total[0], x), total[1] = _mm512_add_ps(total[1], y);
    _mm512_store_si512(chances + t / 2, words(x, y));
  }
  const float sum = _mm512_reduce_add_ps(_mm512_add_ps(total[0], total[1]));
  return sum == 0 ? 0.0f : 1.0f / sum;
}

// MR rows of probabilities times NV registers of the values, from column c on, to the output.
template <int MR, int NV>
void mix(const Attention& a, const Sizes& sizes, const Space& space, int64_t c, int64_t T, const float* by, char* out) {
  __m512 sum[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) sum[i][j] = _mm512_setzero_ps();
  for (int64_t t = 0; t < (T + 1) / 2; t++) {
    __m512i v[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) v[j] = _mm512_load_si512(space.values + t * sizes.width + c + j * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      const __m512i x = _mm512_set1_epi32(space.chances[i * sizes.chances + t]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) sum[i][j] = dot(sum[i][j], x, v[j]);
    }
  }
  const int64_t size = element_size(a.dtype);
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++)
      store(out + (i * a.row + c + j * LANES) * size, _mm512_mul_ps(sum[i][j], _mm512_set1_ps(by[i])), a.dtype, tail(a.D - c - j * LANES));
}

template <int MR>
void queries(const Attention& a, const Sizes& sizes, const Space& space, int64_t b, int64_t h, int64_t l) {
  const int64_t T = a.causal && l + MR < a.T ? l + MR : a.T;  // the keys that some of these queries see
  for (int64_t t = 0; t < T; t += KEYS) score<MR>(sizes, space.queries, space.keys + t * sizes.depth, space.scores + t);
  float by[MR];
  for (int i = 0; i < MR; i++) {
    if (a.mask && a.ml) mask_to_powers(a, mask_row(a, b, h, l + i), space.mask);
    const int64_t last = a.causal && l + i + 1 < a.T ? l + i + 1 : a.T;
    uint32_t* chances = space.chances + i * sizes.chances;
    by[i] = soften(a, space.scores + i * sizes.keys, a.mask ? space.mask : nullptr, last, chances);
    for (int64_t t = (last + 31) / 32 * 16; t < (T + 1) / 2; t += LANES) _mm512_store_si512(chances + t, _mm512_setzero_si512());
  }
  char* out = a.out + ((b * a.L + l) * a.row + h * a.D) * element_size(a.dtype);
  for (int64_t c = 0; c < sizes.width; c += 64) switch ((sizes.width - c) / LANES) {
      case 1: mix<MR, 1>(a, sizes, space, c, T, by, out); break;
      case 2: mix<MR, 2>(a, sizes, space, c, T, by, out); break;
      case 3: mix<MR, 3>(a, sizes, space, c, T, by, out); break;
      default: mix<MR, 4>(a, sizes, space, c, T, by, out);
    }
}

Space carve(const Attention& a, const Sizes& sizes, char* memory, int64_t* bytes) {
  uint32_t* at = (uint32_t*)memory;
  const auto take = [&](int64_t count) {
    uint32_t* here = at;
    at += count;
    return here;
  };
  Space space;
  space.keys = take(sizes.keys * sizes.depth);
  space.values = take((sizes.keys / 2) * sizes.width);
  space.queries = take(QUERIES * sizes.depth);
  space.chances = take(QUERIES * sizes.chances);
  space.scores = (float*)take(QUERIES * sizes.keys);
  space.mask = (float*)take(sizes.keys);
  *bytes = (char*)at - memory;
  return space;
}

}  // namespace

int64_t bf16_attention_bytes(const Attention& a) {
  int64_t bytes;
  carve(a, Sizes(a), nullptr, &bytes);
  return bytes;
}

void bf16_attention(const Attention& a, char* memory, int64_t b, int64_t h, int64_t first, int64_t count) {
  const Sizes sizes(a);
  int64_t bytes;
  const Space space = carve(a, sizes, memory, &bytes);
  const int64_t size = element_size(a.dtype), g = h / (a.H / a.G), last = first + count, seen = a.causal && last < a.T ? last : a.T;
  take_keys(a, sizes, space, a.k + (b * a.kb + g * a.kh) * size, seen);
  take_values(a, sizes, space, a.v + (b * a.vb + g * a.vh) * size, seen);
  if (a.mask && a.ml == 0) mask_to_powers(a, mask_row(a, b, h, 0), space.mask);
  const char* q = a.q + (b * a.qb + h * a.qh) * size;
  for (int64_t l = first; l < last; l += QUERIES) {
    const int64_t rows = last - l < QUERIES ? last - l : QUERIES;
    for (int64_t i = 0; i < rows; i++)
      for (int64_t p = 0; p < sizes.depth; p += LANES)
        _mm512_store_si512(space.queries + i * sizes.depth + p, row_words(a, q + (l + i) * a.ql * size, 2 * p));
    switch (rows) {
      case 1: queries<1>(a, sizes, space, b, h, l); break;
      case 2: queries<2>(a, sizes, space, b, h, l); break;
      case 3: queries<3>(a, sizes, space, b, h, l); break;
      case 4: queries<4>(a, sizes, space, b, h, l); break;
      case 5: queries<5>(a, sizes, space, b, h, l); break;
      default: queries<6>(a, sizes, space, b, h, l);
    }
  }
}
