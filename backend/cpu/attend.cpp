// The products that make queries, keys and values, the attention, and the codes of its rows, in one go: a few heads at a time come
// out of the codes of one sequence, and are used up while they are in the cache. Only codes are read from memory and written to it.

#include "attention.h"
#include "linear.h"
#include "rows.h"

namespace {

int64_t common_divisor(int64_t a, int64_t b) { return b ? common_divisor(b, a % b) : a; }

struct Groups {  // of heads that fill whole panels: `heads` in each, `count` of them
  int64_t heads, count;
  int64_t stride, bytes;  // of their queries, in the cache: a row, and all; as many for keys and for values
  int64_t memory;         // that one group needs
  Groups(const Attention& a, int isa) {
    heads = PANEL / common_divisor(a.D, PANEL);
    if (heads > a.H) heads = a.H;
    count = (a.H + heads - 1) / heads;
    stride = padded_row((heads * a.D + PANEL - 1) / PANEL * PANEL);
    bytes = (a.L * stride * element_size(a.dtype) + 63) / 64 * 64;
    memory = 3 * bytes + attention_bytes(a, isa);
  }
};

// One group of heads of sequence b, to `out`, whose rows have H times D numbers.
void attend_group(const Linear* products, const Attention& a, const Groups& groups, char* memory, int64_t b, int64_t group, char* out, int isa) {
  const int64_t head = group * groups.heads, n = head * a.D, first = n / PANEL, size = element_size(a.dtype);
  const int64_t heads = a.H - head < groups.heads ? a.H - head : groups.heads;
  const int64_t last = (n + heads * a.D + PANEL - 1) / PANEL;
  for (int i = 0; i < 3; i++) {
    Linear part = products[i];
    part.out = memory + i * groups.bytes - (b * a.L * groups.stride + n) * size, part.stride = groups.stride;
    const int64_t panel = part.K * PANEL;
    part.next = i < 2 ? products[i + 1].weight + first * panel : n + heads * a.D < part.N ? products[0].weight + last * panel : nullptr;
    product_band(part, b * a.L, a.L, first, last, isa);
  }
  Attention few = a;
  few.q = memory, few.k = memory + groups.bytes, few.v = memory + 2 * groups.bytes;
  few.B = 1, few.H = few.G = heads;
  few.qb = few.kb = few.vb = 0, few.qh = few.kh = few.vh = a.D, few.ql = few.kt = few.vt = groups.stride;
  if (a.mask) few.mask += (b * a.mb + head * a.mh) * (a.mask_dtype == 3 ? 1 : element_size(a.mask_dtype));
  few.out = out + n * size, few.row = a.H * a.D;
  for (int64_t h = 0; h < heads; h++) attention_band(few, memory + 3 * groups.bytes, 0, h, 0, a.L, isa);
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
  char* out = shared.take(a.B * sequence);
  if (!out) return 1;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    thread_local Memory space;
    char* memory = space.take(groups.memory + row);
    failed = memory == nullptr;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < a.B * groups.count; task++) {
      const int64_t b = task / groups.count;
      if (memory) attend_group(products, a, groups, memory, b, task % groups.count, out + b * sequence, isa);
    }
#pragma omp for schedule(static)
    for (int64_t m = 0; m < a.B * a.L; m++)
      if (memory) pass_row(rows, out + m * a.H * a.D * size, m, (float*)(memory + groups.memory));
  }
  return failed;
}
