// Linear layers whose weights have 1 to 8 bits, in groups along K: read once, contiguously, and decoded in registers.
//
// A panel of 64 outputs is one stream of codes, cut into groups and those into blocks of a few quads: four inputs of each of the
// 64 outputs, 256 bytes as int8. Narrow codes share bytes, so that a load, a shift and a mask give a quad (low_bit.py has the
// layout). A few rows are multiplied as it is read; for more, a chunk of the stream is decoded into the first-level cache, and all
// rows are multiplied with it there.
//
// With w = scale (code - zero) and x = x_scale (q - x_zero), a group adds, exactly up to the first product,
//   scale (sum q code - zero sum (q - x_zero) - x_zero sum code)
// The sum of the codes and the zero of a group are one word, (zero << 24) + (sum & 0xffffff).
//
// Activations that are floats become integers too, of 24 bits (16 where they are of 16 bits and groups are small), whose digits
// vpdpbusd multiplies: three instructions for 64 weights, where products of floats take four and as many to decode each. On AVX2,
// which has no such instruction, they are floats.
//
// Groups are added in order, whatever the threads and the rows beside, so that neither changes a bit.

#include "low_bit.h"
#include "memory.h"
#include "runs.h"
#ifdef WITH_AMX
#include "tiles.h"
#endif

#include <type_traits>

namespace {

constexpr int ROWS = 6, BAND = 96, AHEAD = 4096;  // rows at a time in registers, and in the caches; bytes to prefetch ahead
constexpr int TILE = 16;
constexpr int AS_READ = 4;  // rows of digits that weights are multiplied with as they are read

// Sums into sixteen places of a row of them, or onto what is there.
inline void put(int32_t* row, Ints sum, bool first) { write(row, first ? sum : add(sum, ints_at(row))); }

inline void put(int32_t* row, Floats sum, bool first) { write(row, first ? sum : add(sum, floats_at(row))); }

inline Ints masked(Ints v, int mask) { return bits_and(v, all_bytes((char)mask)); }

// The quads of a block for sixteen outputs, to(i, codes). Shifts cross bytes, and the mask takes away what came from others.
template <int BITS, class To>
inline void unpack(const uint8_t* block, To to) {
  const Ints v = ints_at(block);
  if constexpr (BITS > 4) {
    to(0, v);
  } else if constexpr (BITS != 3) {
#pragma GCC unroll 8
    for (int i = 0; i < 8 / BITS; i++) to(i, masked(i ? shr_shorts(v, BITS * i) : v, (1 << BITS) - 1));
  } else {
    const Ints low[2] = {v, ints_at(block + 4 * PANEL)}, high = ints_at(block + 8 * PANEL);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      const Ints third = i < 2 ? shl_shorts(high, 2 - i) : shr_shorts(high, i - 2);
      to(i, bits_or(masked(shr_shorts(low[i / 4], 2 * (i % 4)), 3), masked(third, 4)));
    }
  }
}

template <int BITS>
inline void prefetch(const uint8_t* block) {
#pragma GCC unroll 3
  for (int line = 0; line < block_bytes(BITS); line += 4 * PANEL) _mm_prefetch(block + AHEAD + line, _MM_HINT_T0);
}

// Rows of u8 times quads of int8: sums of int32.
struct Quads {
  using X = uint8_t;
  using W = int8_t;
  static constexpr int CHUNK = 256;

  template <int BITS>
  static void decode(const uint8_t* from, int64_t blocks, const int32_t*, W* to) {
    for (int64_t b = 0; b < blocks; b++, from += block_bytes(BITS), to += depth(BITS) * PANEL)
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        prefetch<BITS>(from + j * 64);
        unpack<BITS>(from + j * 64, [&](int i, Ints quad) { write(to + i * 4 * PANEL + j * 64, quad); });
      }
  }

