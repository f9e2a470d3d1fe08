// Sixteen numbers of 32 bits in two registers: what avx512.h offers, for AVX2, FMA and F16C, with the same results but for the order in
// which `sums_of_rows` sums and the payload of a NaN. Products of bytes are not what they are there, and have functions of their own.

#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

namespace {

struct Floats { __m256 a, b; };
struct Ints { __m256i a, b; };
using Lanes = uint16_t;
struct Where { __m256 a, b; };  // all bits of a number, or none

constexpr int WIDE = 1;  // there are sixteen registers, of half a Floats each

inline Floats all(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
inline Floats zeros() { return all(0); }
inline Ints all_ints(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
inline Ints zero_ints() { return all_ints(0); }
inline Ints all_bytes(char v) { return {_mm256_set1_epi8(v), _mm256_set1_epi8(v)}; }

// Lanes as Where, in eight of the sixteen.
inline __m256i eight(int lanes) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(lanes), bit), bit);
}

inline Floats floats_at(const void* p) { return {_mm256_loadu_ps((const float*)p), _mm256_loadu_ps((const float*)p + 8)}; }
inline Ints ints_at(const void* p) { return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)}; }
inline Floats floats_at(const void* p, Lanes lanes) {
  if (lanes == 0xffff) return floats_at(p);
  const float* x = (const float*)p;
  return {_mm256_maskload_ps(x, eight(lanes)), _mm256_maskload_ps(x + 8, eight(lanes >> 8))};
}
inline Ints ints_at(const void* p, Lanes lanes) {
  const int32_t* x = (const int32_t*)p;
  return {_mm256_maskload_epi32(x, eight(lanes)), _mm256_maskload_epi32(x + 8, eight(lanes >> 8))};
}
inline void write(void* p, Floats v) { _mm256_storeu_ps((float*)p, v.a), _mm256_storeu_ps((float*)p + 8, v.b); }
inline void write(void* p, Ints v) { _mm256_storeu_si256((__m256i*)p, v.a), _mm256_storeu_si256((__m256i*)p + 1, v.b); }
inline void write(void* p, Lanes lanes, Floats v) {
  if (lanes == 0xffff) return write(p, v);
  _mm256_maskstore_ps((float*)p, eight(lanes), v.a), _mm256_maskstore_ps((float*)p + 8, eight(lanes >> 8), v.b);
}

#define OF_BOTH(type, name, instruction) \
  inline type name(type x, type y) { return {instruction(x.a, y.a), instruction(x.b, y.b)}; }
OF_BOTH(Floats, add, _mm256_add_ps)
OF_BOTH(Floats, sub, _mm256_sub_ps)
OF_BOTH(Floats, mul, _mm256_mul_ps)
OF_BOTH(Floats, divide, _mm256_div_ps)
OF_BOTH(Floats, lower, _mm256_min_ps)
OF_BOTH(Floats, higher, _mm256_max_ps)
OF_BOTH(Ints, add, _mm256_add_epi32)
OF_BOTH(Ints, sub, _mm256_sub_epi32)
OF_BOTH(Ints, mul, _mm256_mullo_epi32)
OF_BOTH(Ints, lower, _mm256_min_epi32)
OF_BOTH(Ints, higher, _mm256_max_epi32)
OF_BOTH(Ints, sub_bytes, _mm256_sub_epi8)
OF_BOTH(Ints, bits_and, _mm256_and_si256)
OF_BOTH(Ints, bits_or, _mm256_or_si256)
OF_BOTH(Ints, bits_xor, _mm256_xor_si256)
#undef OF_BOTH

inline Floats fma(Floats x, Floats y, Floats z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline Floats fnma(Floats x, Floats y, Floats z) { return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)}; }
inline Floats magnitude(Floats v) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, v.a), _mm256_andnot_ps(sign, v.b)};
}
inline Floats whole(Floats v) {
  constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(v.a, NEAREST), _mm256_round_ps(v.b, NEAREST)};
}

