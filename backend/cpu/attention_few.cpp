// Attention of a few queries to many keys, as a model decodes: softmax(q k^T scale + mask) v in float32.
//
// Keys and values are read once, where they lie: the queries of all heads that share them meet them together. All scores are
// written before the first softmax, and a column of the values is summed from its first to its last row, so the number of threads
// changes nothing. Keys behind the last that a boolean mask lets anyone see, such as the unused rest of a static cache, are not read.

#include "attention.h"
#include "memory.h"
#include "softmax.h"

namespace {

constexpr int KEYS = 64, COLUMNS = 32;  // of a task
constexpr int MOST_SCORED = 4, MOST_MIXED = 6;  // queries at a time in registers

struct Few {  // what all threads share
  const Attention& a;
  float* scores;    // [B, H, L, padded]
  int64_t* seen;    // [B]: the keys that are read
  int64_t padded, rows, width;  // rows: queries of the heads that share their keys; width: of a query as floats
  int64_t most = 0;             // keys that are read of any sequence
};

// MR queries with the keys from `first` to `last`; what is written behind `last`, up to a whole vector, is nobody's.
template <int DTYPE, int MR>
void score(const Few& f, const float* queries, const char* keys, int64_t first, int64_t last, float* const* rows) {
  const int64_t size = element_size(DTYPE);
  alignas(64) float part[MR][LANES * LANES];
  for (int64_t t = first; t < last; t += LANES) {
    for (int64_t j = 0; j < LANES && t + j < last; j++) {
      const char* key = keys + (t + j) * f.a.kt * size;
      Floats sum[MR];
#pragma GCC unroll 8
      for (int i = 0; i < MR; i++) sum[i] = zeros();
      for (int64_t c = 0; c < f.a.D; c += LANES) {
        const Floats k = load(key + c * size, DTYPE, tail(f.a.D - c));
#pragma GCC unroll 8
        for (int i = 0; i < MR; i++) sum[i] = fma(floats_at(queries + i * f.width + c), k, sum[i]);
      }
#pragma GCC unroll 8
      for (int i = 0; i < MR; i++) write(part[i] + j * LANES, sum[i]);
    }
    for (int64_t j = last - t; j < LANES; j++)
      for (int i = 0; i < MR; i++) write(part[i] + j * LANES, zeros());
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) write(rows[i] + t, sums_of_rows(part[i]));
  }
}

// MR rows of probabilities times up to COLUMNS columns of the values, from column c.
template <int DTYPE, int MR>
void mix(const Few& f, float* const* rows, const char* values, int64_t seen, int64_t c, char* const* out) {
  const int64_t size = element_size(DTYPE);
  const Lanes low = tail(f.a.D - c), high = f.a.D - c > LANES ? tail(f.a.D - c - LANES) : 0;
  Floats sum[MR][2];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++) sum[i][0] = sum[i][1] = zeros();
  values += c * size;
  for (int64_t t = 0; t < seen; t++, values += f.a.vt * size) {
    const Floats v0 = load(values, DTYPE, low), v1 = load(values + LANES * size, DTYPE, high);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      const Floats p = all(rows[i][t]);
      sum[i][0] = fma(p, v0, sum[i][0]), sum[i][1] = fma(p, v1, sum[i][1]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++) {
    store(out[i] + c * size, sum[i][0], DTYPE, low);
    if (high) store(out[i] + (c + LANES) * size, sum[i][1], DTYPE, high);
  }
}

inline float* scores_of(const Few& f, int64_t b, int64_t g, int64_t row) {  // of a query of group g
  return f.scores + ((b * f.a.H + g * (f.a.H / f.a.G)) * f.a.L + row) * f.padded;
}

template <int DTYPE>
void score_task(const Few& f, int64_t b, int64_t g, int64_t first, float* queries) {
  const Attention& a = f.a;
  const int64_t size = element_size(DTYPE), last = first + KEYS < f.seen[b] ? first + KEYS : f.seen[b];
  const char* keys = a.k + (b * a.kb + g * a.kh) * size;
  for (int64_t row = 0; row < f.rows; row += MOST_SCORED) {
    const int count = f.rows - row < MOST_SCORED ? (int)(f.rows - row) : MOST_SCORED;
    float* rows[MOST_SCORED];
    for (int i = 0; i < count; i++) {
      const int64_t h = g * (a.H / a.G) + (row + i) / a.L, l = (row + i) % a.L;
      const char* q = a.q + (b * a.qb + h * a.qh + l * a.ql) * size;
      for (int64_t c = 0; c < a.D; c += LANES) write(queries + i * f.width + c, load(q + c * size, DTYPE, tail(a.D - c)));
      rows[i] = scores_of(f, b, g, row + i);
    }
    switch (count) {
      case 1: score<DTYPE, 1>(f, queries, keys, first, last, rows); break;
      case 2: score<DTYPE, 2>(f, queries, keys, first, last, rows); break;
      case 3: score<DTYPE, 3>(f, queries, keys, first, last, rows); break;
      default: score<DTYPE, 4>(f, queries, keys, first, last, rows);
    }
  }
}

