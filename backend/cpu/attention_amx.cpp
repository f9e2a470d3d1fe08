// Attention on AMX: 16 queries at a time meet all their keys, in tiles of bfloat16 with float32 sums.
//
// A float x is split in two bfloat16, hi = round(x) and lo = round(x - hi), and a product is hi hi + hi lo + lo hi: what is left out
// is below 3 * 2^-16 of the product, and each split keeps 16 of 24 bits. Tiles are fast enough for three products to hide behind
// the softmax. Operands that are bfloat16 have no low part; probabilities always do.

#include "attention.h"
#include "tiles.h"

namespace {

constexpr int QUERIES = 16, DEPTH = 32, TILE = 512;  // rows of a tile, bfloat16 along the sum, bfloat16 in a tile
typedef uint16_t half;

struct Space {
  half *keys[2], *values[2], *queries[2], *probabilities[2];  // high and low parts
  float *scores, *mixed;
};

struct Sizes {
  int64_t depth, keys, width;  // D in steps of 32, T in steps of 64, D in steps of 16
  explicit Sizes(const Attention& a) : depth((a.D + 31) / 32 * 32), keys((a.T + 63) / 64 * 64), width((a.D + 15) / 16 * 16) {}
};

struct Split {
  __m512 hi, lo;
};

inline __m512 nearest(__m512 x) {  // to bfloat16, halves to even; infinities stay
  __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(0xffff0000)));
}

inline Split split(__m512 x) {
  __mmask16 odd = _mm512_fpclass_ps_mask(x, 0x99);  // infinite or NaN: no low part
  __m512 hi = _mm512_mask_mov_ps(nearest(x), odd, x);
  return {hi, nearest(_mm512_maskz_sub_ps((__mmask16)~odd, x, hi))};
}

inline __m512i pairs(__m512 even, __m512 odd) {  // bfloat16 of both, in turn
  return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(even), 16),
                         _mm512_and_si512(_mm512_castps_si512(odd), _mm512_set1_epi32(0xffff0000)));
}

inline void store_row(half* at, __m512 x) { _mm256_storeu_si256((__m256i*)at, _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(x), 16))); }

