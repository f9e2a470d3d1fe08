// Linear layers whose weights have 1 to 8 bits, in groups along K: read once, contiguously, and decoded in registers.
//
// A panel of 64 outputs is one stream of codes, cut into groups and those into blocks of a few quads: four inputs of each of the
// 64 outputs, 256 bytes as int8. Narrow codes share bytes, so that a load, a shift and a mask give a quad (low_bit.py has the
// layout). A chunk of the stream is decoded into the first-level cache, and all rows are multiplied with it there: to int8, for
// vpdpbusd, where activations are u8, and to float where they are floats.
//
// With w = scale (code - zero) and x = x_scale (q - x_zero), a group adds, exactly up to the first product,
//   scale (sum q code - zero sum (q - x_zero) - x_zero sum code)
// The sum of the codes and the zero of a group are one word, (zero << 24) + (sum & 0xffffff).
//
// Groups are added in order, whatever the threads and the rows beside, so that neither changes a bit.

#include "low_bit.h"
#include "memory.h"
#ifdef WITH_AMX
#include "tiles.h"
#endif

#include <type_traits>

namespace {

constexpr int ROWS = 6, BAND = 96, AHEAD = 4096;  // rows at a time in registers, and in the caches; bytes to prefetch ahead
constexpr int TILE = 16, FEWEST_ROWS_OF_AMX = 3;

// The intrinsic, without the copies that GCC 12 makes of every sum around it.
inline void dpbusd(__m512i& sum, __m512i u8, __m512i s8) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u8), "v"(s8)); }

// Four registers of sums into a row of them, or onto it.
inline void put(int32_t* row, __m512i a, __m512i b, __m512i c, __m512i d, bool first) {
  if (!first) {
    a = _mm512_add_epi32(a, _mm512_load_si512(row)), b = _mm512_add_epi32(b, _mm512_load_si512(row + 16));
    c = _mm512_add_epi32(c, _mm512_load_si512(row + 32)), d = _mm512_add_epi32(d, _mm512_load_si512(row + 48));
  }
  _mm512_store_si512(row, a), _mm512_store_si512(row + 16, b), _mm512_store_si512(row + 32, c), _mm512_store_si512(row + 48, d);
}

inline void put(int32_t* row, __m512 a, __m512 b, __m512 c, __m512 d, bool first) {
  if (!first) {
    a = _mm512_add_ps(a, _mm512_load_ps(row)), b = _mm512_add_ps(b, _mm512_load_ps(row + 16));
    c = _mm512_add_ps(c, _mm512_load_ps(row + 32)), d = _mm512_add_ps(d, _mm512_load_ps(row + 48));
  }
  _mm512_store_ps(row, a), _mm512_store_ps(row + 16, b), _mm512_store_ps(row + 32, c), _mm512_store_ps(row + 48, d);
}

inline __m512i masked(__m512i v, int mask) { return _mm512_and_si512(v, _mm512_set1_epi8((char)mask)); }

// The quads of a block for sixteen outputs, to(i, codes). Shifts cross bytes, and the mask takes away what came from others.
template <int BITS, class To>
inline void unpack(const uint8_t* block, To to) {
  const __m512i v = _mm512_loadu_si512(block);
  if constexpr (BITS > 4) {
    to(0, v);
  } else if constexpr (BITS != 3) {
#pragma GCC unroll 8
    for (int i = 0; i < 8 / BITS; i++) to(i, masked(i ? _mm512_srli_epi16(v, BITS * i) : v, (1 << BITS) - 1));
  } else {
    const __m512i low[2] = {v, _mm512_loadu_si512(block + 4 * PANEL)}, high = _mm512_loadu_si512(block + 8 * PANEL);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      const __m512i third = i < 2 ? _mm512_slli_epi16(high, 2 - i) : _mm512_srli_epi16(high, i - 2);
      to(i, _mm512_or_si512(masked(_mm512_srli_epi16(low[i / 4], 2 * (i % 4)), 3), masked(third, 4)));
    }
  }
}