#ifdef __AVX512F__
  // A weight goes from the register into which it is unpacked to the sums of all rows.
  template <int BITS, int MR>
  static void as_read(const X* x, int64_t stride, const uint8_t* from, int64_t blocks, int32_t* part) {
    Ints sum[MR][4];
#pragma GCC unroll 4
    for (int i = 0; i < MR; i++) sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = zero_ints();
    for (int64_t b = 0; b < blocks; b++, from += block_bytes(BITS), x += depth(BITS))
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        prefetch<BITS>(from + j * 64);
        unpack<BITS>(from + j * 64, [&](int k, Ints quad) {
#pragma GCC unroll 4
          for (int i = 0; i < MR; i++) add_quads(sum[i][j], quad_of(x + i * stride + 4 * k), quad);
        });
      }
#pragma GCC unroll 4
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) put(part + i * PANEL + j * LANES, sum[i][j], true);
  }

  // Not in line, so that it is compiled once and not for each kind of digits.
  template <int BITS>
  [[gnu::noinline]] static bool as_read(const X* x, int64_t stride, int64_t rows, const uint8_t* from, int64_t blocks, int32_t* part) {
    static_assert(AS_READ == 4);
    switch (rows) {
      case 1: return as_read<BITS, 1>(x, stride, from, blocks, part), true;
      case 2: return as_read<BITS, 2>(x, stride, from, blocks, part), true;
      case 3: return as_read<BITS, 3>(x, stride, from, blocks, part), true;
      case 4: return as_read<BITS, 4>(x, stride, from, blocks, part), true;
      default: return false;
    }
  }

  static Ints quad_of(const X* x) { return as_ints(_mm512_broadcastss_ps(_mm_load_ss((const float*)x))); }
#else
  template <int BITS>
  static bool as_read(const X*, int64_t, int64_t, const uint8_t*, int64_t, int32_t*) { return false; }
