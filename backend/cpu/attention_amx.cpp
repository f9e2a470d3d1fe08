// Attention on AMX: 32 queries at a time meet all their keys, in tiles of bfloat16 with float32 sums.
//
// A float x is split in two bfloat16, hi and lo = round(x - hi), and a product is hi hi + hi lo + lo hi. Of keys and values hi is
// the nearest bfloat16, of queries and probabilities the one towards zero, which costs less: what both parts leave out, and the
// product of the low parts, are each below 2^-16 (tests/test_attention.py). Operands that are bfloat16 have no low part;
// probabilities always do.
//
// Tiles multiply one block of queries while the vector units take the softmax of the next one, a few rows after each step: the
// two would otherwise wait for each other. The pairs of a tile's row are numbers that lie 16 apart, which no sum sees: they come
// out of two registers without a shuffle.

#include "attention.h"
#include "tiles.h"
#include "transpose.h"

namespace {

constexpr int SIDE = 16, QUERIES = 32, DEPTH = 32, TILE = 512;  // rows of a tile, bfloat16 along the sum, bfloat16 in a tile
typedef uint16_t half;

struct Sizes {
  int64_t depth, keys, width, row;  // D and T in steps of 32, twice; numbers in a row of scores, never a power of two
  explicit Sizes(const Attention& a)
      : depth((a.D + 31) / 32 * 32), keys((a.T + 31) / 32 * 32), width(depth), row(keys + LANES) {}
};

struct Space {
  half *keys[2], *values[2], *queries[2];  // high and low parts, as tiles
  half* probabilities[2][2];               // of a block and of the one before it
  float *scores[2], *mixed, *mask;
};

struct Pairs {  // bfloat16 of two registers, in turn
  __m512i hi, lo;
};

inline __m512i interleave(__m512i even, __m512i odd) {  // their upper halves
  return _mm512_ternarylogic_epi32(_mm512_srli_epi32(even, 16), odd, _mm512_set1_epi32(0xffff0000), 0xf8);  // a | b & c
}

inline __m512i halfway(__m512i x) { return _mm512_add_epi32(x, _mm512_set1_epi32(0x8000)); }  // cut, it is the nearest bfloat16

template <bool NEAREST>
inline __m512i high(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  return _mm512_and_si512(NEAREST ? halfway(bits) : bits, _mm512_set1_epi32(0xffff0000));
}

template <bool NEAREST>
inline Pairs split(__m512 x, __m512 y) {
  const __mmask16 x_odd = _mm512_fpclass_ps_mask(x, 0x99), y_odd = _mm512_fpclass_ps_mask(y, 0x99);  // infinite or NaN: no low part
  const __m512i a = _mm512_mask_mov_epi32(high<NEAREST>(x), x_odd, _mm512_castps_si512(x));
  const __m512i b = _mm512_mask_mov_epi32(high<NEAREST>(y), y_odd, _mm512_castps_si512(y));
  const __m512 p = _mm512_maskz_sub_ps((__mmask16)~x_odd, x, _mm512_castsi512_ps(a)), q = _mm512_maskz_sub_ps((__mmask16)~y_odd, y, _mm512_castsi512_ps(b));
  return {interleave(a, b), interleave(halfway(_mm512_castps_si512(p)), halfway(_mm512_castps_si512(q)))};
}

// Two registers of a row: columns c to c + 16 and c + 16 to c + 32, zeros from D.
struct Row {
  __m512 left, right;
};

inline Row row_of(const Attention& a, const char* x, int64_t c, bool there) {
  if (!there) return {_mm512_setzero_ps(), _mm512_setzero_ps()};
  const int64_t left = a.D - c, size = element_size(a.dtype);
  return {load(x + c * size, a.dtype, tail(left)), left > LANES ? load(x + (c + LANES) * size, a.dtype, tail(left - LANES)) : _mm512_setzero_ps()};
}

// Keys t to t + 16 as tiles [keys / 16][depth / 32][16 pairs along D][16 keys][2].
void take_keys(const Attention& a, const Sizes& sizes, const Space& space, const char* k, int64_t t, int64_t seen, int parts) {
  for (int64_t c = 0; c < sizes.depth; c += DEPTH) {
    __m512i hi[SIDE], lo[SIDE];
    for (int64_t i = 0; i < SIDE; i++) {
      const Row x = row_of(a, k + (t + i) * a.kt * element_size(a.dtype), c, t + i < seen);
      const Pairs pairs = split<true>(x.left, x.right);
      hi[i] = pairs.hi, lo[i] = pairs.lo;
    }
    const int64_t at = (t / SIDE * (sizes.depth / DEPTH) + c / DEPTH) * TILE;
    transpose(hi, (uint32_t*)(space.keys[0] + at), SIDE);
    if (parts > 1) transpose(lo, (uint32_t*)(space.keys[1] + at), SIDE);
  }
}

// Values t to t + 32 as tiles [keys / 32][width / 16][16 pairs of keys][16 columns][2].
void take_values(const Attention& a, const Sizes& sizes, const Space& space, const char* v, int64_t t, int64_t seen, int parts) {
  const int64_t step = a.vt * element_size(a.dtype);
  for (int64_t c = 0; c < sizes.width; c += DEPTH) {
    const int64_t at = (t / DEPTH * (sizes.width / SIDE) + c / SIDE) * TILE;
    for (int64_t i = 0; i < SIDE; i++) {
      const Row x = row_of(a, v + (t + i) * step, c, t + i < seen), y = row_of(a, v + (t + i + SIDE) * step, c, t + i + SIDE < seen);
      const Pairs left = split<true>(x.left, y.left), right = split<true>(x.right, y.right);
      _mm512_store_si512(space.values[0] + at + i * DEPTH, left.hi);
      _mm512_store_si512(space.values[0] + at + TILE + i * DEPTH, right.hi);
      if (parts > 1) {
        _mm512_store_si512(space.values[1] + at + i * DEPTH, left.lo);
        _mm512_store_si512(space.values[1] + at + TILE + i * DEPTH, right.lo);
      }
    }
  }
}

// Queries l to l + 32 as tiles [depth / 32][2][16 rows][16 pairs along D][2].
void take_queries(const Attention& a, const Sizes& sizes, const Space& space, const char* q, int64_t rows) {
  for (int64_t c = 0; c < sizes.depth; c += DEPTH)
    for (int64_t i = 0; i < (rows > SIDE ? QUERIES : SIDE); i++) {
      const Row x = row_of(a, q + i * a.ql * element_size(a.dtype), c, i < rows);
      const Pairs pairs = split<false>(x.left, x.right);
      _mm512_store_si512(space.queries[0] + (c * QUERIES + i * DEPTH), pairs.hi);
      _mm512_store_si512(space.queries[1] + (c * QUERIES + i * DEPTH), pairs.lo);
    }
}

// Tiles 0 to 3, two above two, += what is at `above`, and TILE further below, times what is at `left` and at `right`; each in one
// part, or in two where `low` says so (1: the factors on the left, 2: those on the right). Four sums in turn: each takes 52 cycles.
#define FOUR_PRODUCTS(both)       \
  _tile_dpbf16ps(0, 4, 6);        \
  _tile_dpbf16ps(1, 4, 7);        \
  if (both) {                     \
    _tile_dpbf16ps(2, 5, 6);      \
    _tile_dpbf16ps(3, 5, 7);      \
  }

template <typename Meanwhile>
inline void multiply(half* const above[2], int64_t at, half* const beside[2], int64_t left, int64_t right, int low, bool both, Meanwhile& meanwhile) {
  _tile_loadd(6, beside[0] + left, 64);
  _tile_loadd(7, beside[0] + right, 64);
  if (low & 1) {
    _tile_loadd(4, above[1] + at, 64);
    if (both) _tile_loadd(5, above[1] + at + TILE, 64);
    FOUR_PRODUCTS(both)
    meanwhile();
  }
  _tile_loadd(4, above[0] + at, 64);
  if (both) _tile_loadd(5, above[0] + at + TILE, 64);
  FOUR_PRODUCTS(both)
  meanwhile();
  if (low & 2) {
    _tile_loadd(6, beside[1] + left, 64);
    _tile_loadd(7, beside[1] + right, 64);
    FOUR_PRODUCTS(both)
    meanwhile();
  }
}

inline void clear() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

inline void put(float* out, int64_t stride, bool both) {
  _tile_stored(0, out, 4 * stride);
  _tile_stored(1, out + SIDE, 4 * stride);
  if (both) {
    _tile_stored(2, out + SIDE * stride, 4 * stride);
    _tile_stored(3, out + SIDE * stride + SIDE, 4 * stride);
  }
}

struct Block {  // queries l to l + rows, and the keys that some of them see
  int64_t l, rows, T;
  int turn;             // which of two places
  int64_t done;         // rows whose softmax is taken
  float by[QUERIES];    // 1 / sum of each
};

struct Head {
  const Attention& a;
  const Sizes& sizes;
  const Space& space;
  int64_t b, h;
  int parts;
  bool one_mask;  // it is that of all queries, and lies in space.mask, in units of log 2