template <int BITS>
inline void prefetch(const uint8_t* block) {
#pragma GCC unroll 3
  for (int line = 0; line < block_bytes(BITS); line += 4 * PANEL) _mm_prefetch(block + AHEAD + line, _MM_HINT_T0);
}

// Activations of u8: quads of int8, sums of int32.
struct Integer {
  using X = uint8_t;
  using W = int8_t;
  static constexpr int CHUNK = 256;
  const LowBit& a;
  const int32_t* sums;  // [M, groups], of q - x_zero
  bool tiles;

  template <int BITS>
  static void decode(const uint8_t* from, int64_t blocks, const int32_t*, W* to) {
    for (int64_t b = 0; b < blocks; b++, from += block_bytes(BITS), to += depth(BITS) * PANEL)
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        prefetch<BITS>(from + j * 64);
        unpack<BITS>(from + j * 64, [&](int i, __m512i quad) { _mm512_store_si512(to + i * 4 * PANEL + j * 64, quad); });
      }
  }

  template <int MR>
  static void multiply(const X* x, int64_t stride, const W* w, int64_t count, int32_t* part, bool first) {
    __m512i sum[MR][4];
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = _mm512_setzero_si512();
    for (int64_t k = 0; k < count; k += 4, w += 4 * PANEL) {
      const __m512i w0 = _mm512_load_si512(w), w1 = _mm512_load_si512(w + 64), w2 = _mm512_load_si512(w + 128), w3 = _mm512_load_si512(w + 192);
#pragma GCC unroll 8
      for (int i = 0; i < MR; i++) {
        const __m512i q = _mm512_castps_si512(_mm512_broadcastss_ps(_mm_load_ss((const float*)(x + i * stride + k))));
        dpbusd(sum[i][0], q, w0);
        dpbusd(sum[i][1], q, w1);
        dpbusd(sum[i][2], q, w2);
        dpbusd(sum[i][3], q, w3);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) put(part + i * PANEL, sum[i][0], sum[i][1], sum[i][2], sum[i][3], first);
  }

#ifdef WITH_AMX
  // TILE rows, or all that there are if fewer. `count` is a multiple of 64.
  static void multiply_tiles(const X* x, int64_t stride, const W* w, int64_t count, int32_t* part, bool first) {
    asm volatile("" ::: "memory");  // tiles are loaded behind the compiler's back
    if (first) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, part, 4 * PANEL);
      _tile_loadd(1, part + 16, 4 * PANEL);
      _tile_loadd(2, part + 32, 4 * PANEL);
      _tile_loadd(3, part + 48, 4 * PANEL);
    }
    for (int64_t k = 0; k < count; k += DEPTH, w += DEPTH * PANEL) {
      _tile_loadd(4, x + k, stride);
      _tile_loadd(5, w, 4 * PANEL);
      _tile_dpbusd(0, 4, 5);
      _tile_loadd(6, w + 64, 4 * PANEL);
      _tile_dpbusd(1, 4, 6);
      _tile_loadd(5, w + 128, 4 * PANEL);
      _tile_dpbusd(2, 4, 5);
      _tile_loadd(6, w + 192, 4 * PANEL);
      _tile_dpbusd(3, 4, 6);
    }
    _tile_stored(0, part, 4 * PANEL);
    _tile_stored(1, part + 16, 4 * PANEL);
    _tile_stored(2, part + 32, 4 * PANEL);
    _tile_stored(3, part + 48, 4 * PANEL);
  }