#endif

  template <int MR>
  static void multiply(const X* x, int64_t stride, const W* w, int64_t count, int32_t* part, bool first) {
#ifdef __AVX512F__
    Ints sum[MR][4];
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = zero_ints();
    for (int64_t k = 0; k < count; k += 4, w += 4 * PANEL) {
      const Ints w0 = ints_at(w), w1 = ints_at(w + 64), w2 = ints_at(w + 128), w3 = ints_at(w + 192);
#pragma GCC unroll 8
      for (int i = 0; i < MR; i++) {
        const Ints q = quad_of(x + i * stride + k);
        add_quads(sum[i][0], q, w0);
        add_quads(sum[i][1], q, w1);
        add_quads(sum[i][2], q, w2);
        add_quads(sum[i][3], q, w3);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) put(part + i * PANEL + j * LANES, sum[i][j], first);
#else
    for (int j = 0; j < 4; j++)
      multiply_quads(x, stride, MR, w + j * 4 * LANES, 4 * PANEL, count, [&](int i, Ints sum) { put(part + i * PANEL + j * LANES, sum, first); });
#endif
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
};

// Activations of P digits each. One digit is given, with its scale and zero point. P of them are made here of a float: of
// x / s + 256^P / 2, rounded, where s is the least power of two, from 2^-126 on, that leaves a group room.
template <int P>
struct Digits : Quads {
  using Math = Quads;
  static constexpr int DIGITS = P, TOLD = P == 1 ? 1 : P + 1;
  const LowBit& a;
  const int32_t* told;  // [M, groups, TOLD]: the sums of the digits, of the highest less its zero point; and the bits of s
  bool tiles;

  Digits(const LowBit& a, const int32_t* told, bool tiles) : a(a), told(told), tiles(tiles) {}

  template <int BITS>
  bool few(const X* x, int64_t stride, int64_t rows, const uint8_t* from, int64_t blocks, const int32_t*, int32_t* part) const {
    return !tiles && as_read<BITS>(x, stride, rows * P, from, blocks, part);
  }

  Floats of_group(int64_t m, int64_t g, const int32_t* part, Ints terms) const {
    const int32_t* here = told + (m * a.groups + g) * TOLD;
    const Ints zero = sar(terms, 24), sum = sar(shl(terms, 8), 8);
    const Ints shift = P == 1 ? mul(sum, all_ints(a.zero[m * a.per_row])) : shl(sum, 7);
    const auto digit = [&](int p, Ints less) { return to_floats(sub(ints_at(part + p * PANEL), add(less, mul(zero, all_ints(here[p]))))); };
    Floats total = digit(P - 1, shift);
    for (int p = P - 2; p >= 0; p--) total = fma(total, all(256), digit(p, zero_ints()));
    return P == 1 ? total : mul(total, all(float_of(here[P])));
  }

  Floats of_row(int64_t m, Floats total, Floats bias) const {
    return P == 1 ? fma(total, all(a.scale[m * a.per_row]), bias) : add(total, bias);
  }

  // A group of a row, filled up to `padded`, its digits in rows of `stride`; and what is told of it.
  void prepare(int64_t m, int64_t g, X* to, int64_t stride, int64_t padded, int32_t* tell) const {
    if constexpr (P == 1) {
      const uint8_t* from = (const uint8_t*)a.x + m * a.x_stride + g * a.size;
      int32_t sum = 0;
      for (int64_t k = 0; k < a.size; k++) sum += from[k];
      tell[0] = sum - a.zero[m * a.per_row] * (int32_t)a.size;
      if (!to) return;
      memcpy(to, from, a.size);
      memset(to + a.size, 0, padded - a.size);
    } else {
      const int bytes = element_size(a.x_dtype);
      const char* from = a.x + (m * a.groups + g) * a.size * bytes;
      Ints most = zero_ints();
      for (int64_t k = 0; k < a.size; k += LANES)
        most = higher(most, as_ints(magnitude(load(from + k * bytes, a.x_dtype, tail(a.size - k)))));
      // By its bits, where a NaN is above an infinity and that above all numbers: then s is NaN, and so is the result.
      const int exponent = highest_of(most) >> 23, power = exponent + 2 - 8 * P < 1 ? 1 : exponent + 2 - 8 * P;
      const bool finite = exponent < 255;
      tell[P] = finite ? power << 23 : 0x7fc00000;
      const Floats inverse = all(float_of((254 - power) << 23));
      constexpr int HALF = 1 << (8 * P - 1);
      Ints sum[P] = {};
      for (int64_t k = 0; k < padded; k += LANES) {
        const Lanes lanes = finite && k < a.size ? tail(a.size - k) : 0;
        const Ints whole = nearest(mul(load(from + k * bytes, a.x_dtype, lanes), inverse));
        const Ints limited = higher(all_ints(1 - HALF), lower(whole, all_ints(HALF - 1)));  // at -HALF, s x might be no float
        const Ints digits = only(lanes, add(limited, all_ints(HALF)));
        for (int p = 0; p < P; p++) {
          const Ints digit = bits_and(shr(digits, 8 * p), all_ints(255));
          sum[p] = add(sum[p], digit);
          write_bytes(to + p * stride + k, tail(padded - k), digit);
        }
      }
      for (int p = 0; p < P; p++) tell[p] = (int32_t)sum_of(to_floats(sum[p]));  // below 2^24, as MOST_INPUTS are
      tell[P - 1] -= 128 * (int32_t)a.size;
    }
  }

  static float float_of(int32_t bits) {
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
  }
};

// Activations of floats: weights and sums of floats. A code is decoded exactly, and a group's scale multiplies its sum.
struct Float {
  using X = float;
  using W = float;
  using Math = Float;
  static constexpr int CHUNK = 64, DIGITS = 1, TOLD = 0;
  const LowBit& a;
  const int32_t* told;
  bool tiles;

  // Sixteen outputs of one input at a time, use(input, which sixteen, values).
  template <int BITS, class Use>
  static void each(const uint8_t* from, int64_t blocks, const int32_t* terms, Use use) {
    const FiveBits of;
    const Ints byte = all_ints(0xff), magic = all_ints(0x4b000080);  // 2^23, and codes biased by 128
    Ints zero[4];
    Floats from_zero[4];
    for (int j = 0; j < 4; j++) {
      const Ints word = ints_at(terms + j * LANES);
      zero[j] = top_bytes(word);
      from_zero[j] = add(all(0x1p23f + 128), to_floats(sar(word, 24)));
    }
    for (int64_t b = 0; b < blocks; b++, from += block_bytes(BITS))
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        prefetch<BITS>(from + j * 64);
        unpack<BITS>(from + j * 64, [&](int i, Ints quad) {
          if constexpr (BITS <= 4) quad = sub_bytes(quad, zero[j]);
#pragma GCC unroll 4
          for (int t = 0; t < 4; t++) {
            const Ints code = t ? shr(quad, 8 * t) : quad;
            const int64_t k = b * depth(BITS) + i * 4 + t;
            if constexpr (BITS <= 4)  // -15 to 15: five bits choose among 32 floats
              use(k, j, of.floats(code));
            else  // ((code & 0xff) ^ 0x80) + 2^23, as the bits of a float
              use(k, j, sub(as_floats(bits_xor(bits_and(code, byte), magic)), from_zero[j]));
          }
        });
      }
  }

  template <int BITS>
  static void decode(const uint8_t* from, int64_t blocks, const int32_t* terms, W* to) {
    each<BITS>(from, blocks, terms, [&](int64_t k, int j, Floats w) { write(to + k * PANEL + j * LANES, w); });
  }

  // One row: each weight is used once, so it stays in its register. The order is that of many rows.
  template <int BITS>
  bool few(const X* x, int64_t, int64_t rows, const uint8_t* from, int64_t blocks, const int32_t* terms, int32_t* part) const {
    if (rows != 1) return false;
    constexpr int64_t most = CHUNK / depth(BITS);
    for (int64_t b = 0; b < blocks; b += most, from += most * block_bytes(BITS), x += CHUNK) {
      Floats sum[4] = {zeros(), zeros(), zeros(), zeros()};
      each<BITS>(from, blocks - b < most ? blocks - b : most, terms, [&](int64_t k, int j, Floats w) { sum[j] = fma(all(x[k]), w, sum[j]); });
      for (int j = 0; j < 4; j++) put(part + j * LANES, sum[j], b == 0);
    }
    return true;
  }

  template <int MR>
  static void multiply(const X* x, int64_t stride, const W* w, int64_t count, int32_t* part, bool first) {
    for (int column = 0; column < 4; column += WIDE)
      multiply_floats<MR, WIDE>(x, stride, w + column * LANES, PANEL, count, [&](int i, int j, Floats sum) {
        put(part + i * PANEL + (column + j) * LANES, sum, first);
      });
  }

  Floats of_group(int64_t, int64_t, const int32_t* part, Ints) const { return floats_at(part); }

  Floats of_row(int64_t, Floats total, Floats bias) const { return add(total, bias); }

  void prepare(int64_t m, int64_t g, X* to, int64_t, int64_t padded, int32_t*) const {
    const int size = element_size(a.x_dtype);
    const char* from = a.x + (m * a.groups + g) * a.size * size;
    for (int64_t k = 0; k < padded; k += LANES) {
      const Lanes lanes = k < a.size ? tail(a.size - k) : 0;
      write(to + k, tail(padded - k), load(from + k * size, a.x_dtype, lanes));
    }
  }
};