inline Ints shl(Ints v, int by) { return {_mm256_slli_epi32(v.a, by), _mm256_slli_epi32(v.b, by)}; }
inline Ints shr(Ints v, int by) { return {_mm256_srli_epi32(v.a, by), _mm256_srli_epi32(v.b, by)}; }
inline Ints sar(Ints v, int by) { return {_mm256_srai_epi32(v.a, by), _mm256_srai_epi32(v.b, by)}; }
inline Ints shl_shorts(Ints v, int by) { return {_mm256_slli_epi16(v.a, by), _mm256_slli_epi16(v.b, by)}; }
inline Ints shr_shorts(Ints v, int by) { return {_mm256_srli_epi16(v.a, by), _mm256_srli_epi16(v.b, by)}; }

inline Floats to_floats(Ints v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
inline Ints nearest(Floats v) { return {_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b)}; }
inline Ints truncated(Floats v) { return {_mm256_cvttps_epi32(v.a), _mm256_cvttps_epi32(v.b)}; }
inline Floats as_floats(Ints v) { return {_mm256_castsi256_ps(v.a), _mm256_castsi256_ps(v.b)}; }
inline Ints as_ints(Floats v) { return {_mm256_castps_si256(v.a), _mm256_castps_si256(v.b)}; }

// v 2^n in two steps, for 2^n alone may be no float; n is a whole number within the exponents of floats.
inline Floats times_power(Floats v, Floats n) {
  const auto power = [](Ints n) { return as_floats(shl(add(n, all_ints(127)), 23)); };
  const Ints wanted = nearest(n), half = sar(wanted, 1);
  return mul(mul(v, power(half)), power(sub(wanted, half)));
}

// In the order of the reductions of AVX512.
template <class Of>
inline float reduced(__m256 v, Of of) {
  const __m128 four = of(_mm256_extractf128_ps(v, 1), _mm256_castps256_ps128(v));
  const __m128 two = of(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(of(two, _mm_movehdup_ps(two)));
}
inline float sum_of(Floats v) { return reduced(_mm256_add_ps(v.b, v.a), [](__m128 x, __m128 y) { return _mm_add_ps(x, y); }); }
inline float lowest_of(Floats v) { return reduced(_mm256_min_ps(v.b, v.a), [](__m128 x, __m128 y) { return _mm_min_ps(x, y); }); }
inline float highest_of(Floats v) { return reduced(_mm256_max_ps(v.b, v.a), [](__m128 x, __m128 y) { return _mm_max_ps(x, y); }); }
inline int32_t highest_of(Ints v) {
  const __m256i eight = _mm256_max_epi32(v.a, v.b);
  const __m128i four = _mm_max_epi32(_mm256_extracti128_si256(eight, 1), _mm256_castsi256_si128(eight));
  const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x0e));
  return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0x01)));
}

inline Where equal(Floats x, Floats y) { return {_mm256_cmp_ps(x.a, y.a, _CMP_EQ_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_EQ_OQ)}; }
inline Where greater(Floats x, Floats y) { return {_mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ)}; }
inline Where nan_in(Floats v) { return {_mm256_cmp_ps(v.a, v.a, _CMP_UNORD_Q), _mm256_cmp_ps(v.b, v.b, _CMP_UNORD_Q)}; }
inline Where where(Lanes lanes) { return {_mm256_castsi256_ps(eight(lanes)), _mm256_castsi256_ps(eight(lanes >> 8))}; }
inline Floats choose(Where where, Floats x, Floats otherwise) {
  return {_mm256_blendv_ps(otherwise.a, x.a, where.a), _mm256_blendv_ps(otherwise.b, x.b, where.b)};
}
inline Floats choose(Lanes lanes, Floats x, Floats otherwise) { return lanes == 0xffff ? x : choose(where(lanes), x, otherwise); }
inline Ints choose(Where where, Ints x, Ints otherwise) { return as_ints(choose(where, as_floats(x), as_floats(otherwise))); }
inline Floats only(Lanes lanes, Floats v) { return choose(lanes, v, zeros()); }
inline Ints only(Lanes lanes, Ints v) { return as_ints(only(lanes, as_floats(v))); }