  // A row of scores becomes probabilities up to their sum, zeros from T to `end`; returns 1 / sum.
  float softmax(const Block& block, int64_t i) const {
    const int64_t T = a.causal && block.l + i + 1 < a.T ? block.l + i + 1 : a.T, end = (block.T + DEPTH - 1) / DEPTH * DEPTH;
    float* s = space.scores[block.turn] + i * sizes.row;
    const float* add = space.mask;
    const __m512 off = _mm512_set1_ps(-INFINITY), scale = _mm512_set1_ps(a.scale * 1.44269504f);
    if (a.mask && !one_mask) mask_to_powers(a, mask_row(a, b, h, block.l + i), space.mask);
    __m512 largest = off;
    for (int64_t t = 0; t < T; t += LANES) {
      __m512 x = _mm512_load_ps(s + t);
      x = a.mask ? _mm512_fmadd_ps(x, scale, _mm512_load_ps(add + t)) : _mm512_mul_ps(x, scale);
      if (t + LANES > T) x = _mm512_mask_mov_ps(off, tail(T - t), x);
      largest = _mm512_max_ps(largest, x);
      _mm512_store_ps(s + t, x);
    }
    for (int64_t t = (T + LANES - 1) / LANES * LANES; t < end; t += LANES) _mm512_store_ps(s + t, off);
    const float top = _mm512_reduce_max_ps(largest);
    const __m512 shift = _mm512_set1_ps(top == -INFINITY ? 0.0f : top), least = _mm512_set1_ps(-200.0f);
    __m512 total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    half *hi = space.probabilities[block.turn][0] + i * DEPTH, *lo = space.probabilities[block.turn][1] + i * DEPTH;
    for (int64_t t = 0; t < end; t += DEPTH, hi += QUERIES * DEPTH, lo += QUERIES * DEPTH) {
      const __m512 x = power_of_two(_mm512_max_ps(least, _mm512_sub_ps(_mm512_load_ps(s + t), shift)));  // a NaN stays one
      const __m512 y = power_of_two(_mm512_max_ps(least, _mm512_sub_ps(_mm512_load_ps(s + t + LANES), shift)));
      total[0] = _mm512_add_ps(total[0], x), total[1] = _mm512_add_ps(total[1], y);
      const __m512i p = high<false>(x), q = high<false>(y);
      const __m512 r = _mm512_sub_ps(x, _mm512_castsi512_ps(p)), u = _mm512_sub_ps(y, _mm512_castsi512_ps(q));
      _mm512_store_si512(hi, interleave(p, q));
      _mm512_store_si512(lo, interleave(halfway(_mm512_castps_si512(r)), halfway(_mm512_castps_si512(u))));
    }
    const float sum = _mm512_reduce_add_ps(_mm512_add_ps(total[0], total[1]));
    return sum == 0 ? 0.0f : 1.0f / sum;
  }