void transpose(const uint32_t* from, uint32_t* to) {  // 16 x 16
  __m512i r[16], s[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(from + 16 * i);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
    r[i] = _mm512_unpacklo_epi64(s[i], s[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(s[i], s[i + 2]),
    r[i + 2] = _mm512_unpacklo_epi64(s[i + 1], s[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(s[i + 1], s[i + 3]);
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {  // r[j], r[j + 4], r[j + 8], r[j + 12]: four lanes of four columns
    __m512i a = _mm512_shuffle_i32x4(r[j], r[j + 4], 0x88), b = _mm512_shuffle_i32x4(r[j], r[j + 4], 0xdd);
    __m512i c = _mm512_shuffle_i32x4(r[j + 8], r[j + 12], 0x88), d = _mm512_shuffle_i32x4(r[j + 8], r[j + 12], 0xdd);
    _mm512_store_si512(to + 16 * j, _mm512_shuffle_i32x4(a, c, 0x88));
    _mm512_store_si512(to + 16 * (j + 8), _mm512_shuffle_i32x4(a, c, 0xdd));
    _mm512_store_si512(to + 16 * (j + 4), _mm512_shuffle_i32x4(b, d, 0x88));
    _mm512_store_si512(to + 16 * (j + 12), _mm512_shuffle_i32x4(b, d, 0xdd));
  }
}

// Keys t to t + 16 as tiles [depth / 32][16 pairs along D][16 keys][2]; zeros where there is nothing.
void take_keys(const Attention& a, const Sizes& sizes, const Space& space, const char* k, int64_t t, int64_t seen, int parts) {
  const int size = element_size(a.dtype);
  for (int64_t c = 0; c < sizes.depth; c += DEPTH) {
    alignas(64) half rows[2][TILE];
    for (int64_t i = 0; i < 16; i++)
      for (int64_t part = 0; part < DEPTH; part += LANES) {
        const int64_t left = a.D - c - part;
        const __mmask16 lanes = t + i < seen && left > 0 ? tail(left) : 0;
        const Split x = split(load(k + ((t + i) * a.kt + c + part) * size, a.dtype, lanes));
        store_row(rows[0] + i * DEPTH + part, x.hi);
        if (parts > 1) store_row(rows[1] + i * DEPTH + part, x.lo);
      }
    for (int p = 0; p < parts; p++) transpose((uint32_t*)rows[p], (uint32_t*)(space.keys[p] + (t / 16 * (sizes.depth / DEPTH) + c / DEPTH) * TILE));
  }
}

// Values t to t + 32 as tiles [width / 16][16 pairs of keys][16 columns][2].
void take_values(const Attention& a, const Sizes& sizes, const Space& space, const char* v, int64_t t, int64_t seen, int parts) {
  const int size = element_size(a.dtype);
  for (int64_t c = 0; c < sizes.width; c += LANES)
    for (int64_t i = 0; i < DEPTH; i += 2) {
      const Split x = split(load(v + ((t + i) * a.vt + c) * size, a.dtype, t + i < seen ? tail(a.D - c) : 0));
      const Split y = split(load(v + ((t + i + 1) * a.vt + c) * size, a.dtype, t + i + 1 < seen ? tail(a.D - c) : 0));
      const int64_t at = (t / DEPTH * (sizes.width / LANES) + c / LANES) * TILE + i * LANES;
      _mm512_store_si512(space.values[0] + at, pairs(x.hi, y.hi));
      if (parts > 1) _mm512_store_si512(space.values[1] + at, pairs(x.lo, y.lo));
    }
}

// Tile `sum` += above parts of the tiles 4, 5 (high and low rows) times 6, 7; intrinsics want their tiles as constants.
#define ADD_PRODUCT(sum, right, at, parts)          \
  _tile_loadd(6, (right)[0] + (at), 64);            \
  _tile_dpbf16ps(sum, 4, 6);                        \
  if ((parts) & 1) _tile_dpbf16ps(sum, 5, 6);       \
  if ((parts) & 2) {                                \
    _tile_loadd(7, (right)[1] + (at), 64);          \
    _tile_dpbf16ps(sum, 4, 7);                      \
  }

// Scores of 16 queries with 64 keys at t.
void score(const Sizes& sizes, const Space& space, int64_t t, int parts) {
  const int64_t steps = sizes.depth / DEPTH, low = parts > 1 ? 3 : 0;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; step++) {
    const int64_t at = (t / 16 * steps + step) * TILE, next = steps * TILE;
    _tile_loadd(4, space.queries[0] + step * DEPTH, 2 * sizes.depth);
    if (low) _tile_loadd(5, space.queries[1] + step * DEPTH, 2 * sizes.depth);
    ADD_PRODUCT(0, space.keys, at, low);
    ADD_PRODUCT(1, space.keys, at + next, low);
    ADD_PRODUCT(2, space.keys, at + 2 * next, low);
    ADD_PRODUCT(3, space.keys, at + 3 * next, low);
  }
  float* s = space.scores + t;
  _tile_stored(0, s, 4 * sizes.keys);
  _tile_stored(1, s + 16, 4 * sizes.keys);
  _tile_stored(2, s + 32, 4 * sizes.keys);
  _tile_stored(3, s + 48, 4 * sizes.keys);
}

// One row of scores becomes probabilities up to their sum, in two bfloat16 each, zeros from T to `end`; returns 1 / sum.
float softmax(const Attention& a, const Space& space, int64_t row, const Sizes& sizes, const char* mask, int64_t T, int64_t end) {
  float* s = space.scores + row * sizes.keys;
  const __m512 off = _mm512_set1_ps(-INFINITY), base = _mm512_set1_ps(1.44269504f), scale = _mm512_set1_ps(a.scale);
  __m512 largest = off;
  for (int64_t t = 0; t < T; t += LANES) {
    __m512 x = _mm512_mul_ps(_mm512_load_ps(s + t), scale);
    if (mask) x = _mm512_add_ps(x, mask_of(a, mask, t, tail(T - t)));
    x = _mm512_mask_mov_ps(off, tail(T - t), x);
    largest = _mm512_max_ps(largest, x);
    _mm512_store_ps(s + t, x);
  }
  const float top = _mm512_reduce_max_ps(largest);
  const __m512 shift = _mm512_set1_ps(top == -INFINITY ? 0.0f : top);
  __m512 total = _mm512_setzero_ps();
  half *hi = space.probabilities[0] + row * sizes.keys, *lo = space.probabilities[1] + row * sizes.keys;
  int64_t t = 0;
  for (; t < T; t += LANES) {
    __m512 x = power_of_two(_mm512_max_ps(_mm512_set1_ps(-200.0f), _mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(s + t), shift), base)));  // a NaN stays one
    total = _mm512_add_ps(total, x);
    __m256bh near = _mm512_cvtneps_pbh(x);
    __m512 rest = _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)near), 16)));
    _mm256_store_si256((__m256i*)(hi + t), (__m256i)near);
    _mm256_store_si256((__m256i*)(lo + t), (__m256i)_mm512_cvtneps_pbh(rest));
  }
  for (; t < end; t += LANES) {
    _mm256_store_si256((__m256i*)(hi + t), _mm256_setzero_si256());
    _mm256_store_si256((__m256i*)(lo + t), _mm256_setzero_si256());
  }
  const float sum = _mm512_reduce_add_ps(total);
  return sum == 0 ? 0.0f : 1.0f / sum;
}

