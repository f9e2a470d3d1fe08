// Integer linear layers for CPUs with AVX512-VNNI or AVX2: u8 activations times s8 weights, exact in int32, with a fused epilogue.
//
// No PyTorch headers here: it compiles in seconds, and ops.cpp alone speaks to PyTorch. OpenMP symbols are left undefined on purpose:
// they resolve to the runtime that PyTorch loaded, so there is one thread pool, and torch.set_num_threads counts. Integer sums are
// exact, so results do not depend on the number of threads.
//
// Rows are cut into bands for the threads; a band's product runs on AMX (int8_amx.cpp), on AVX2 (int8_avx2.cpp), or here, on
// AVX512-VNNI.

#include "linear.h"

namespace {

constexpr int ROWS = 6, FEWEST_ROWS_OF_AMX = 3, RESULT = 320 * 1024, STRIP = 4 << 20;  // bytes of a result, and of weights, that stay in the caches

#ifdef __AVX512F__
// MR rows times one panel of 64 outputs. Of ROWS rows each step along K fetches a line from `ahead` on.
template <int MR>
inline void multiply(const uint8_t* x, const int8_t* w, int64_t K, const int8_t* ahead, int32_t (*exact)[PANEL]) {
  Ints sum[MR][4];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++) sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = zero_ints();
  for (int64_t k = 0; k < K; k += 4, w += 4 * PANEL, ahead += PANEL) {
    if (MR == ROWS) _mm_prefetch((const char*)ahead, _MM_HINT_T1);
    Ints w0 = ints_at(w), w1 = ints_at(w + 64), w2 = ints_at(w + 128), w3 = ints_at(w + 192);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      int32_t four;
      memcpy(&four, x + i * K + k, 4);
      Ints q = all_ints(four);
      sum[i][0] = _mm512_dpbusd_epi32(sum[i][0], q, w0);
      sum[i][1] = _mm512_dpbusd_epi32(sum[i][1], q, w1);
      sum[i][2] = _mm512_dpbusd_epi32(sum[i][2], q, w2);
      sum[i][3] = _mm512_dpbusd_epi32(sum[i][3], q, w3);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++) {
    write(exact[i], sum[i][0]);
    write(exact[i] + 16, sum[i][1]);
    write(exact[i] + 32, sum[i][2]);
    write(exact[i] + 48, sum[i][3]);
  }
}

template <int MR, int ACTIVATION>
void block(const Linear& a, int64_t m, int64_t panel, const int8_t* ahead) {
  // Through memory, so that the loop over K keeps every sum in a register: an index the compiler cannot unroll would spill them all.
  alignas(64) int32_t exact[MR][PANEL];
  multiply<MR>(a.codes + m * a.K, a.weight + panel * a.K * PANEL, a.K, ahead, exact);
  for (int j = 0; j < 4; j++) {
    const int64_t n = panel * PANEL + j * LANES;
    if (n >= a.N) break;
    const Columns c = columns(a, n);
    for (int i = 0; i < MR; i++) finish<ACTIVATION>(a, ints_at(exact[i] + j * LANES), m + i, n, c);
  }
}

// The first rows of a panel wait for its weights; the others have them in the cache, and fetch the next panel meanwhile. Where
// there are no others, the processor sees ahead by itself.
template <int ACTIVATION>
void rows(const Linear& a, int64_t m, int64_t count, int64_t panel, const int8_t* next) {
  const int64_t quarter = a.K / 4 * PANEL;
  const bool fetches = next && count > ROWS;
  const int8_t* ahead = fetches ? next : a.weight + panel * a.K * PANEL;  // what is there already costs nothing
  const auto advance = [&] {
    if (fetches) ahead = ahead - next < 3 * quarter ? ahead + quarter : next;
  };
  for (; count >= ROWS; m += ROWS, count -= ROWS, advance()) block<ROWS, ACTIVATION>(a, m, panel, ahead);
  switch (count) {
    case 5: return block<5, ACTIVATION>(a, m, panel, ahead);
    case 4: return block<4, ACTIVATION>(a, m, panel, ahead);
    case 3: return block<3, ACTIVATION>(a, m, panel, ahead);
    case 2: return block<2, ACTIVATION>(a, m, panel, ahead);
    case 1: return block<1, ACTIVATION>(a, m, panel, ahead);
  }
}