#endif

  __m512 of_group(int64_t m, int64_t g, const int32_t* part, __m512i terms) const {
    const __m512i zero = _mm512_srai_epi32(terms, 24), sum = _mm512_srai_epi32(_mm512_slli_epi32(terms, 8), 8);
    const __m512i less = _mm512_add_epi32(
        _mm512_mullo_epi32(zero, _mm512_set1_epi32(sums[m * a.groups + g])),
        _mm512_mullo_epi32(sum, _mm512_set1_epi32(a.zero[m * a.per_row])));
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_load_si512(part), less));
  }

  __m512 of_row(int64_t m, __m512 total, __m512 bias) const {
    return _mm512_fmadd_ps(total, _mm512_set1_ps(a.scale[m * a.per_row]), bias);
  }

  // A row, in groups of `padded`, and its sums.
  void prepare(int64_t m, X* to, int64_t padded, int32_t* sums) const {
    const uint8_t* from = (const uint8_t*)a.x + m * a.x_stride;
    const int32_t zero = a.zero[m * a.per_row] * (int32_t)a.size;
    for (int64_t g = 0; g < a.groups; g++, from += a.size) {
      int32_t sum = 0;
      for (int64_t k = 0; k < a.size; k++) sum += from[k];
      sums[m * a.groups + g] = sum - zero;
      if (!to) continue;
      memcpy(to + g * padded, from, a.size);
      memset(to + g * padded + a.size, 0, padded - a.size);
    }
  }
};

// Activations of floats: weights and sums of floats. A code is decoded exactly, and a group's scale multiplies its sum.
struct Float {
  using X = float;
  using W = float;
  static constexpr int CHUNK = 64;
  const LowBit& a;
  const int32_t* sums;
  bool tiles;