// 16 rows of probabilities times up to 64 columns of the values from c, T keys.
void mix(const Sizes& sizes, const Space& space, int64_t c, int64_t T, int parts) {
  const int64_t tiles = sizes.width / LANES, count = tiles - c / LANES;
  const int low = parts > 1 ? 3 : 1;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t t = 0; t < T; t += DEPTH) {
    const int64_t at = (t / DEPTH * tiles + c / LANES) * TILE;
    _tile_loadd(4, space.probabilities[0] + t, 2 * sizes.keys);
    _tile_loadd(5, space.probabilities[1] + t, 2 * sizes.keys);
    ADD_PRODUCT(0, space.values, at, low);
    if (count > 1) { ADD_PRODUCT(1, space.values, at + TILE, low); }
    if (count > 2) { ADD_PRODUCT(2, space.values, at + 2 * TILE, low); }
    if (count > 3) { ADD_PRODUCT(3, space.values, at + 3 * TILE, low); }
  }
  float* out = space.mixed + c;
  _tile_stored(0, out, 4 * sizes.width);
  if (count > 1) _tile_stored(1, out + 16, 4 * sizes.width);
  if (count > 2) _tile_stored(2, out + 32, 4 * sizes.width);
  if (count > 3) _tile_stored(3, out + 48, 4 * sizes.width);
}

// Rows first to last of one head, into the second cache: heads lie side by side in rows, too far apart for the hardware to see.
void fetch(const char* x, int64_t row, int64_t first, int64_t last, int64_t bytes) {
  for (int64_t i = first; i < last; i++)
    for (int64_t c = 0; c < bytes; c += 64) _mm_prefetch(x + i * row + c, _MM_HINT_T1);
}

Space carve(const Sizes& sizes, char* memory, int64_t* bytes) {
  char* at = memory;
  auto take = [&](int64_t size) {
    char* here = at;
    at += (size + 63) / 64 * 64;
    return here;
  };
  Space space;
  for (int p = 0; p < 2; p++) {
    space.keys[p] = (half*)take(2 * sizes.keys * sizes.depth);
    space.values[p] = (half*)take(2 * sizes.keys * sizes.width);
    space.queries[p] = (half*)take(2 * QUERIES * sizes.depth);
    space.probabilities[p] = (half*)take(2 * QUERIES * sizes.keys);
  }
  space.scores = (float*)take(4 * QUERIES * sizes.keys);
  space.mixed = (float*)take(4 * QUERIES * sizes.width);
  *bytes = at - memory;
  return space;
}

}  // namespace

