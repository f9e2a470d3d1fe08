// The products that make queries, keys and values, the attention, and the codes of its rows, in one go: a few heads at a time come
// out of the codes of one sequence, and are used up while they are in the cache. Only codes are read from memory and written to it.

#include "attention.h"
#include "linear.h"
#include "rows.h"

namespace {

constexpr int64_t SHORTEST = 48;      // queries for which keys and values are worth copying
constexpr int64_t MOST_CUT = 64 << 20;  // bytes

int64_t common_divisor(int64_t a, int64_t b) { return b ? common_divisor(b, a % b) : a; }

struct Groups {  // of heads that fill whole panels: `heads` in each, `count` of them
  int64_t heads, count;
  int64_t stride, bytes;  // of their queries, in the cache: a row, and all; as many for keys and for values
  int64_t memory;         // that one group needs, of which attention needs `space`
  int64_t space;
  Groups(const Attention& a, int isa) {
    heads = PANEL / common_divisor(a.D, PANEL);
    if (heads > a.H) heads = a.H;
    count = (a.H + heads - 1) / heads;
    stride = padded_row((heads * a.D + PANEL - 1) / PANEL * PANEL);
    bytes = (a.L * stride * element_size(a.dtype) + 63) / 64 * 64;
    space = attention_bytes(a, isa), memory = 3 * bytes + space;
  }
  int64_t of(const Attention& a, int64_t group) const { return a.H - group * heads < heads ? a.H - group * heads : heads; }
};

// Rows `first` to first + count of sequence b times the weights of one group of heads: its queries (i = 0), keys or values.
void multiply(const Linear* products, const Attention& a, const Groups& groups, char* memory, int64_t b, int64_t group, int i, int64_t first, int64_t count, int isa) {
  const int64_t n = group * groups.heads * a.D, panel = n / PANEL, size = element_size(a.dtype);
  const int64_t outputs = groups.of(a, group) * a.D, last = (n + outputs + PANEL - 1) / PANEL;
  Linear part = products[i];
  part.out = memory + i * groups.bytes - (b * a.L * groups.stride + n) * size, part.stride = groups.stride;
  const int64_t bytes = part.K * PANEL;
  part.next = i < 2 ? products[i + 1].weight + panel * bytes : n + outputs < part.N ? products[0].weight + last * bytes : nullptr;
  product_band(part, b * a.L + first, count, panel, last, isa);
}

// What those are multiplied to, to `out`, whose rows have H times D numbers: of head h of the group, for some of the queries.
void mix(const Attention& a, const Groups& groups, char* memory, char* space, int64_t b, int64_t group, int64_t h, int64_t first, int64_t count, char* out, int isa) {
  const int64_t head = group * groups.heads, size = element_size(a.dtype);
  Attention few = a;
  few.q = memory, few.k = memory + groups.bytes, few.v = memory + 2 * groups.bytes;
  few.B = 1, few.H = few.G = groups.of(a, group);
  few.qb = few.kb = few.vb = 0, few.qh = few.kh = few.vh = a.D, few.ql = few.kt = few.vt = groups.stride;
  if (a.mask) few.mask += (b * a.mb + head * a.mh) * (a.mask_dtype == 3 ? 1 : element_size(a.mask_dtype));
  few.out = out + head * a.D * size, few.row = a.H * a.D;
  attention_band(few, space, 0, h, first, count, isa);
}

// One group of heads of sequence b.
void attend_group(const Linear* products, const Attention& a, const Groups& groups, char* memory, int64_t b, int64_t group, char* out, int isa) {
  for (int i = 0; i < 3; i++) multiply(products, a, groups, memory, b, group, i, 0, a.L, isa);
  for (int64_t h = 0; h < groups.of(a, group); h++) mix(a, groups, memory, memory + 3 * groups.bytes, b, group, h, 0, a.L, out, isa);
}

}  // namespace

int attend(const Linear* products, const Attention& a, const Rows& rows, int isa, int threads) {
  const Groups groups(a, isa);
  const int64_t size = element_size(a.dtype), sequence = a.L * a.H * a.D * size, row = (a.H * a.D + LANES) * sizeof(float);
  int failed = 0;
  if (a.B >= threads) {  // each sequence from codes to codes in one thread
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
    {
      thread_local Memory space;
      char* memory = space.take(groups.memory + (sequence + 63) / 64 * 64 + row);
      failed = memory == nullptr;
      char *out = memory + groups.memory, *wide = out + (sequence + 63) / 64 * 64;
#pragma omp for schedule(dynamic)
      for (int64_t b = 0; b < a.B; b++) {
        if (!memory) continue;
        for (int64_t group = 0; group < groups.count; group++) attend_group(products, a, groups, memory, b, group, out, isa);
        for (int64_t l = 0; l < a.L; l++) pass_row(rows, out + l * a.H * a.D * size, b * a.L + l, (float*)wide);
      }
    }
    return failed;
  }
  thread_local Memory shared;
  const int64_t tasks = a.B * groups.count, results = (a.B * sequence + 63) / 64 * 64;
  // So few groups would leave threads without work; those of all sequences are in memory then.
  const bool cut = tasks % threads && tasks < 4 * threads && tasks * 3 * groups.bytes <= MOST_CUT;
  char* out = shared.take(results + (cut ? tasks * 3 * groups.bytes : 0));
  if (!out) return 1;
  int64_t bands = 1;
  while (cut && tasks * bands < 2 * threads && a.L / (2 * bands) >= SHORTEST) bands *= 2;
  const int64_t step = isa == ON_AMX ? 32 : 6, height = ((a.L + bands - 1) / bands + step - 1) / step * step;
  const auto of_band = [&](int64_t band) { return a.L - band * height < height ? a.L - band * height : height; };
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    thread_local Memory space;
    char* memory = space.take((cut ? groups.space : groups.memory) + row);
    failed = memory == nullptr;
    if (cut) {
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < 3 * tasks * bands; task++) {
        const int64_t band = task % bands, at = task / bands / 3;
        char* made = out + results + at * 3 * groups.bytes;
        if (of_band(band) > 0) multiply(products, a, groups, made, at / groups.count, at % groups.count, (int)(task / bands % 3), band * height, of_band(band), isa);
      }
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < a.B * a.H * bands; task++) {
        const int64_t band = task % bands, head = task / bands % a.H, b = task / bands / a.H, group = head / groups.heads;
        char* made = out + results + (b * groups.count + group) * 3 * groups.bytes;
        if (memory && of_band(band) > 0) mix(a, groups, made, memory, b, group, head % groups.heads, band * height, of_band(band), out + b * sequence, isa);
      }
    } else {
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < tasks; task++) {
        const int64_t b = task / groups.count;
        if (memory) attend_group(products, a, groups, memory, b, task % groups.count, out + b * sequence, isa);
      }
    }
#pragma omp for schedule(static)
    for (int64_t m = 0; m < a.B * a.L; m++)
      if (memory) pass_row(rows, out + m * a.H * a.D * size, m, (float*)(memory + (cut ? groups.space : groups.memory)));
  }
  return failed;
}