// `chunk` has room for inputs up to a multiple of 64.
template <class Math>
[[gnu::noinline]] void multiply([[maybe_unused]] bool tiles, const typename Math::X* x, int64_t stride, int64_t rows, typename Math::W* w, int64_t count, int32_t* part, bool first) {
#ifdef WITH_AMX
  if constexpr (std::is_same_v<Math, Quads>)
    if (tiles) {
      const int64_t whole = (count + DEPTH - 1) / DEPTH * DEPTH;
      memset(w + count * PANEL, 0, (whole - count) * PANEL);
      for (int64_t i = 0; i < rows; i += TILE) Math::multiply_tiles(x + i * stride, stride, w, whole, part + i * PANEL, first);
      return;
    }
#endif
  for (; rows >= ROWS; x += ROWS * stride, part += ROWS * PANEL, rows -= ROWS)
    Math::template multiply<ROWS>(x, stride, w, count, part, first);
  switch (rows) {
    case 5: return Math::template multiply<5>(x, stride, w, count, part, first);
    case 4: return Math::template multiply<4>(x, stride, w, count, part, first);
    case 3: return Math::template multiply<3>(x, stride, w, count, part, first);
    case 2: return Math::template multiply<2>(x, stride, w, count, part, first);
    case 1: return Math::template multiply<1>(x, stride, w, count, part, first);
  }
}

