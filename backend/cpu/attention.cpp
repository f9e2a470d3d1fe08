// Scaled dot-product attention in float32 inside: softmax(q k^T scale + mask) v. With AMX a band of queries
// goes to attention_amx.cpp instead, what 8-bit products have made to attention_bf16.cpp, and a few queries of many keys to
// attention_few.cpp.
//
// A task is one head and a band of queries. Keys are copied as columns and values as float32 rows, once per task; six queries at
// a time meet all their keys, so a row of scores is whole before its softmax: no rescaling, and the same sums on any number of
// threads. The output is laid out [B, L, H, D], so that joining the heads afterwards is a view.

#include "attention.h"
#include "memory.h"
#include "softmax.h"

namespace {

constexpr int QUERIES = 6, KEYS = 64;

struct Space {  // of one thread
  float *keys, *values, *scores, *queries;
};

// Scores of MR queries with KEYS keys at `t`; columns beyond the end are zeros and are overwritten by the caller's softmax.
template <int MR>
void score(const float* q, const float* keys, float* s, int64_t stride, int64_t D) {
  for (int first = 0; first < KEYS / LANES; first += WIDE)
    multiply_floats<MR, WIDE>(q, D, keys + first * LANES, KEYS, D, [&](int i, int j, Floats sum) { write(s + i * stride + (first + j) * LANES, sum); });
}

// MR rows of probabilities times NV * 16 columns of the values.
template <int MR, int NV>
void mix(const float* p, int64_t stride, const float* values, int64_t width, int64_t T, float* out) {
  multiply_floats<MR, NV>(p, stride, values, width, T, [&](int i, int j, Floats sum) { write(out + i * width + j * LANES, sum); });
}

constexpr int narrow(int64_t registers) { return registers < WIDE ? (int)registers : WIDE; }

template <int MR>
void queries(const Attention& a, const Space& space, int64_t b, int64_t h, int64_t l, float* mixed, int64_t width) {
  const int64_t padded = (a.T + KEYS - 1) / KEYS * KEYS;
  const int64_t T = a.causal && l + MR < a.T ? l + MR : a.T;  // the keys that some of these queries see
  for (int64_t t = 0; t < T; t += KEYS) score<MR>(space.queries, space.keys + t * a.D, space.scores + t, padded, a.D);
  for (int i = 0; i < MR; i++) {
    softmax(a, space.scores + i * padded, mask_row(a, b, h, l + i), a.causal && l + i + 1 < a.T ? l + i + 1 : a.T, (T + LANES - 1) / LANES * LANES);
  }
  for (int64_t c = 0; c < width; c += WIDE * LANES) {
    const float* v = space.values + c;
    switch (narrow((width - c) / LANES)) {
      case 1: mix<MR, 1>(space.scores, padded, v, width, T, mixed + c); break;
      case 2: mix<MR, narrow(2)>(space.scores, padded, v, width, T, mixed + c); break;
      case 3: mix<MR, narrow(3)>(space.scores, padded, v, width, T, mixed + c); break;
      default: mix<MR, WIDE>(space.scores, padded, v, width, T, mixed + c);
    }
  }
}

void band(const Attention& a, const Space& space, int64_t b, int64_t h, int64_t first, int64_t count) {
  const int64_t g = h / (a.H / a.G), width = (a.D + LANES - 1) / LANES * LANES;
  const int64_t seen = a.causal && first + count < a.T ? first + count : a.T;
  const int size = element_size(a.dtype);
  const char *k = a.k + (b * a.kb + g * a.kh) * size, *v = a.v + (b * a.vb + g * a.vh) * size;
  for (int64_t t = 0; t < (seen + KEYS - 1) / KEYS * KEYS; t++) {  // keys as columns: [T / KEYS][D][KEYS]
    float* column = space.keys + t / KEYS * KEYS * a.D + t % KEYS;
    for (int64_t c = 0; c < a.D; c += LANES) {
      alignas(64) float part[LANES];
      write(part, t < seen ? load(k + (t * a.kt + c) * size, a.dtype, tail(a.D - c)) : zeros());
      for (int64_t i = 0; i < LANES && c + i < a.D; i++) column[(c + i) * KEYS] = part[i];
    }
  }
  for (int64_t t = 0; t < seen; t++)
    for (int64_t c = 0; c < width; c += LANES)
      write(space.values + t * width + c, load(v + (t * a.vt + c) * size, a.dtype, tail(a.D - c)));

  float* mixed = space.queries + QUERIES * width;
  for (int64_t l = first; l < first + count; l += QUERIES) {
    const int64_t left = first + count - l, rows = left < QUERIES ? left : QUERIES;
    for (int64_t i = 0; i < rows; i++)
      for (int64_t c = 0; c < a.D; c += LANES)
        write(space.queries + i * a.D + c, tail(a.D - c), load(a.q + (b * a.qb + h * a.qh + (l + i) * a.ql + c) * size, a.dtype, tail(a.D - c)));
    switch (rows) {
      case 1: queries<1>(a, space, b, h, l, mixed, width); break;
      case 2: queries<2>(a, space, b, h, l, mixed, width); break;
      case 3: queries<3>(a, space, b, h, l, mixed, width); break;
      case 4: queries<4>(a, space, b, h, l, mixed, width); break;
      case 5: queries<5>(a, space, b, h, l, mixed, width); break;
      default: queries<6>(a, space, b, h, l, mixed, width);
    }
    for (int64_t i = 0; i < rows; i++)
      for (int64_t c = 0; c < a.D; c += LANES)
        store(a.out + ((b * a.L + l + i) * a.row + h * a.D + c) * size, floats_at(mixed + i * width + c), a.dtype, tail(a.D - c));
  }
}

}  // namespace