  // Sixteen outputs of one input at a time, use(input, which sixteen, values).
  template <int BITS, class Use>
  static void each(const uint8_t* from, int64_t blocks, const int32_t* terms, Use use) {
    const __m512i replicate = _mm512_set4_epi32(0x0f0f0f0f, 0x0b0b0b0b, 0x07070707, 0x03030303);
    const __m512 low = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 high = _mm512_sub_ps(low, _mm512_set1_ps(16));
    const __m512i byte = _mm512_set1_epi32(0xff), magic = _mm512_set1_epi32(0x4b000080);  // 2^23, and codes biased by 128
    __m512i zero[4];
    __m512 from_zero[4];
    for (int j = 0; j < 4; j++) {
      const __m512i word = _mm512_loadu_si512(terms + j * LANES);
      zero[j] = _mm512_shuffle_epi8(word, replicate);
      from_zero[j] = _mm512_add_ps(_mm512_set1_ps(0x1p23f + 128), _mm512_cvtepi32_ps(_mm512_srai_epi32(word, 24)));
    }
    for (int64_t b = 0; b < blocks; b++, from += block_bytes(BITS))
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        prefetch<BITS>(from + j * 64);
        unpack<BITS>(from + j * 64, [&](int i, __m512i quad) {
          if constexpr (BITS <= 4) quad = _mm512_sub_epi8(quad, zero[j]);
#pragma GCC unroll 4
          for (int t = 0; t < 4; t++) {
            const __m512i code = t ? _mm512_srli_epi32(quad, 8 * t) : quad;
            const int64_t k = b * depth(BITS) + i * 4 + t;
            if constexpr (BITS <= 4)  // -15 to 15: five bits choose among 32 floats
              use(k, j, _mm512_permutex2var_ps(low, code, high));
            else  // ((code & 0xff) ^ 0x80) + 2^23, as the bits of a float
              use(k, j, _mm512_sub_ps(_mm512_castsi512_ps(_mm512_ternarylogic_epi32(code, byte, magic, 0x6a)), from_zero[j]));
          }
        });
      }
  }

  template <int BITS>
  static void decode(const uint8_t* from, int64_t blocks, const int32_t* terms, W* to) {
    each<BITS>(from, blocks, terms, [&](int64_t k, int j, __m512 w) { _mm512_store_ps(to + k * PANEL + j * LANES, w); });
  }

  // One row: each weight is used once, so it stays in its register. The order is that of many rows.
  template <int BITS>
  static void single(const X* x, const uint8_t* from, int64_t blocks, const int32_t* terms, int32_t* part, bool first) {
    __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    each<BITS>(from, blocks, terms, [&](int64_t k, int j, __m512 w) { sum[j] = _mm512_fmadd_ps(_mm512_set1_ps(x[k]), w, sum[j]); });
    put(part, sum[0], sum[1], sum[2], sum[3], first);
  }

  template <int MR>
  static void multiply(const X* x, int64_t stride, const W* w, int64_t count, int32_t* part, bool first) {
    __m512 sum[MR][4];
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = _mm512_setzero_ps();
    for (int64_t k = 0; k < count; k++, w += PANEL) {
      const __m512 w0 = _mm512_load_ps(w), w1 = _mm512_load_ps(w + 16), w2 = _mm512_load_ps(w + 32), w3 = _mm512_load_ps(w + 48);
#pragma GCC unroll 8
      for (int i = 0; i < MR; i++) {
        const __m512 q = _mm512_set1_ps(x[i * stride + k]);
        sum[i][0] = _mm512_fmadd_ps(q, w0, sum[i][0]);
        sum[i][1] = _mm512_fmadd_ps(q, w1, sum[i][1]);
        sum[i][2] = _mm512_fmadd_ps(q, w2, sum[i][2]);
        sum[i][3] = _mm512_fmadd_ps(q, w3, sum[i][3]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) put(part + i * PANEL, sum[i][0], sum[i][1], sum[i][2], sum[i][3], first);
  }

  __m512 of_group(int64_t, int64_t, const int32_t* part, __m512i) const { return _mm512_load_ps(part); }

  __m512 of_row(int64_t, __m512 total, __m512 bias) const { return _mm512_add_ps(total, bias); }

  void prepare(int64_t m, X* to, int64_t padded, int32_t*) const {
    const int size = element_size(a.x_dtype);
    const char* from = a.x + m * a.groups * a.size * size;
    for (int64_t g = 0; g < a.groups; g++, from += a.size * size)
      for (int64_t k = 0; k < padded; k += LANES) {
        const __mmask16 lanes = k < a.size ? tail(a.size - k) : 0;
        _mm512_mask_storeu_ps(to + g * padded + k, tail(padded - k), load(from + k * size, a.x_dtype, lanes));
      }
  }
};

// `chunk` has room for inputs up to a multiple of 64.
template <class Kind>
void multiply(const Kind& kind, const typename Kind::X* x, int64_t stride, int64_t rows, typename Kind::W* w, int64_t count, int32_t* part, bool first) {
#ifdef WITH_AMX
  if constexpr (std::is_same_v<Kind, Integer>)
    if (kind.tiles) {
      const int64_t whole = (count + DEPTH - 1) / DEPTH * DEPTH;
      memset(w + count * PANEL, 0, (whole - count) * PANEL);
      for (int64_t i = 0; i < rows; i += TILE) Kind::multiply_tiles(x + i * stride, stride, w, whole, part + i * PANEL, first);
      return;
    }
#endif
  for (; rows >= ROWS; x += ROWS * stride, part += ROWS * PANEL, rows -= ROWS)
    Kind::template multiply<ROWS>(x, stride, w, count, part, first);
  switch (rows) {
    case 5: return Kind::template multiply<5>(x, stride, w, count, part, first);
    case 4: return Kind::template multiply<4>(x, stride, w, count, part, first);
    case 3: return Kind::template multiply<3>(x, stride, w, count, part, first);
    case 2: return Kind::template multiply<2>(x, stride, w, count, part, first);
    case 1: return Kind::template multiply<1>(x, stride, w, count, part, first);
  }
}

// `up`: what gates let through, if they are such.
template <int ACTIVATION, class Kind>
void finish(const Kind& kind, const float* total, const float* up, int64_t m, int64_t rows, int64_t panel) {
  const LowBit& a = kind.a;
  for (int64_t n = panel * PANEL, j = 0; j < 4 && n < a.N; j++, n += LANES) {
    const __mmask16 lanes = tail(a.N - n);
    const auto bias_from = [&](int64_t n) { return load(a.bias + n * element_size(a.bias_dtype), a.bias_dtype, lanes); };
    const __m512 bias = a.bias ? bias_from(n) : _mm512_setzero_ps();
    const __m512 bias_up = a.bias && up ? bias_from(a.N + n) : _mm512_setzero_ps();
    for (int64_t i = 0; i < rows; i++) {
      const int64_t at = i * PANEL + j * LANES;
      __m512 y = activate<ACTIVATION>(kind.of_row(m + i, _mm512_load_ps(total + at), bias));
      if (up) y = _mm512_mul_ps(y, kind.of_row(m + i, _mm512_load_ps(up + at), bias_up));
      store(a.out + ((m + i) * a.N + n) * element_size(a.dtype), y, a.dtype, lanes);
    }
  }
}

// The sums over all groups of rows m to m + rows, BAND at most, and one panel.
template <class Kind, int BITS>
void sum_up(const Kind& kind, const typename Kind::X* x, int64_t stride, int64_t step, int64_t m, int64_t rows, int64_t panel, float* total) {
  const LowBit& a = kind.a;
  alignas(64) typename Kind::W chunk[Kind::CHUNK * PANEL];
  alignas(64) int32_t part[BAND * PANEL];
  const int64_t blocks = (a.size + depth(BITS) - 1) / depth(BITS);
  constexpr int64_t most = Kind::CHUNK / depth(BITS);
  for (int64_t g = 0; g < a.groups; g++) {
    const int64_t group = panel * a.groups + g;
    const int32_t* terms = a.terms + group * PANEL;
    for (int64_t b = 0; b < blocks; b += most) {
      const int64_t count = blocks - b < most ? blocks - b : most;
      const uint8_t* codes = a.weight + (group * blocks + b) * block_bytes(BITS);
      const typename Kind::X* first = x + m * stride + g * step + b * depth(BITS);
      if constexpr (std::is_same_v<Kind, Float>)
        if (rows == 1) {
          Kind::template single<BITS>(first, codes, count, terms, part, b == 0);
          continue;
        }
      Kind::template decode<BITS>(codes, count, terms, chunk);
      multiply(kind, first, stride, rows, chunk, count * depth(BITS), part, b == 0);
    }
    for (int j = 0; j < 4; j++) {
      const __m512 scale = _mm512_loadu_ps(a.weight_scale + group * PANEL + j * LANES);
      const __m512i word = _mm512_loadu_si512(terms + j * LANES);
      for (int64_t i = 0; i < rows; i++) {
        float* sum = total + i * PANEL + j * LANES;
        const __m512 before = g ? _mm512_load_ps(sum) : _mm512_setzero_ps();
        _mm512_store_ps(sum, _mm512_fmadd_ps(kind.of_group(m + i, g, part + i * PANEL + j * LANES, word), scale, before));
      }
    }
  }
}

// Rows m to m + rows, BAND at most, of one panel. `x` has groups of `step` elements, and rows of `stride`.
template <class Kind, int BITS>
void band(const Kind& kind, const typename Kind::X* x, int64_t stride, int64_t step, int64_t m, int64_t rows, int64_t panel) {
  const LowBit& a = kind.a;
  alignas(64) float total[BAND * PANEL], up[BAND * PANEL];
  sum_up<Kind, BITS>(kind, x, stride, step, m, rows, panel, total);
  if (a.gated) sum_up<Kind, BITS>(kind, x, stride, step, m, rows, a.N / PANEL + panel, up);
  WITH_ACTIVATION(a.activation, finish<A>(kind, total, a.gated ? up : nullptr, m, rows, panel));
}

template <class Kind>
int run(const LowBit& a, bool tiles, int threads) {
  if (a.M == 0) return 0;
  using X = typename Kind::X;
  const int64_t inner = a.size * a.groups, panels = (a.N + PANEL - 1) / PANEL, bands = (a.M + BAND - 1) / BAND;
  const int64_t unit = tiles ? DEPTH : depth(a.bits), padded = (a.size + unit - 1) / unit * unit;
  const int64_t height = !tiles || a.M <= TILE ? a.M : (a.M + TILE - 1) / TILE * TILE;  // rows that are read
  const bool copied = sizeof(X) > 1 || tiles || padded != a.size;  // else codes lie as they are wanted
  // Rows a power of two apart would share few places of the first-level cache: one line more.
  const int64_t stride = copied ? padded * a.groups + 64 / sizeof(X) : a.x_stride, step = copied ? padded : a.size;
  const int64_t row = copied ? stride * sizeof(X) : 0;
  thread_local Memory space;
  char* memory = space.take(height * row + a.M * a.groups * sizeof(int32_t) + 64);
  if (!memory) return 1;
  int32_t* sums = (int32_t*)(memory + height * row);
  const Kind kind = {a, sums, tiles};
  X* own = copied ? (X*)memory : nullptr;
  const X* x = copied ? own : (const X*)a.x;
  const auto one = [&] {
    switch (a.bits) {
      case 1: return band<Kind, 1>;
      case 2: return band<Kind, 2>;
      case 3: return band<Kind, 3>;
      case 4: return band<Kind, 4>;
      default: return band<Kind, 8>;
    }
  }();
#pragma omp parallel num_threads(threads) if (a.M * a.N * inner > 32768)
  {
#ifdef WITH_AMX
    const int tall = a.M < TILE ? (int)a.M : TILE;
    if (tiles) configure({tall, tall, tall, tall, tall, TILE, TILE, 1});
#endif
#pragma omp for schedule(static)
    for (int64_t m = 0; m < a.M; m++) kind.prepare(m, own ? own + m * stride : nullptr, padded, sums);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < bands * panels; task++) {
      const int64_t m = task % bands * BAND;
      one(kind, x, stride, step, m, m + BAND < a.M ? BAND : a.M - m, task / bands);
    }
#ifdef WITH_AMX
    if (tiles) _tile_release();
#endif
  }
  return 0;
}