// `up`: what gates let through, if they are such.
template <int ACTIVATION, class Kind>
void finish(const Kind& kind, const float* total, const float* up, int64_t m, int64_t rows, int64_t panel) {
  const LowBit& a = kind.a;
  for (int64_t n = panel * PANEL, j = 0; j < 4 && n < a.N; j++, n += LANES) {
    const Lanes lanes = tail(a.N - n);
    const auto bias_from = [&](int64_t n) { return load(a.bias + n * element_size(a.bias_dtype), a.bias_dtype, lanes); };
    const Floats bias = a.bias ? bias_from(n) : zeros();
    const Floats bias_up = a.bias && up ? bias_from(a.N + n) : zeros();
    for (int64_t i = 0; i < rows; i++) {
      const int64_t at = i * PANEL + j * LANES;
      Floats y = activate<ACTIVATION>(kind.of_row(m + i, floats_at(total + at), bias));
      if (up) y = mul(y, kind.of_row(m + i, floats_at(up + at), bias_up));
      store(a.out + ((m + i) * a.N + n) * element_size(a.dtype), y, a.dtype, lanes);
    }
  }
}

// The sums over all groups of rows m to m + rows and one panel, BAND rows of digits at most.
template <class Kind, int BITS>
void sum_up(const Kind& kind, const typename Kind::X* x, int64_t stride, int64_t step, int64_t m, int64_t rows, int64_t panel, float* total) {
  const LowBit& a = kind.a;
  constexpr int P = Kind::DIGITS;
  alignas(64) typename Kind::W chunk[Kind::CHUNK * PANEL];
  alignas(64) int32_t part[BAND * PANEL];
  const int64_t blocks = (a.size + depth(BITS) - 1) / depth(BITS);
  constexpr int64_t most = Kind::CHUNK / depth(BITS);
  for (int64_t g = 0; g < a.groups; g++) {
    const int64_t group = panel * a.groups + g;
    const int32_t* terms = a.terms + group * PANEL;
    const uint8_t* codes = a.weight + group * blocks * block_bytes(BITS);
    const typename Kind::X* first = x + m * P * stride + g * step;
    for (int line = 0; line < PANEL; line += LANES) {  // wanted when the group has been multiplied
      _mm_prefetch(a.weight_scale + group * PANEL + line, _MM_HINT_T0);
      _mm_prefetch(terms + line, _MM_HINT_T0);
    }
    if (!kind.template few<BITS>(first, stride, rows, codes, blocks, terms, part))
      for (int64_t b = 0; b < blocks; b += most) {
        const int64_t count = blocks - b < most ? blocks - b : most;
        Kind::template decode<BITS>(codes + b * block_bytes(BITS), count, terms, chunk);
        multiply<typename Kind::Math>(kind.tiles, first + b * depth(BITS), stride, rows * P, chunk, count * depth(BITS), part, b == 0);
      }
    for (int j = 0; j < 4; j++) {
      const Floats scale = floats_at(a.weight_scale + group * PANEL + j * LANES);
      const Ints word = ints_at(terms + j * LANES);
      for (int64_t i = 0; i < rows; i++) {
        float* sum = total + i * PANEL + j * LANES;
        const Floats before = g ? floats_at(sum) : zeros();
        write(sum, fma(kind.of_group(m + i, g, part + i * P * PANEL + j * LANES, word), scale, before));
      }
    }
  }
}

// Rows m to m + rows of one panel. `x` has groups of `step` elements, and rows of `stride`.
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
  constexpr int P = Kind::DIGITS, HEIGHT = BAND / P;
  const int64_t inner = a.size * a.groups, panels = (a.N + PANEL - 1) / PANEL, bands = (a.M + HEIGHT - 1) / HEIGHT;
  const int64_t unit = tiles ? DEPTH : depth(a.bits), padded = (a.size + unit - 1) / unit * unit, rows = a.M * P;
  const int64_t height = !tiles || rows <= TILE ? rows : (rows + TILE - 1) / TILE * TILE;  // rows that are read
  const bool copied = P > 1 || sizeof(X) > 1 || tiles || padded != a.size;  // else codes lie as they are wanted
  // Rows a power of two apart would share few places of the first-level cache: one line more.
  const int64_t stride = copied ? padded * a.groups + 64 / sizeof(X) : a.x_stride, step = copied ? padded : a.size;
  const int64_t row = copied ? stride * sizeof(X) : 0;
  thread_local Memory space;
  char* memory = space.take(height * row + a.M * a.groups * Kind::TOLD * sizeof(int32_t) + 64);
  if (!memory) return 1;
  int32_t* told = (int32_t*)(memory + height * row);
  const Kind kind = {a, told, tiles};
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
  Runs runs(bands * panels, threads);