template <int DTYPE>
void mix_task(const Few& f, int64_t b, int64_t g, int64_t c) {
  const Attention& a = f.a;
  const int64_t size = element_size(DTYPE);
  const char* values = a.v + (b * a.vb + g * a.vh) * size;
  for (int64_t row = 0; row < f.rows; row += MOST_MIXED) {
    const int count = f.rows - row < MOST_MIXED ? (int)(f.rows - row) : MOST_MIXED;
    float* rows[MOST_MIXED];
    char* out[MOST_MIXED];
    for (int i = 0; i < count; i++) {
      const int64_t h = g * (a.H / a.G) + (row + i) / a.L, l = (row + i) % a.L;
      rows[i] = scores_of(f, b, g, row + i);
      out[i] = a.out + ((b * a.L + l) * a.row + h * a.D) * size;
    }
    switch (count) {
      case 1: mix<DTYPE, 1>(f, rows, values, f.seen[b], c, out); break;
      case 2: mix<DTYPE, 2>(f, rows, values, f.seen[b], c, out); break;
      case 3: mix<DTYPE, 3>(f, rows, values, f.seen[b], c, out); break;
      case 4: mix<DTYPE, 4>(f, rows, values, f.seen[b], c, out); break;
      case 5: mix<DTYPE, 5>(f, rows, values, f.seen[b], c, out); break;
      default: mix<DTYPE, 6>(f, rows, values, f.seen[b], c, out);
    }
  }
}

// One more than the last key that a query of sequence b may see.
int64_t keys_seen(const Attention& a, int64_t b) {
  int64_t seen = a.causal && a.L < a.T ? a.L : a.T;
  if (!a.mask || a.mask_dtype != 3 || a.mt != 1) return seen;
  int64_t last = 0;
  for (int64_t h = 0; h < (a.mh ? a.H : 1); h++)
    for (int64_t l = 0; l < (a.ml ? a.L : 1); l++) {
      const char* row = mask_row(a, b, h, l);
      int64_t t = seen;
      while (t > last && !row[t - 1]) t--;
      if (t > last) last = t;
    }
  return last;
}

template <int DTYPE>
int run(const Few& f, int threads) {
  const Attention& a = f.a;
  const int64_t blocks = (f.most + KEYS - 1) / KEYS, parts = (a.D + COLUMNS - 1) / COLUMNS;
  int failed = 0;
#pragma omp parallel num_threads(threads) if (a.B * a.H * a.L * f.most * a.D > 32768) reduction(| : failed)
  {
    thread_local Memory space;
    float* queries = (float*)space.take(MOST_SCORED * f.width * sizeof(float));
    failed = queries == nullptr;
#pragma omp for schedule(static, 1)
    for (int64_t task = 0; task < a.B * a.G * blocks; task++) {
      const int64_t head = task / blocks, first = task % blocks * KEYS;
      if (queries && first < f.seen[head / a.G]) score_task<DTYPE>(f, head / a.G, head % a.G, first, queries);
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < a.B * a.H * a.L; row++) {
      const int64_t l = row % a.L, h = row / a.L % a.H, b = row / a.L / a.H;
      const int64_t keys = a.causal && l + 1 < f.seen[b] ? l + 1 : f.seen[b];
      softmax(a, f.scores + row * f.padded, mask_row(a, b, h, l), keys, (f.seen[b] + LANES - 1) / LANES * LANES);
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < a.B * a.G * parts; task++) mix_task<DTYPE>(f, task / parts / a.G, task / parts % a.G, task % parts * COLUMNS);
  }
  return failed;
}

}  // namespace

int attention_of_few(const Attention& a, int threads) {
  thread_local Memory shared;
  const int64_t padded = (a.T + LANES - 1) / LANES * LANES, bytes = a.B * a.H * a.L * padded * sizeof(float);
  char* memory = shared.take(bytes + a.B * sizeof(int64_t));
  if (!memory) return 1;
  Few f = {a, (float*)memory, (int64_t*)(memory + bytes), padded, a.H / a.G * a.L, (a.D + LANES - 1) / LANES * LANES};
  for (int64_t b = 0; b < a.B; b++) {
    f.seen[b] = keys_seen(a, b);
    if (f.seen[b] > f.most) f.most = f.seen[b];
  }
  switch (a.dtype) {
    case F32: return run<F32>(f, threads);
    case BF16: return run<BF16>(f, threads);
    default: return run<F16>(f, threads);
  }
}
