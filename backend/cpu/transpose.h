// Sixteen registers of sixteen numbers, turned.

#pragma once
#include <immintrin.h>
#include <stdint.h>

namespace {

// 16 x 16 numbers of 32 bits; the rows of the result are `stride` numbers apart.
inline void transpose(const __m512i* from, uint32_t* to, int64_t stride) {
  __m512i r[16], s[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) s[i] = _mm512_unpacklo_epi32(from[i], from[i + 1]), s[i + 1] = _mm512_unpackhi_epi32(from[i], from[i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
    r[i] = _mm512_unpacklo_epi64(s[i], s[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(s[i], s[i + 2]),
    r[i + 2] = _mm512_unpacklo_epi64(s[i + 1], s[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(s[i + 1], s[i + 3]);
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {  // r[j], r[j + 4], r[j + 8], r[j + 12]: four lanes of four columns
    __m512i a = _mm512_shuffle_i32x4(r[j], r[j + 4], 0x88), b = _mm512_shuffle_i32x4(r[j], r[j + 4], 0xdd);
    __m512i c = _mm512_shuffle_i32x4(r[j + 8], r[j + 12], 0x88), d = _mm512_shuffle_i32x4(r[j + 8], r[j + 12], 0xdd);
    _mm512_store_si512(to + stride * j, _mm512_shuffle_i32x4(a, c, 0x88));
    _mm512_store_si512(to + stride * (j + 8), _mm512_shuffle_i32x4(a, c, 0xdd));
    _mm512_store_si512(to + stride * (j + 4), _mm512_shuffle_i32x4(b, d, 0x88));
    _mm512_store_si512(to + stride * (j + 12), _mm512_shuffle_i32x4(b, d, 0xdd));
  }
}

}  // namespace