#pragma omp parallel num_threads(threads) if (a.M * a.N * inner > 32768)
  {
#ifdef WITH_AMX
    const int tall = rows < TILE ? (int)rows : TILE;
    if (tiles) configure({tall, tall, tall, tall, tall, TILE, TILE, 1});
#endif
#pragma omp for schedule(static)
    for (int64_t i = 0; i < a.M * a.groups; i++) {
      const int64_t m = i / a.groups, g = i % a.groups;
      kind.prepare(m, g, own ? own + m * P * stride + g * padded : nullptr, stride, padded, told + i * Kind::TOLD);
    }
    runs.each([&](int64_t task) {
      const int64_t m = task % bands * HEIGHT;
      one(kind, x, stride, step, m, m + HEIGHT < a.M ? HEIGHT : a.M - m, task / bands);
    });
#ifdef WITH_AMX
    if (tiles) _tile_release();
#endif
  }
  return 0;
}

// On AMX there are tiles, but where weights are multiplied as they are read; the results are the same.
template <int P>
bool on_tiles([[maybe_unused]] int64_t M, [[maybe_unused]] int isa) {
#ifdef WITH_AMX
  return isa == ON_AMX && M * P > (P == 1 ? 2 : AS_READ);
#else
  return false;
#endif
}

// Floats are made ready for so many rows at a time, as they need room.
template <class Kind>
int in_slices(LowBit a, int isa, int threads) {
  constexpr int64_t ROOM = 480;  // whole bands
  const int64_t rows = a.M, in = a.size * a.groups * element_size(a.x_dtype), out = a.N * element_size(a.dtype);
  for (int64_t m = 0; m < rows; m += a.M, a.x += a.M * in, a.out += a.M * out) {
    a.M = rows - m < ROOM ? rows - m : ROOM;
    if (run<Kind>(a, !std::is_same_v<Kind, Float> && on_tiles<Kind::DIGITS>(a.M, isa), threads)) return 1;
  }
  return 0;
}

// One panel as floats of a.dtype, saturating: row k of a.out has the weights [N] of input k.
template <int BITS>
void decoded(const LowBit& a, int64_t panel) {
  const int64_t blocks = (a.size + depth(BITS) - 1) / depth(BITS);
  const float most = a.dtype == F16 ? 65504.0f : a.dtype == BF16 ? 0x1.fep127f : FLT_MAX;
  const Floats highest = all(most), lowest = all(-most);
  for (int64_t g = 0; g < a.groups; g++) {
    const int64_t group = panel * a.groups + g;
    const float* scale = a.weight_scale + group * PANEL;
    char* out = a.out + (g * a.size * a.N + panel * PANEL) * element_size(a.dtype);
    Float::each<BITS>(a.weight + group * blocks * block_bytes(BITS), blocks, a.terms + group * PANEL, [&](int64_t k, int j, Floats w) {
      const int64_t left = a.N - panel * PANEL - j * LANES;
      if (k >= a.size || left <= 0) return;
      w = mul(w, floats_at(scale + j * LANES));
      w = higher(lowest, lower(highest, w));  // in this order a NaN stays one
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

int low_bit_integer(const LowBit& a, int isa, int threads) { return run<Digits<1>>(a, on_tiles<1>(a.M, isa), threads); }

// An outlier takes bits from its group, of which a large one cannot spare any.
int low_bit_float(const LowBit& a, int isa, int threads) {
#ifdef __AVX512F__
  constexpr int64_t SMALL = 256;
  return a.x_dtype == F32 || a.size > SMALL ? in_slices<Digits<3>>(a, isa, threads) : in_slices<Digits<2>>(a, isa, threads);
#else
  return in_slices<Float>(a, isa, threads);
#endif
}
