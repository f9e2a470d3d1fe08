// What an integer linear layer is given, and its epilogue: the same on every instruction set, so the same results to the last bit.
//
// Weights come as panels of 64 outputs, packed[N/64][K/4][64][4]: four registers of one vpdpbusd step, or rows of four AMX tiles.
// K is padded to a multiple of 64 with zeros, the depth of a tile, and N to a multiple of 64.

#pragma once
#include "activation.h"
#include "rows.h"

constexpr int PANEL = 64, DEPTH = 64;

struct Linear {
  const uint8_t* codes;                                      // [M, K], zeros or not where K is padding: the weight is zero there
  const float* scale; const int32_t* zero; int64_t per_row;  // [M] each, or one for all rows (per_row = 0)
  const int8_t* weight; const float* weight_scale; const int32_t* sums;
  const char* bias; int bias_dtype;
  char* out; int64_t stride; int dtype; int activation;       // row m begins at element m * stride
  int64_t M, N, K;
  int gated;                                                 // rows are act(first half of the outputs) times the rest; whole panels
  const int8_t* next;                                        // a panel that is wanted right after these, or null
};

// On AMX there are tiles, which pay from FEWEST_ROWS_OF_AMX rows; the weights are packed alike, and the results are the same.
// With `rows`, what is written is what they say of each row of the result, and the result itself stays in the cache; only then
// may the product be gated.
// Returns 0, or 1 if there was no memory. int8.cpp.
int linear(const Linear& a, const Rows* rows, int isa, int threads);

// Rows m to m + count times the panels `first` to `last`: on AMX (int8_amx.cpp), on AVX2 (int8_avx2.cpp), or on the best there is for
// so many rows (int8.cpp).
void avx2_band(const Linear& a, int64_t m, int64_t count, int64_t first, int64_t last);
void amx_band(const Linear& a, int64_t m, int64_t count, int64_t first, int64_t last);
void product_band(const Linear& a, int64_t m, int64_t count, int64_t first, int64_t last, int isa);

namespace {

// The length of a row of results in the cache: blocks of 32 outputs are stored whole, and rows are no power of two apart.
inline int64_t padded_row(int64_t N) { return (N + 31) / 32 * 32 + 32; }

struct Columns {  // what the epilogue needs for sixteen outputs
  Floats scale, bias;
  Ints sums;
  Lanes lanes;  // none beyond N
};

// Sums are subtracted as 128 high + low, both of 16 bits, by one instruction; those of more inputs than this take three.
constexpr int64_t MOST_INPUTS_IN_PAIRS = 1 << 15;

inline Ints pairs_of(Ints sums) {
  return high_and_low(shl(sar(sums, 7), 16), bits_and(sums, all_ints(127)));
}

inline Columns columns(const Linear& a, int64_t n) {
  const Lanes lanes = n < a.N ? tail(a.N - n) : 0;
  const Ints sums = ints_at(a.sums + n, lanes);
  const Floats bias = a.bias ? load(a.bias + n * element_size(a.bias_dtype), a.bias_dtype, lanes) : zeros();
  return {floats_at(a.weight_scale + n, lanes), bias, a.K > MOST_INPUTS_IN_PAIRS ? sums : pairs_of(sums), lanes};
}

// act((exact - zero sums) scale weight_scale + bias), exact up to the subtraction.
template <int ACTIVATION>
inline void finish(const Linear& a, Ints exact, int64_t m, int64_t n, const Columns& c) {
  const int64_t row = m * a.per_row;
  const int32_t zero = a.zero[row];
  Ints product = a.K > MOST_INPUTS_IN_PAIRS
                        ? sub(exact, mul(c.sums, all_ints(zero)))
                        : add_pairs(exact, c.sums, all_ints((int32_t)((uint32_t)(-zero * 128) << 16 | (uint16_t)-zero)));
  Floats y = mul(to_floats(product), all(a.scale[row]));
  y = activate<ACTIVATION>(fma(y, c.scale, c.bias));
  store(a.out + (m * a.stride + n) * element_size(a.dtype), y, a.dtype, c.lanes);
}

}  // namespace

// The activation is a template's argument, so that no loop asks for it.
#define WITH_ACTIVATION(activation, call)          \
  switch (activation) {                            \
    case GELU: { constexpr int A = GELU; call; break; }           \
    case GELU_TANH: { constexpr int A = GELU_TANH; call; break; } \
    case SILU: { constexpr int A = SILU; call; break; }           \
    case RELU: { constexpr int A = RELU; call; break; }           \
    default: { constexpr int A = NONE; call; }                    \
  }
