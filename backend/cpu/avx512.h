// Sixteen numbers of 32 bits in one register. AVX512F, BW, VL, DQ and VNNI.

#pragma once
#include <immintrin.h>
#include <stdint.h>

namespace {

using Floats = __m512;
using Ints = __m512i;
using Lanes = __mmask16;  // the first so many of sixteen
using Where = __mmask16;  // any of sixteen

constexpr int WIDE = 4;  // registers of outputs, or of columns, that a loop over products keeps for each of its rows

inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats all(float v) { return _mm512_set1_ps(v); }
inline Ints zero_ints() { return _mm512_setzero_si512(); }
inline Ints all_ints(int32_t v) { return _mm512_set1_epi32(v); }
inline Ints all_bytes(char v) { return _mm512_set1_epi8(v); }

inline Floats floats_at(const void* p) { return _mm512_loadu_ps(p); }
inline Floats floats_at(const void* p, Lanes lanes) { return _mm512_maskz_loadu_ps(lanes, p); }
inline Ints ints_at(const void* p) { return _mm512_loadu_si512(p); }
inline Ints ints_at(const void* p, Lanes lanes) { return _mm512_maskz_loadu_epi32(lanes, p); }
inline void write(void* p, Floats v) { _mm512_storeu_ps(p, v); }
inline void write(void* p, Lanes lanes, Floats v) { _mm512_mask_storeu_ps(p, lanes, v); }
inline void write(void* p, Ints v) { _mm512_storeu_si512(p, v); }

inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
inline Floats lower(Floats a, Floats b) { return _mm512_min_ps(a, b); }                 // b where one is NaN, as in `higher`
inline Floats higher(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats magnitude(Floats v) { return _mm512_abs_ps(v); }
inline Floats whole(Floats v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats times_power(Floats v, Floats n) { return _mm512_scalef_ps(v, n); }  // v 2^n
inline float sum_of(Floats v) { return _mm512_reduce_add_ps(v); }
inline float lowest_of(Floats v) { return _mm512_reduce_min_ps(v); }
inline float highest_of(Floats v) { return _mm512_reduce_max_ps(v); }
inline int32_t highest_of(Ints v) { return _mm512_reduce_max_epi32(v); }

inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints sub(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
inline Ints mul(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
inline Ints lower(Ints a, Ints b) { return _mm512_min_epi32(a, b); }
inline Ints higher(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
inline Ints sub_bytes(Ints a, Ints b) { return _mm512_sub_epi8(a, b); }
inline Ints bits_and(Ints a, Ints b) { return _mm512_and_si512(a, b); }
inline Ints bits_or(Ints a, Ints b) { return _mm512_or_si512(a, b); }
inline Ints bits_xor(Ints a, Ints b) { return _mm512_xor_si512(a, b); }
inline Ints shl(Ints v, int by) { return _mm512_slli_epi32(v, by); }
inline Ints shr(Ints v, int by) { return _mm512_srli_epi32(v, by); }
inline Ints sar(Ints v, int by) { return _mm512_srai_epi32(v, by); }
inline Ints shl_shorts(Ints v, int by) { return _mm512_slli_epi16(v, by); }
inline Ints shr_shorts(Ints v, int by) { return _mm512_srli_epi16(v, by); }

inline Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
inline Ints nearest(Floats v) { return _mm512_cvtps_epi32(v); }  // halves to even; the least integer for a NaN
inline Ints truncated(Floats v) { return _mm512_cvttps_epi32(v); }
inline Floats as_floats(Ints v) { return _mm512_castsi512_ps(v); }
inline Ints as_ints(Floats v) { return _mm512_castps_si512(v); }

inline Where equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline Where greater(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline Where nan_in(Floats v) { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q); }
inline Floats choose(Where where, Floats a, Floats otherwise) { return _mm512_mask_mov_ps(otherwise, where, a); }
inline Ints choose(Where where, Ints a, Ints otherwise) { return _mm512_mask_mov_epi32(otherwise, where, a); }
inline Floats only(Lanes lanes, Floats v) { return _mm512_maskz_mov_ps(lanes, v); }  // zeros elsewhere
inline Ints only(Lanes lanes, Ints v) { return _mm512_maskz_mov_epi32(lanes, v); }

inline Floats from_f16(const void* p, Lanes lanes) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, p)); }
inline void write_f16(void* p, Lanes lanes, Floats v) {
  _mm256_mask_storeu_epi16(p, lanes, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline Ints shorts_at(const void* p, Lanes lanes) { return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p)); }  // unsigned
inline void write_shorts(void* p, Lanes lanes, Ints v) { _mm256_mask_storeu_epi16(p, lanes, _mm512_cvtepi32_epi16(v)); }
inline void write_bytes(void* p, Lanes lanes, Ints v) { _mm_mask_storeu_epi8(p, lanes, _mm512_cvtepi32_epi8(v)); }

// Where the bytes at p are not zero.
inline Where bytes_set(const void* p, Lanes lanes) {
  const __m128i bytes = _mm_maskz_loadu_epi8(lanes, p);
  return _mm_test_epi8_mask(bytes, bytes);
}

// 64 integers plus `zero`, not below `least` and not above `most`, as bytes.
inline void write_codes(uint8_t* p, Ints a, Ints b, Ints c, Ints d, int zero, int least, int most) {
  const __m512i shift = _mm512_set1_epi16((int16_t)zero), low = _mm512_set1_epi16((int16_t)least), high = _mm512_set1_epi16((int16_t)most);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);  // packing works in lanes of 128 bits
  const auto limit = [&](__m512i q) { return _mm512_min_epi16(_mm512_max_epi16(_mm512_adds_epi16(q, shift), low), high); };
  const __m512i front = limit(_mm512_packs_epi32(a, b)), back = limit(_mm512_packs_epi32(c, d));
  _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(front, back)));
}

inline Floats look_up(Ints index, const float* table) { return _mm512_permutexvar_ps(index, _mm512_loadu_ps(table)); }  // of sixteen

// The low five bits of each number, signed, as a float.
struct FiveBits {
  const __m512 low = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512 high = _mm512_sub_ps(low, _mm512_set1_ps(16));
  Floats floats(Ints v) const { return _mm512_permutex2var_ps(low, v, high); }
};

// The highest byte of each number, in all four.
inline Ints top_bytes(Ints v) {
  return _mm512_shuffle_epi8(v, _mm512_set4_epi32(0x0f0f0f0f, 0x0b0b0b0b, 0x07070707, 0x03030303));
}

// The upper sixteen bits of one, the lower ones of the other.
inline Ints high_and_low(Ints high, Ints low) { return _mm512_mask_mov_epi16(high, 0x55555555, low); }

// sum + the products of two pairs of 16 bits.
inline Ints add_pairs(Ints sum, Ints a, Ints b) { return _mm512_dpwssd_epi32(sum, a, b); }

// sum += four products of u8 and s8. The intrinsic, without the copies that GCC 12 makes of every sum around it.
inline void add_quads(Ints& sum, Ints u8, Ints s8) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u8), "v"(s8)); }

// The sums of sixteen rows of sixteen.
inline Floats sums_of_rows(const float* rows) {
  __m512 v[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) v[i] = _mm512_loadu_ps(rows + i * 16);
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) v[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m512d x = _mm512_castps_pd(v[2 * i]), y = _mm512_castps_pd(v[2 * i + 1]);
    v[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x88), _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(v[0], v[1], 0x88), _mm512_shuffle_f32x4(v[0], v[1], 0xdd));
}

}  // namespace
