// The product of an integer linear layer on AMX: 32 rows by 32 outputs at a time, in four tiles of int32 sums.
//
// While tiles multiply one block, the vector units finish the block before it (dequantize, bias, activation, store), a few rows
// after each step: the two would otherwise wait for each other, at equal cost.

#include "linear.h"
#include "tiles.h"

#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int TILE = 16, BLOCK = 2 * TILE, AHEAD = 4;  // steps to prefetch

// Tiles 0 to 3: sums, two above two. 4 and 5: activations, above and below. 6 and 7: weights, left and right.
void shape(int rows) {
  const int above = rows < TILE ? rows : TILE, below = rows - above ? rows - above : 1;  // a tile has one row at least
  configure({above, above, below, below, above, below, TILE, TILE});
}

struct Block {  // sums that wait for their epilogue
  const int32_t* exact;
  int64_t m, n;
  int rows, done;
  Columns left, right;
};

template <int ACTIVATION>
inline void drain(const Linear& a, Block& b, int rows) {
  const int end = b.done + rows < b.rows ? b.done + rows : b.rows;
  for (; b.done < end; b.done++) {
    const int32_t* exact = b.exact + b.done * BLOCK;
    finish<ACTIVATION>(a, _mm512_load_si512(exact), b.m + b.done, b.n, b.left);
    finish<ACTIVATION>(a, _mm512_load_si512(exact + LANES), b.m + b.done, b.n + LANES, b.right);
  }
}

template <int ACTIVATION>
void multiply(const Linear& a, int64_t m, int64_t n, int rows, int32_t* exact, Block& before) {
  const uint8_t* x = a.codes + m * a.K;
  const int8_t* w = a.weight + n / PANEL * PANEL * a.K + n % PANEL * 4;
  const bool both = rows > TILE;
  const int64_t steps = a.K / DEPTH;
  const int each = (int)((before.rows + steps - 1) / steps);
  const bool once = a.M <= BLOCK;  // no other rows will want these weights: they come from memory
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; step++, x += DEPTH, w += DEPTH * PANEL) {
    if (once)
      for (int i = 0; i < TILE; i++) {
        _mm_prefetch(w + AHEAD * DEPTH * PANEL + 4 * PANEL * i, _MM_HINT_T0);
        _mm_prefetch(w + AHEAD * DEPTH * PANEL + 4 * PANEL * i + 4 * TILE, _MM_HINT_T0);
      }
    _tile_loadd(6, w, 4 * PANEL);
    _tile_loadd(4, x, a.K);
    _tile_loadd(7, w + 4 * TILE, 4 * PANEL);
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    if (both) {
      _tile_loadd(5, x + TILE * a.K, a.K);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    }
    drain<ACTIVATION>(a, before, each);
  }
  _tile_stored(0, exact, 4 * BLOCK);
  _tile_stored(1, exact + TILE, 4 * BLOCK);
  if (both) {
    _tile_stored(2, exact + TILE * BLOCK, 4 * BLOCK);
    _tile_stored(3, exact + TILE * BLOCK + TILE, 4 * BLOCK);
  }
  before = {exact, m, n, rows, 0, columns(a, n), columns(a, n + LANES)};
}

template <int ACTIVATION>
void band(const Linear& a, int64_t m, int64_t count, int64_t first, int64_t last) {
  alignas(64) int32_t exact[2][BLOCK * BLOCK];
  Block before = {exact[0], 0, 0, 0, 0, {}, {}};
  int64_t turn = 0;
  const int64_t whole = count / BLOCK * BLOCK;
  if (whole) {
    shape(BLOCK);
    for (int64_t panel = first; panel < last; panel++)  // the weights of a panel stay near while the rows go by
      for (int64_t i = 0; i < whole; i += BLOCK)
        for (int64_t n = panel * PANEL; n < (panel + 1) * PANEL && n < a.N; n += BLOCK)
          multiply<ACTIVATION>(a, m + i, n, BLOCK, exact[turn++ % 2], before);
  }
  if (whole < count) {
    shape((int)(count - whole));
    for (int64_t n = first * PANEL; n < last * PANEL && n < a.N; n += BLOCK)
      multiply<ACTIVATION>(a, m + whole, n, (int)(count - whole), exact[turn++ % 2], before);
  }
  drain<ACTIVATION>(a, before, BLOCK);
  _tile_release();
}

}  // namespace

void amx_band(const Linear& a, int64_t m, int64_t count, int64_t first, int64_t last) {
  WITH_ACTIVATION(a.activation, band<A>(a, m, count, first, last));
}

// Linux lets a process use tiles once it has asked; returns 0, or an errno.
extern "C" int amx_permission() {
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) ? 1 : 0;
}