// One panel as floats of a.dtype, saturating: row k of a.out has the weights [N] of input k.
template <int BITS>
void decoded(const LowBit& a, int64_t panel) {
  const int64_t blocks = (a.size + depth(BITS) - 1) / depth(BITS);
  const float most = a.dtype == F16 ? 65504.0f : a.dtype == BF16 ? 0x1.fep127f : FLT_MAX;
  const __m512 highest = _mm512_set1_ps(most), lowest = _mm512_set1_ps(-most);
  for (int64_t g = 0; g < a.groups; g++) {
    const int64_t group = panel * a.groups + g;
    const float* scale = a.weight_scale + group * PANEL;
    char* out = a.out + (g * a.size * a.N + panel * PANEL) * element_size(a.dtype);
    Float::each<BITS>(a.weight + group * blocks * block_bytes(BITS), blocks, a.terms + group * PANEL, [&](int64_t k, int j, __m512 w) {
      const int64_t left = a.N - panel * PANEL - j * LANES;
      if (k >= a.size || left <= 0) return;
      w = _mm512_mul_ps(w, _mm512_loadu_ps(scale + j * LANES));
      w = _mm512_max_ps(lowest, _mm512_min_ps(highest, w));  // in this order a NaN stays one
      store(out + (k * a.N + j * LANES) * element_size(a.dtype), w, a.dtype, tail(left));
    });
  }
}

}  // namespace

void low_bit_decode(const LowBit& a, int threads) {
  const auto one = [&] {
    switch (a.bits) {
      case 1: return decoded<1>;
      case 2: return decoded<2>;
      case 3: return decoded<3>;
      case 4: return decoded<4>;
      default: return decoded<8>;
    }
  }();
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t panel = 0; panel < (a.N + PANEL - 1) / PANEL; panel++) one(a, panel);
}

int low_bit_integer(const LowBit& a, int isa, int threads) {
#ifdef WITH_AMX
  if (isa == ON_AMX && a.M >= FEWEST_ROWS_OF_AMX) return run<Integer>(a, true, threads);
#endif
  return run<Integer>(a, false, threads);
}

int low_bit_float(const LowBit& a, int threads) { return run<Float>(a, false, threads); }