  void soften(Block& block, int64_t end) const {
    for (; block.done < end; block.done++) block.by[block.done] = softmax(block, block.done);
  }

  // Scores of a block; `meanwhile` is called after every few products.
  template <typename Meanwhile>
  void score(const Block& block, Meanwhile& meanwhile) const {
    const int64_t steps = sizes.depth / DEPTH;
    const bool both = block.rows > SIDE;
    for (int64_t t = 0; t < block.T; t += DEPTH) {
      clear();
      for (int64_t step = 0; step < steps; step++) {
        const int64_t at = (t / SIDE * steps + step) * TILE;
        multiply(space.queries, step * QUERIES * DEPTH, space.keys, at, at + steps * TILE, parts > 1 ? 3 : 0, both, meanwhile);
      }
      put(space.scores[block.turn] + t, sizes.row, both);
    }
  }

  // Probabilities of a block times the values, to the output.
  template <typename Meanwhile>
  void mix(const Block& block, Meanwhile& meanwhile) const {
    const int size = element_size(a.dtype), low = parts > 1 ? 3 : 1;
    const bool both = block.rows > SIDE;
    for (int64_t c = 0; c < sizes.width; c += DEPTH) {
      clear();
      for (int64_t t = 0; t < block.T; t += DEPTH) {
        const int64_t at = (t / DEPTH * (sizes.width / SIDE) + c / SIDE) * TILE;
        multiply(space.probabilities[block.turn], t * QUERIES, space.values, at, at + TILE, low, both, meanwhile);
      }
      put(space.mixed + c, sizes.width, both);
    }
    asm volatile("" ::: "memory");
    for (int64_t i = 0; i < block.rows; i++)
      for (int64_t c = 0; c < a.D; c += LANES) {
        const __m512 x = _mm512_mul_ps(_mm512_load_ps(space.mixed + i * sizes.width + c), _mm512_set1_ps(block.by[i]));
        store(a.out + ((b * a.L + block.l + i) * a.row + h * a.D + c) * size, x, a.dtype, tail(a.D - c));
      }
  }
};

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
    for (int turn = 0; turn < 2; turn++) space.probabilities[turn][p] = (half*)take(2 * QUERIES * sizes.keys);
    space.scores[p] = (float*)take(4 * QUERIES * sizes.row);
  }
  space.mixed = (float*)take(4 * QUERIES * sizes.width);
  space.mask = (float*)take(4 * sizes.keys);
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
  const int64_t g = h / (a.H / a.G), last = first + count, seen = a.causal && last < a.T ? last : a.T;
  const char *q = a.q + (b * a.qb + h * a.qh) * size, *k = a.k + (b * a.kb + g * a.kh) * size, *v = a.v + (b * a.vb + g * a.vh) * size;
  const Head head = {a, sizes, space, b, h, parts, a.mask && a.ml == 0};
  for (int64_t t = 0; t < (seen + 31) / 32 * 32; t += SIDE) take_keys(a, sizes, space, k, t, seen, parts);
  for (int64_t t = 0; t < seen; t += DEPTH) take_values(a, sizes, space, v, t, seen, parts);
  if (head.one_mask) mask_to_powers(a, mask_row(a, b, h, 0), space.mask);

  configure({SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE});
  Block blocks[3];  // block i is scored, then its softmax is taken while i - 1 is mixed and i + 1 scored, then it is mixed
  Block *before = nullptr, *now = nullptr;
  int turn = 0;
  for (int64_t l = first;; l += QUERIES) {
    Block* next = nullptr;
    if (l < last) {
      next = &blocks[turn % 3];
      const int64_t rows = last - l < QUERIES ? last - l : QUERIES;
      next->l = l, next->rows = rows, next->T = a.causal && l + rows < a.T ? l + rows : a.T, next->turn = turn % 2, next->done = 0;
      take_queries(a, sizes, space, q + l * a.ql * size, rows);
      turn++;
    }
    const int64_t mixes = before ? (before->T + 31) / 32 * (sizes.width / DEPTH) * (parts + 1) : 0;
    const int64_t scores = next ? (next->T + 31) / 32 * (sizes.depth / DEPTH) * (2 * parts - 1) : 0;
    int64_t passed = 0;
    auto meanwhile = [&] {
      if (now) head.soften(*now, now->rows * ++passed / (mixes + scores));
    };
    asm volatile("" ::: "memory");  // tiles are loaded and stored behind the compiler's back
    if (before) head.mix(*before, meanwhile);
    if (next) head.score(*next, meanwhile);
    asm volatile("" ::: "memory");
    if (now) head.soften(*now, now->rows);
    if (!next && !now) break;
    before = now, now = next;
  }
  _tile_release();
}