int64_t attention_bytes(const Attention& a, int isa) {
#ifdef WITH_BF16
  if (isa == ON_BF16) return bf16_attention_bytes(a);
#endif
#ifdef WITH_AMX
  if (isa == ON_AMX) return amx_attention_bytes(a);
#endif
  const int64_t padded = (a.T + KEYS - 1) / KEYS * KEYS, width = (a.D + LANES - 1) / LANES * LANES;
  return (padded * a.D + padded * width + QUERIES * padded + 2 * QUERIES * width) * sizeof(float);
}

void attention_band(const Attention& a, char* memory, int64_t b, int64_t h, int64_t first, int64_t count, int isa) {
#ifdef WITH_BF16
  if (isa == ON_BF16) return bf16_attention(a, memory, b, h, first, count);
#endif
#ifdef WITH_AMX
  if (isa == ON_AMX) return amx_attention(a, memory, b, h, first, count);
#endif
  const int64_t padded = (a.T + KEYS - 1) / KEYS * KEYS, width = (a.D + LANES - 1) / LANES * LANES;
  float* floats = (float*)memory;
  const Space space = {floats, floats + padded * a.D, floats + padded * (a.D + width), floats + padded * (a.D + width + QUERIES)};
  band(a, space, b, h, first, count);
}

int attention(const Attention& a, int isa, int threads) {
  if (isa == ON_BF16) isa = ON_VNNI;  // what comes from elsewhere is not to be rounded
  if (a.L < FEW && a.T > a.L) return attention_of_few(a, threads);
  const int64_t step = isa == ON_AMX ? 32 : QUERIES, bytes = attention_bytes(a, isa);
  int64_t bands = 1;  // enough tasks for the threads, but copying keys and values must stay the smaller part
  while (a.B * a.H * bands < 2 * threads && a.L / (2 * bands) >= 48) bands *= 2;
  const int64_t height = ((a.L + bands - 1) / bands + step - 1) / step * step;
  const int64_t chunk = a.B >= 4 * threads ? a.H * bands : 1;  // neighbouring heads to one thread: they share cache lines and pages
  int failed = 0;
#pragma omp parallel num_threads(threads) if (a.B * a.H * a.L * a.T * a.D > 32768) reduction(| : failed)
  {
    thread_local Memory space;
    char* memory = space.take(bytes);
    failed = memory == nullptr;
#pragma omp for schedule(dynamic, chunk)
    for (int64_t task = 0; task < a.B * a.H * bands; task++) {
      const int64_t first = task % bands * height, head = task / bands, count = a.L - first < height ? a.L - first : height;
      if (memory && count > 0) attention_band(a, memory, head / a.H, head % a.H, first, count, isa);
    }
  }
  return failed;
}