// As many bytes as `lanes` has numbers of `size` bytes, through memory unless all are wanted.
inline __m256i half_at(const void* p, Lanes lanes, int size) {
  alignas(32) char bytes[32] = {0};
  memcpy(bytes, p, lanes == 0xffff ? 16 * size : __builtin_popcount(lanes) * size);
  return _mm256_load_si256((const __m256i*)bytes);
}
inline void write_half(void* p, Lanes lanes, __m256i v, int size) {
  alignas(32) char bytes[32];
  _mm256_store_si256((__m256i*)bytes, v);
  memcpy(p, bytes, lanes == 0xffff ? 16 * size : __builtin_popcount(lanes) * size);
}

inline Floats from_f16(const void* p, Lanes lanes) {
  const __m256i half = half_at(p, lanes, 2);
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(half)), _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1))};
}
inline void write_f16(void* p, Lanes lanes, Floats v) {
  constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  write_half(p, lanes, _mm256_set_m128i(_mm256_cvtps_ph(v.b, NEAREST), _mm256_cvtps_ph(v.a, NEAREST)), 2);
}
inline Ints shorts_at(const void* p, Lanes lanes) {
  const __m256i half = half_at(p, lanes, 2);
  return {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(half)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(half, 1))};
}
inline __m256i shorts_of(Ints v) {  // of numbers below 2^16
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(v.a, v.b), 0xd8);
}
inline void write_shorts(void* p, Lanes lanes, Ints v) { write_half(p, lanes, shorts_of(v), 2); }
inline void write_bytes(void* p, Lanes lanes, Ints v) {
  const __m256i half = shorts_of(bits_and(v, all_ints(0xff)));
  write_half(p, lanes, _mm256_permute4x64_epi64(_mm256_packus_epi16(half, half), 0xd8), 1);
}

inline Where bytes_set(const void* p, Lanes lanes) {
  const __m128i bytes = _mm256_castsi256_si128(half_at(p, lanes, 1)), none = _mm_setzero_si128();
  const auto set = [&](__m128i eight) { return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_cvtepu8_epi32(eight), _mm256_setzero_si256())); };
  return {set(bytes), set(_mm_unpackhi_epi64(bytes, none))};
}

inline void write_codes(uint8_t* p, Ints a, Ints b, Ints c, Ints d, int zero, int least, int most) {
  const __m256i shift = _mm256_set1_epi16((int16_t)zero), low = _mm256_set1_epi16((int16_t)least), high = _mm256_set1_epi16((int16_t)most);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing works in lanes of 128 bits
  const auto limit = [&](__m256i q) { return _mm256_min_epi16(_mm256_max_epi16(_mm256_adds_epi16(q, shift), low), high); };
  const auto bytes = [&](Ints x, Ints y) {
    const __m256i front = limit(_mm256_packs_epi32(x.a, x.b)), back = limit(_mm256_packs_epi32(y.a, y.b));
    return _mm256_permutevar8x32_epi32(_mm256_packus_epi16(front, back), order);
  };
  _mm256_storeu_si256((__m256i*)p, bytes(a, b)), _mm256_storeu_si256((__m256i*)p + 1, bytes(c, d));
}

inline Floats look_up(Ints index, const float* table) {
  const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
  const auto eight = [&](__m256i i) {  // the highest bit of the index, as a sign, chooses between the two halves
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, i), _mm256_permutevar8x32_ps(high, i), _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
  };
  return {eight(index.a), eight(index.b)};
}

struct FiveBits {
  Floats floats(Ints v) const { return to_floats(sar(shl(v, 27), 27)); }
};

inline Ints top_bytes(Ints v) {
  const __m256i last = _mm256_setr_epi32(0x03030303, 0x07070707, 0x0b0b0b0b, 0x0f0f0f0f, 0x03030303, 0x07070707, 0x0b0b0b0b, 0x0f0f0f0f);
  return {_mm256_shuffle_epi8(v.a, last), _mm256_shuffle_epi8(v.b, last)};
}