void vnni_band(const Linear& a, int64_t m, int64_t count, int64_t first, int64_t last) {
  for (int64_t panel = first; panel < last; panel++) {
    const int8_t* next = panel + 1 < last ? a.weight + (panel + 1) * a.K * PANEL : a.next;
    WITH_ACTIVATION(a.activation, rows<A>(a, m, count, panel, next));
  }
}

constexpr auto plain_band = vnni_band;
#else
constexpr auto plain_band = avx2_band;
#endif

}  // namespace

void product_band(const Linear& a, int64_t m, int64_t count, int64_t first, int64_t last, int isa) {
#ifdef WITH_AMX
  if (isa == ON_AMX && count >= FEWEST_ROWS_OF_AMX) return amx_band(a, m, count, first, last);
#endif
  plain_band(a, m, count, first, last);
}

int linear(const Linear& a, const Rows* rows, int isa, int threads) {
  const int64_t M = a.M, N = a.N, K = a.K;
  if (M == 0) return 0;
  auto of_panels = plain_band;
  int64_t step = ROWS, tallest = 16 * ROWS, flat = 8 * ROWS, least = 1;  // bands of a thread
#ifdef WITH_AMX
  if (isa == ON_AMX && M >= FEWEST_ROWS_OF_AMX) {
    of_panels = amx_band;
    step = 32, tallest = 128, flat = 31, least = 2;
  }
#endif
  const int64_t panels = (N + PANEL - 1) / PANEL, size = element_size(a.dtype), padded = padded_row(N);
  const auto band = [&](const Linear& part, int64_t m, int64_t count, int64_t first, int64_t last) {
    const int64_t half = a.gated ? panels / 2 : panels;  // the activation ends there
    Linear rest = part;
    rest.activation = NONE;
    if (first < half) of_panels(part, m, count, first, last < half ? last : half);
    if (last > half) of_panels(rest, m, count, first > half ? first : half, last);
  };
  const auto finish = [&](char* row, int64_t m, float* memory) {
    if (a.gated) gate_row(row, N / 2, a.dtype);
    pass_row(*rows, row, m, memory);
  };
  // Tall products are cut along M, so that a block of activations stays near, in bands of one height, as many for each thread;
  // flat ones along N, so that each weight is read once.
  const bool whole_rows = rows && M > flat;  // the results of a band stay in the cache, and are finished where they were computed
  while (whole_rows && tallest > step && tallest * N * size > RESULT) tallest -= step;
  const int64_t each = (M + threads * tallest - 1) / (threads * tallest), wanted = threads * (each < least ? least : each);
  int64_t height = ((M + wanted - 1) / wanted + step - 1) / step * step, wide = panels;
  if (M <= flat) height = M, wide = (panels + threads - 1) / threads;
  const bool parallel = M * N * K > 32768;
  int failed = 0;
  const int64_t bands = (M + height - 1) / height;
  if (whole_rows && bands >= threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (parallel) reduction(| : failed)
    for (int64_t m = 0; m < M; m += height) {
      thread_local Memory space;
      const int64_t count = m + height < M ? height : M - m;
      char* memory = space.take(height * padded * size + padded * sizeof(float));
      if (!memory) { failed = 1; continue; }
      Linear part = a;
      part.out = memory - m * padded * size, part.stride = padded;
      band(part, m, count, 0, panels);
      float* row = (float*)(memory + height * padded * size);
      for (int64_t i = m; i < m + count; i++) finish(part.out + i * padded * size, i, row);
    }
    return failed;
  }
  while (wide > 1 && M > flat && (bands * ((panels + wide - 1) / wide) < 4 * threads || wide * K * PANEL > STRIP)) wide = (wide + 1) / 2;
  const int64_t strips = (panels + wide - 1) / wide;
  thread_local Memory shared;
  Linear whole = a;
  if (rows) {
    whole.out = shared.take(M * padded * size), whole.stride = padded;
    if (!whole.out) return 1;
  }
#pragma omp parallel num_threads(threads) if (parallel) reduction(| : failed)
  {
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < bands * strips; task++) {
      const int64_t m = task % bands * height, first = task / bands * wide;  // neighbours in time read the same weights
      band(whole, m, m + height < M ? height : M - m, first, first + wide < panels ? first + wide : panels);
    }
    if (rows) {
      thread_local Memory space;
      float* row = (float*)space.take(padded * sizeof(float));
      failed = row == nullptr;
#pragma omp for schedule(static)
      for (int64_t m = 0; m < M; m++)
        if (row) finish(whole.out + m * padded * size, m, row);
    }
  }
  return failed;
}