int64_t amx_attention_bytes(const Attention& a) {
  int64_t bytes;
  carve(Sizes(a), nullptr, &bytes);
  return bytes;
}

void amx_attention(const Attention& a, char* memory, int64_t b, int64_t h, int64_t first, int64_t count) {
  const Sizes sizes(a);
  int64_t bytes;
  const Space space = carve(sizes, memory, &bytes);
  const int size = element_size(a.dtype), parts = a.dtype == BF16 ? 1 : 2;
  const int64_t g = h / (a.H / a.G), seen = a.causal && first + count < a.T ? first + count : a.T;
  const char *k = a.k + (b * a.kb + g * a.kh) * size, *v = a.v + (b * a.vb + g * a.vh) * size;
  for (int64_t t = 0; t < (seen + 63) / 64 * 64; t += 16) take_keys(a, sizes, space, k, t, seen, parts);
  for (int64_t t = 0; t < (seen + 31) / 32 * 32; t += 32) take_values(a, sizes, space, v, t, seen, parts);
  const int64_t after = (b * a.H + h + 1) % (a.B * a.H), nb = after / a.H, nh = after % a.H, ng = nh / (a.H / a.G);  // the next head
  configure({16, 16, 16, 16, 16, 16, 16, 16});
  for (int64_t l = first; l < first + count; l += QUERIES) {
    const int64_t left = first + count - l, rows = left < QUERIES ? left : QUERIES;
    const int64_t T = a.causal && l + rows < a.T ? l + rows : a.T, end = (T + 31) / 32 * 32;
    for (int64_t i = 0; i < QUERIES; i++)
      for (int64_t c = 0; c < sizes.depth; c += LANES) {
        const __mmask16 lanes = i < rows && c < a.D ? tail(a.D - c) : 0;
        const Split x = split(load(a.q + (b * a.qb + h * a.qh + (l + i) * a.ql + c) * size, a.dtype, lanes));
        store_row(space.queries[0] + i * sizes.depth + c, x.hi);
        store_row(space.queries[1] + i * sizes.depth + c, x.lo);
      }
    if (count == a.L) {
      const int64_t from = l * a.T / a.L, to = (l + rows) * a.T / a.L, bytes = a.D * size;
      fetch(a.q + (nb * a.qb + nh * a.qh) * size, a.ql * size, l, l + rows, bytes);
      fetch(a.k + (nb * a.kb + ng * a.kh) * size, a.kt * size, from, to, bytes);
      fetch(a.v + (nb * a.vb + ng * a.vh) * size, a.vt * size, from, to, bytes);
    }
    asm volatile("" ::: "memory");  // tiles are loaded behind the compiler's back
    for (int64_t t = 0; t < T; t += 64) score(sizes, space, t, parts);
    float by[QUERIES];
    for (int64_t i = 0; i < rows; i++)
      by[i] = softmax(a, space, i, sizes, mask_row(a, b, h, l + i), a.causal && l + i + 1 < a.T ? l + i + 1 : a.T, end);
    asm volatile("" ::: "memory");
    for (int64_t c = 0; c < sizes.width; c += 64) mix(sizes, space, c, T, parts);
    for (int64_t i = 0; i < rows; i++)
      for (int64_t c = 0; c < a.D; c += LANES) {
        const __m512 x = _mm512_mul_ps(_mm512_load_ps(space.mixed + i * sizes.width + c), _mm512_set1_ps(by[i]));
        store(a.out + (((b * a.L + l + i) * a.H + h) * a.D + c) * size, x, a.dtype, tail(a.D - c));
      }
  }
  _tile_release();
}
