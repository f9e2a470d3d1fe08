// What attention is given: one description for all instruction sets.

#pragma once
#include "simd.h"

struct Linear;
struct Rows;

struct Attention {
  const char *q, *k, *v, *mask;
  char* out;
  int dtype, mask_dtype;                 // of the mask: a Dtype, or 3 for bool; mask may be null
  int64_t B, H, G, L, T, D;              // heads of q, heads of k and v
  int64_t qb, qh, ql, kb, kh, kt, vb, vh, vt, mb, mh, ml, mt;  // strides in elements; the last axis is dense
  int64_t row;                           // numbers in a row of `out`: [B, L, row], of which H times D are written
  int causal;
  float scale;
};

// q [B, H, L, D], k and v [B, G, T, D] with H a multiple of G; returns 0, or 1 if there was no memory. attention.cpp.
int attention(const Attention& a, int isa, int threads);

// The same for fewer than FEW queries, which read keys and values where they lie. attention_few.cpp.
constexpr int FEW = 8;
int attention_of_few(const Attention& a, int threads);

// `products` make q, k and v [B L, H D] of the same codes; of `a` the sizes, the mask, the scale and the dtype are read.
// Returns 0, or 1 if there was no memory. attend.cpp.
int attend(const Linear* products, const Attention& a, const Rows& rows, int isa, int threads);

// Queries `first` to `first + count` of one head, in `attention_bytes` of memory (attention.cpp); on AMX (attention_amx.cpp), and
// on bfloat16 (attention_bf16.cpp), to which all operands are rounded: for those that 8 bits have made.
void attention_band(const Attention& a, char* memory, int64_t b, int64_t h, int64_t first, int64_t count, int isa);
int64_t attention_bytes(const Attention& a, int isa);
void amx_attention(const Attention& a, char* memory, int64_t b, int64_t h, int64_t first, int64_t count);
int64_t amx_attention_bytes(const Attention& a);
void bf16_attention(const Attention& a, char* memory, int64_t b, int64_t h, int64_t first, int64_t count);
int64_t bf16_attention_bytes(const Attention& a);

namespace {

inline Floats mask_of(const Attention& a, const char* row, int64_t t, Lanes lanes) {
  const Floats off = all(-INFINITY);
  if (a.mask_dtype == 3) {
    if (a.mt == 0) return row[0] ? zeros() : off;
    return choose(bytes_set(row + t, lanes), zeros(), off);
  }
  if (a.mt == 0) {
    alignas(64) float one[LANES];
    write(one, load(row, a.mask_dtype, 1));
    return all(one[0]);
  }
  return load(row + t * element_size(a.mask_dtype), a.mask_dtype, lanes);
}

// A row of the mask in units of log 2, to be added before a power of two. What is finite stays so: a row of nothing but the least
// number is a row of equals.
inline void mask_to_powers(const Attention& a, const char* row, float* to) {
  for (int64_t t = 0; t < a.T; t += LANES) {
    const Floats mask = mask_of(a, row, t, tail(a.T - t)), x = mul(mask, all(1.44269504f));
    write(to + t, choose(greater(mask, all(-INFINITY)), higher(x, all(-FLT_MAX)), x));
  }
}

// The row of the mask that belongs to one query, or null.
inline const char* mask_row(const Attention& a, int64_t b, int64_t h, int64_t l) {
  return a.mask ? a.mask + (b * a.mb + h * a.mh + l * a.ml) * (a.mask_dtype == 3 ? 1 : element_size(a.mask_dtype)) : nullptr;
}

}  // namespace