inline Ints high_and_low(Ints high, Ints low) { return {_mm256_blend_epi16(high.a, low.a, 0x55), _mm256_blend_epi16(high.b, low.b, 0x55)}; }

inline Ints add_pairs(Ints sum, Ints x, Ints y) { return add(sum, {_mm256_madd_epi16(x.a, y.a), _mm256_madd_epi16(x.b, y.b)}); }

// Sixteen bytes, signed or not, as 16 bits each, to aligned memory.
inline void widen(int16_t* to, __m128i s8) { _mm256_store_si256((__m256i*)to, _mm256_cvtepi8_epi16(s8)); }
inline void widen(int16_t* to, const uint8_t* u8) {
  _mm256_store_si256((__m256i*)to, _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)u8)));
}

// sum += the products of pairs of 16 bits. One after the other: GCC 12 would put all products of a loop before all sums, and has no
// registers for them.
inline void add_products(__m256i& sum, __m256i x, __m256i y) {
  __m256i product;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(x), "x"(y));
}

// Sixteen sums of pairs of neighbours.
inline Ints sums_of_pairs(const __m256i (&v)[4]) {
  const auto pairs = [](__m256i x, __m256i y) { return _mm256_permute4x64_epi64(_mm256_hadd_epi32(x, y), 0xd8); };
  return {pairs(v[0], v[1]), pairs(v[2], v[3])};
}

// MR rows of u8, one or two, times sixteen columns of s8, quads of which are `step` bytes apart; K is a multiple of 4. use(row, sums).
// Exact: four products are of 16 bits, and are summed two and two in 32.
template <int MR, class Use>
inline void multiply_quads_of(const uint8_t* x, int64_t stride, const int8_t* w, int64_t step, int64_t K, Use use) {
  __m256i sum[MR][4];
#pragma GCC unroll 2
  for (int i = 0; i < MR; i++) sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = _mm256_setzero_si256();
  for (int64_t k = 0; k < K; k += 4, w += step) {
    __m256i q[MR];
#pragma GCC unroll 2
    for (int i = 0; i < MR; i++) {
      int32_t four;
      memcpy(&four, x + i * stride + k, 4);
      q[i] = _mm256_broadcastq_epi64(_mm_cvtepu8_epi16(_mm_cvtsi32_si128(four)));
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const __m256i columns = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(w + 16 * j)));
#pragma GCC unroll 2
      for (int i = 0; i < MR; i++) add_products(sum[i][j], columns, q[i]);
    }
  }
#pragma GCC unroll 2
  for (int i = 0; i < MR; i++) use(i, sums_of_pairs(sum[i]));
}

// The same of `rows` rows, two at a time: their sums take eight of the sixteen registers.
template <class Use>
inline void multiply_quads(const uint8_t* x, int64_t stride, int64_t rows, const int8_t* w, int64_t step, int64_t K, Use use) {
  int64_t i = 0;
  for (; i + 2 <= rows; i += 2) multiply_quads_of<2>(x + i * stride, stride, w, step, K, [&](int j, Ints sum) { use(i + j, sum); });
  if (i < rows) multiply_quads_of<1>(x + i * stride, stride, w, step, K, [&](int, Ints sum) { use(i, sum); });
}

inline Floats sums_of_rows(const float* rows) {
  const auto eight = [](const float* rows) {
    __m256 v[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) v[i] = _mm256_add_ps(_mm256_loadu_ps(rows + i * 16), _mm256_loadu_ps(rows + i * 16 + 8));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) v[i] = _mm256_hadd_ps(v[2 * i], v[2 * i + 1]);
    const __m256 x = _mm256_hadd_ps(v[0], v[1]), y = _mm256_hadd_ps(v[2], v[3]);
    return _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
  };
  return {eight(rows), eight(rows + 8 * 16)};
}

}  // namespace
