// The kernels as PyTorch ops, through its stable interface: what must agree, memory for the results, and the calls. Python spends
// several times as long on a call, which a product of one row cannot hide. ops.py and low_bit.py declare the ops and their meaning.

#include "attention.h"
#include "linear.h"
#include "low_bit.h"
#include "rows.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // in older headers
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace {

using torch::stable::Tensor;
using torch::stable::detail::from;
using Type = torch::headeronly::ScalarType;
using Maybe = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;
using Codes = std::tuple<Tensor, Tensor, Tensor>;  // uint8 [..., K padded to 64], scale float32 [..., 1], zero point int32 [..., 1]
using Passed = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // and the sum and the normalised rows, [0] unless kept

std::atomic<int> isa{ON_VNNI};

// ---- what must be so ----------------------------------------------------------------------------------------------------
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;

template <typename T>
void write(std::ostream& out, const T& part) { out << part; }

void write(std::ostream& out, const Shape& sizes) {
  out << '[';
  for (size_t i = 0; i < sizes.size(); i++) out << (i ? ", " : "") << sizes[i];
  out << ']';
}

void write(std::ostream& out, const Tensor& t) { write(out, t.sizes()); }

void write(std::ostream& out, const Maybe& t) {
  if (t) write(out, *t);
  else out << "none";
}

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {  // a tensor is told by its shape
  std::ostringstream text;
  (write(text, parts), ...);
  throw std::runtime_error(text.str());
}

template <typename... Parts>
inline void need(bool holds, const Parts&... parts) {
  if (__builtin_expect(!holds, 0)) refuse(parts...);
}

int dtype(Type type) {
  switch (type) {
    case Type::Float: return F32;
    case Type::BFloat16: return BF16;
    case Type::Half: return F16;
    default: refuse("a tensor has another dtype than float32, bfloat16 and float16, which the CPU kernels are for");
  }
}

int dtype(const Tensor& t) { return dtype(t.scalar_type()); }

void of_type(const Tensor& t, Type type, const char* name) { need(t.scalar_type() == type, "the ", name, " of a product has the wrong dtype"); }

template <size_t N>
int number_of(const std::string& name, const char* const (&names)[N]) {
  for (size_t i = 0; i < N; i++)
    if (name == names[i]) return (int)i;
  refuse("there is no '", name, "' among the functions that the CPU kernels know");
}

int activation_of(const std::string& name) {
  static constexpr const char* names[] = {"none", "gelu", "gelu_tanh", "silu", "relu"};  // enum Activation
  return number_of(name, names);
}

int norm_of(const std::string& name) {
  static constexpr const char* names[] = {"none", "layer", "rms"};  // enum Norm
  return number_of(name, names);
}

void succeeded(int failed, const char* what, int64_t rows, int64_t columns) {
  need(!failed, "there is not enough memory for ", what, " of ", rows, " rows and ", columns, " columns");
}

// ---- tensors ------------------------------------------------------------------------------------------------------------
Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
Maybe dense(const Maybe& t) { return t ? Maybe(dense(*t)) : t; }
Tensor dense_rows(const Tensor& t) { return t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t); }

template <typename T = char>
const T* at(const Tensor& t) { return (const T*)t.const_data_ptr(); }
const char* at(const Maybe& t) { return t ? at(*t) : nullptr; }

// A page that is written for the first time costs a fault: a tenth of a product of 2048 rows and 4096 outputs.
void in_large_pages([[maybe_unused]] const Tensor& t) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t LARGE = 2 << 20;
  const uintptr_t from = (uintptr_t)t.data_ptr(), bytes = t.numel() * t.element_size();
  const uintptr_t first = (from + LARGE - 1) / LARGE * LARGE, last = (from + bytes) / LARGE * LARGE;
  if (last > first) madvise((void*)first, last - first, MADV_HUGEPAGE);  // advice: where it is not taken nothing is lost
#endif
}

Tensor strided(const Sizes& sizes, const Sizes& strides, Type type) {
  AtenTensorHandle made;
  const int32_t code = torch::stable::detail::to<int32_t>(from(type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), code, aoti_torch_device_type_cpu(), 0, &made));
  const Tensor result(made);
  in_large_pages(result);
  return result;
}

Tensor empty(const Sizes& sizes, Type type) {
  Sizes strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * (sizes[i] > 1 ? sizes[i] : 1);
  return strided(sizes, strides, type);
}

thread_local bool chained = false;  // what is returned goes to another op of ours

// Of shape [0], where a result is not wanted. PyTorch would not have an op return one tensor twice.
Tensor nothing(Type type) {
  if (!chained) return empty({0}, type);
  static const Tensor &floats = *new Tensor(empty({0}, Type::Float)), &bfloats = *new Tensor(empty({0}, Type::BFloat16)),
                      &halves = *new Tensor(empty({0}, Type::Half));
  return type == Type::Float ? floats : type == Type::BFloat16 ? bfloats : halves;
}

Sizes with_last(const Tensor& like, int64_t last) {
  Sizes sizes(like.sizes().begin(), like.sizes().end());
  sizes.back() = last;
  return sizes;
}

int64_t rows_of(const Sizes& sizes) {
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < sizes.size(); i++) rows *= sizes[i];
  return rows;
}

int threads() { return (int)torch::stable::get_num_threads(); }

// ---- a row on its way from one product to the next ----------------------------------------------------------------------
struct How {  // what is asked of a row behind its number
  Maybe residual, residual_scale;
  std::string norm;
  Maybe weight, bias;
  double eps;
  int64_t bits;
  bool symmetric, keep_sum, keep_norm;
};

struct Pass {  // what C++ is told, the tensors that it reads, and those that it writes
  Rows told;
  Maybe residual, scaled_by, gain, shift;
  Passed out;

  // Rows of `sizes` and `type`.
  Pass(const Sizes& sizes, Type type, const How& how)
      : residual(dense(how.residual)), scaled_by(dense(how.residual_scale)), gain(dense(how.weight)), shift(dense(how.bias)) {
    const int64_t inner = sizes.back();
    need(!residual || (residual->sizes().size() == sizes.size() && std::equal(sizes.begin(), sizes.end(), residual->sizes().begin())),
         "rows of shape ", Shape(sizes), " meet ", residual, "; the same is needed");
    for (const Maybe* one : {&scaled_by, &gain, &shift})
      need(!*one || ((*one)->dim() == 1 && (*one)->size(0) == inner), "rows of ", inner, " channels meet ", *one, "; one number each is needed");
    for (const Maybe* one : {&residual, &scaled_by}) need(!*one || (*one)->scalar_type() == type, "a residual has another dtype than its row");
    need(!gain || !shift || gain->scalar_type() == shift->scalar_type(), "weight and bias of a norm have two dtypes");
    need(how.bits >= 1 && how.bits <= 8, how.bits, " bits; 1 to 8 are needed");
    Sizes padded = sizes, each = sizes;
    padded.back() = (inner + DEPTH - 1) / DEPTH * DEPTH, each.back() = 1;
    Tensor codes = empty(padded, Type::Byte), scale = empty(each, Type::Float), zero = empty(each, Type::Int);
    const Tensor total = how.keep_sum ? empty(sizes, type) : nothing(type), normed = how.keep_norm ? empty(sizes, type) : nothing(type);
    told = {at(residual), at(scaled_by), at(gain), at(shift), dtype(type), gain ? dtype(*gain) : shift ? dtype(*shift) : F32,
            norm_of(how.norm), (float)how.eps,
            how.keep_sum ? (char*)total.data_ptr() : nullptr, how.keep_norm ? (char*)normed.data_ptr() : nullptr,
            (uint8_t*)codes.data_ptr(), (float*)scale.data_ptr(), (int32_t*)zero.data_ptr(), inner, padded.back(),
            (1 << (how.symmetric ? how.bits - 1 : how.bits)) - 1, how.symmetric};
    out = {codes, scale, zero, total, normed};
  }

  Codes codes() const { return {std::get<0>(out), std::get<1>(out), std::get<2>(out)}; }
};

How only_codes(int64_t bits, bool symmetric) { return {{}, {}, "none", {}, {}, 0, bits, symmetric, false, false}; }

Pass pass_rows(const Tensor& given, const How& how) {
  const Tensor x = dense(given);
  need(x.dim() >= 1, "a number alone is no row");
  const Sizes sizes(x.sizes().begin(), x.sizes().end());
  Pass pass(sizes, x.scalar_type(), how);
  succeeded(quantize_rows(at(x), rows_of(sizes), pass.told, threads()), "a pass", rows_of(sizes), sizes.back());
  return pass;
}

Codes quantize_rows_u8(Tensor x, int64_t bits, bool symmetric) { return pass_rows(x, only_codes(bits, symmetric)).codes(); }

Passed normalize_rows_u8(Tensor x, Maybe residual, Maybe residual_scale, std::string norm, Maybe weight, Maybe bias, double eps,
                         int64_t bits, bool symmetric, bool keep_sum, bool keep_norm) {
  return pass_rows(x, {residual, residual_scale, norm, weight, bias, eps, bits, symmetric, keep_sum, keep_norm}).out;
}

// ---- products of codes --------------------------------------------------------------------------------------------------
struct Product {  // what C++ is told but for where it writes, and the tensors that it reads
  Tensor codes, scale, zero, weight, weight_scale, sums;
  Maybe bias;
  Linear told;

  Product(const Tensor& codes_, const Tensor& scale_, const Tensor& zero_, const Tensor& weight_, const Tensor& weight_scale_,
          const Tensor& sums_, const Maybe& bias_, int64_t outputs, int activation, Type type)
      : codes(dense(codes_)), scale(dense(scale_)), zero(dense(zero_)), weight(dense(weight_)), weight_scale(dense(weight_scale_)),
        sums(dense(sums_)), bias(dense(bias_)) {
    need(codes.dim() >= 1, "a number alone is no row of codes");
    const int64_t inner = codes.size(codes.dim() - 1), rows = rows_of(with_last(codes, 1)), panels = (outputs + PANEL - 1) / PANEL;
    of_type(codes, Type::Byte, "codes"), of_type(scale, Type::Float, "scale"), of_type(zero, Type::Int, "zero point");
    of_type(weight, Type::Char, "weight"), of_type(weight_scale, Type::Float, "weight's scale"), of_type(sums, Type::Int, "sums");
    const bool fits = outputs > 0 && inner > 0 && inner % DEPTH == 0 && weight.dim() == 4 && weight.size(0) == panels && weight.size(1) == inner / 4 &&
                      weight.size(2) == PANEL && weight.size(3) == 4 && weight_scale.numel() == outputs && sums.numel() == outputs &&
                      (!bias || bias->numel() == outputs) && (scale.numel() == 1 || scale.numel() == rows) && zero.numel() == scale.numel();
    need(fits, "a product of codes ", codes, " and panels ", weight, " to ", outputs, " outputs, of which ",
         weight_scale.numel(), " have a scale, ", sums.numel(), " a sum and ", bias, " a bias; ", scale.numel(),
         " rows have a scale and ", zero.numel(), " a zero point: the sizes do not agree");
    told = {at<uint8_t>(codes), at<float>(scale), at<int32_t>(zero), scale.numel() == rows,
            at<int8_t>(weight), at<float>(weight_scale), at<int32_t>(sums), at(bias), bias ? dtype(*bias) : F32,
            nullptr, outputs, dtype(type), activation, rows, outputs, inner, 0};
  }
};

Tensor linear_u8s8(Tensor codes, Tensor scale, Tensor zero_point, Tensor weight, Tensor weight_scale, Tensor sums, Maybe bias,
                   int64_t out_features, std::string activation, Type type) {
  Product product(codes, scale, zero_point, weight, weight_scale, sums, bias, out_features, activation_of(activation), type);
  Tensor out = empty(with_last(codes, out_features), type);
  product.told.out = (char*)out.data_ptr();
  succeeded(linear(product.told, nullptr, isa, threads()), "a product", product.told.M, out_features);
  return out;
}

Passed linear_rows_u8s8(Tensor codes, Tensor scale, Tensor zero_point, Tensor weight, Tensor weight_scale, Tensor sums, Maybe bias,
                        int64_t out_features, std::string activation, Type type, Maybe residual, Maybe residual_scale, std::string norm,
                        Maybe norm_weight, Maybe norm_bias, double eps, int64_t bits, bool symmetric, bool keep_sum, bool keep_norm) {
  const Product product(codes, scale, zero_point, weight, weight_scale, sums, bias, out_features, activation_of(activation), type);
  const How how{residual, residual_scale, norm, norm_weight, norm_bias, eps, bits, symmetric, keep_sum, keep_norm};
  const Pass pass(with_last(codes, out_features), type, how);
  succeeded(linear(product.told, &pass.told, isa, threads()), "a product", product.told.M, out_features);
  return pass.out;
}

Codes linear_gated_u8s8(Tensor codes, Tensor scale, Tensor zero_point, Tensor weight, Tensor weight_scale, Tensor sums, Maybe bias,
                        int64_t out_features, std::string activation, Type type, int64_t bits, bool symmetric) {
  need(out_features % PANEL == 0, out_features, " outputs of a gated product; a multiple of ", PANEL, " is needed");
  Product product(codes, scale, zero_point, weight, weight_scale, sums, bias, 2 * out_features, activation_of(activation), type);
  product.told.gated = 1;
  const Pass pass(with_last(codes, out_features), type, only_codes(bits, symmetric));
  succeeded(linear(product.told, &pass.told, isa, threads()), "a product", product.told.M, 2 * out_features);
  return pass.codes();
}

// ---- attention ----------------------------------------------------------------------------------------------------------
struct Mask {  // of [B, H, L, T], or none
  Maybe mask;
  int type;
  std::array<int64_t, 4> strides{};

  Mask(const Maybe& given, const std::array<int64_t, 4>& shape, Type otherwise) : mask(given), type(dtype(otherwise)) {
    if (!mask) return;
    const int64_t axes = mask->dim();
    need(axes <= 4, "a mask has ", axes, " axes; at most 4 are needed");
    if (axes && mask->size(axes - 1) > 1 && mask->stride(axes - 1) != 1) mask = torch::stable::contiguous(*mask);
    type = mask->scalar_type() == Type::Bool ? 3 : dtype(*mask);
    for (int64_t i = 0; i < axes; i++) {
      const int64_t size = mask->size(i), wanted = shape[4 - axes + i];
      need(size == 1 || size == wanted, "a mask of shape ", mask, " does not fit attention to ", shape[3], " keys of ", shape[2], " queries");
      strides[4 - axes + i] = size == 1 ? 0 : mask->stride(i);
    }
  }
};

Tensor attention_op(Tensor query, Tensor key, Tensor value, Maybe mask, bool is_causal, double scale) {
  need(query.dim() == 4 && key.dim() == 4 && value.dim() == 4, "attention of ", query, ", ", key, " and ", value, "; four axes are needed");
  const Tensor q = dense_rows(query), k = dense_rows(key), v = dense_rows(value);
  const int64_t B = q.size(0), H = q.size(1), L = q.size(2), D = q.size(3), G = k.size(1), T = k.size(2);
  bool fits = k.size(0) == B && k.size(3) == D && G > 0 && H % G == 0;
  for (int i = 0; i < 4; i++) fits = fits && k.size(i) == v.size(i);
  need(fits, "attention of ", q, " to ", k, " and ", v, ": sizes do not agree");
  const Type type = q.scalar_type();
  need(k.scalar_type() == type && v.scalar_type() == type, "query, key and value of attention have more than one dtype");
  const Mask seen(mask, {B, H, L, T}, type);
  Tensor out = strided({B, H, L, D}, {L * H * D, D, H * D, 1}, type);
  const Attention told = {at(q), at(k), at(v), at(seen.mask), (char*)out.data_ptr(), dtype(type), seen.type, B, H, G, L, T, D,
                          q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2),
                          seen.strides[0], seen.strides[1], seen.strides[2], seen.strides[3], H * D, is_causal, (float)scale};
  succeeded(attention(told, isa, threads()), "attention", L, T);
  return out;
}

Codes attend_u8s8(Tensor codes, Tensor scale, Tensor zero_point, std::vector<Tensor> weights, std::vector<Tensor> weight_scales,
                  std::vector<Tensor> sums, std::vector<Maybe> biases, int64_t heads, Type type, Maybe mask, bool is_causal,
                  double factor, int64_t bits, bool symmetric) {
  need(weights.size() == 3 && weight_scales.size() == 3 && sums.size() == 3 && biases.size() == 3, "three products are needed: of queries, keys and values");
  need(codes.dim() == 3, "codes of shape ", codes, "; [B, L, K] is needed");
  const int64_t B = codes.size(0), L = codes.size(1), outputs = weight_scales[0].numel();
  need(heads > 0 && outputs % heads == 0, outputs, " outputs do not make ", heads, " heads; a multiple is needed");
  std::vector<Product> made;
  for (int i = 0; i < 3; i++) made.emplace_back(codes, scale, zero_point, weights[i], weight_scales[i], sums[i], biases[i], outputs, NONE, type);
  const Linear products[] = {made[0].told, made[1].told, made[2].told};
  const Pass pass({B, L, outputs}, type, only_codes(bits, symmetric));
  const Mask seen(mask, {B, heads, L, L}, type);
  Attention told{};
  told.mask = at(seen.mask), told.dtype = dtype(type), told.mask_dtype = seen.type;
  told.B = B, told.H = told.G = heads, told.L = told.T = L, told.D = outputs / heads;
  told.mb = seen.strides[0], told.mh = seen.strides[1], told.ml = seen.strides[2], told.mt = seen.strides[3];
  told.row = outputs, told.causal = is_causal, told.scale = (float)factor;
  if (B > 0 && L > 0) succeeded(attend(products, told, pass.told, isa, threads()), "attention", L, outputs);
  return pass.codes();
}

// ---- low-bit weights ----------------------------------------------------------------------------------------------------
constexpr int64_t MOST_INPUTS = INT32_MAX / (255 * 255);  // of a group: a sum of more products of two codes may not fit 32 bits

// Beyond these a float product of decoded weights is faster, or as fast; of float16 it is slow.
int64_t most_rows(Type type) {
  if (type == Type::Half) return INT64_MAX;
  if (isa == ON_AVX2) return type == Type::BFloat16 ? 64 : 256;
  return type == Type::BFloat16 ? 256 : INT64_MAX;
}

int64_t stored_bytes(int64_t bits, int64_t size) {  // of 64 outputs of a group
  return (size + depth((int)bits) - 1) / depth((int)bits) * block_bytes((int)bits);
}

Tensor low_bit(const Tensor& given, const Maybe& given_scale, const Maybe& given_zero, const Tensor& given_weight, const Tensor& given_weight_scale,
               const Tensor& given_terms, const Maybe& given_bias, int64_t bits, int64_t size, int64_t outputs, int activation, Type type,
               bool gated = false) {
  need(!gated || outputs % PANEL == 0, outputs, " gates; a multiple of ", PANEL, " is needed");
  const Tensor x = dense(given), weight = dense(given_weight), weight_scale = dense(given_weight_scale), terms = dense(given_terms);
  const Maybe scale = dense(given_scale), zero = dense(given_zero), bias = dense(given_bias);
  need(x.dim() >= 1 && weight.dim() == 3, "rows ", x, " and a weight ", weight, "; [..., K] and [N/64, G, bytes] are needed");
  need(bits >= 1 && bits <= 8 && size > 0, bits, " bits in groups of ", size, "; 1 to 8 bits are needed, and at least one input");
  need(size <= MOST_INPUTS, "groups of ", size, " inputs; at most ", MOST_INPUTS, " are summed exactly");
  const int64_t groups = weight.size(1), width = x.size(x.dim() - 1), rows = rows_of(with_last(x, 1));
  const int64_t all = gated ? 2 * outputs : outputs, panels = (all + PANEL - 1) / PANEL;
  of_type(weight, Type::Char, "weight"), of_type(weight_scale, Type::Float, "weight's scale"), of_type(terms, Type::Int, "terms");
  if (scale) of_type(x, Type::Byte, "codes"), of_type(*scale, Type::Float, "scale"), of_type(*zero, Type::Int, "zero point");
  const bool fits = groups > 0 && (scale ? width >= size * groups : width == size * groups) && weight.numel() == panels * groups * stored_bytes(bits, size) &&
                    weight_scale.numel() == panels * PANEL * groups && terms.numel() == panels * PANEL * groups &&
                    (!bias || bias->numel() == all) &&
                    (!scale || ((scale->numel() == 1 || scale->numel() == rows) && zero->numel() == scale->numel()));
  need(fits, "a product of rows ", x, ", a weight ", weight, " of ", groups, " groups of ", size, " codes of ", bits,
       " bits, and ", all, " outputs (bias ", bias, "): sizes do not agree");
  Tensor out = empty(with_last(x, outputs), type);
  const LowBit told = {at(x), scale ? F32 : dtype(x), width, scale ? at<float>(*scale) : nullptr, zero ? at<int32_t>(*zero) : nullptr,
                       scale && scale->numel() == rows, at<uint8_t>(weight), at<float>(weight_scale), at<int32_t>(terms), (int)bits, size, groups,
                       at(bias), bias ? dtype(*bias) : F32, (char*)out.data_ptr(), dtype(type), activation, rows, outputs, gated};
  succeeded(scale ? low_bit_integer(told, isa, threads()) : low_bit_float(told, isa, threads()), "a product", rows, outputs);
  return out;
}

template <bool GATED>
Tensor low_bit_product_u8(Tensor codes, Tensor scale, Tensor zero_point, Tensor weight, Tensor weight_scale, Tensor terms, Maybe bias,
                          int64_t bits, int64_t group_size, int64_t out_features, std::string activation, Type type) {
  return low_bit(codes, scale, zero_point, weight, weight_scale, terms, bias, bits, group_size, out_features, activation_of(activation), type, GATED);
}

// More rows than `most_rows` meet blocks of decoded weights, in PyTorch's own product (low_bit.py).
template <bool GATED>
Tensor low_bit_product_float(Tensor x, Tensor weight, Tensor weight_scale, Tensor terms, Maybe bias, int64_t bits, int64_t group_size,
                             int64_t out_features, std::string activation, Type type) {
  if (rows_of(with_last(x, 1)) <= most_rows(x.scalar_type()))
    return low_bit(x, {}, {}, weight, weight_scale, terms, bias, bits, group_size, out_features, activation_of(activation), type, GATED);
  std::array<StableIValue, 10> stack{from(x), from(weight), from(weight_scale), from(terms), from(bias), from(bits), from(group_size),
                                     from(out_features), from(activation), from(type)};
  const char* op = GATED ? "fxquant::low_bit_gated_decoded" : "fxquant::low_bit_linear_decoded";
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

void low_bit_decode_op(Tensor weight, Tensor weight_scale, Tensor terms, int64_t bits, int64_t group_size, Tensor out) {
  need(weight.is_contiguous() && weight_scale.is_contiguous() && terms.is_contiguous() && out.is_contiguous() && weight.dim() == 3 && out.dim() == 2,
       "a weight ", weight, " is decoded into ", out, "; contiguous tensors of three and two axes are needed");
  const int64_t groups = weight.size(1), outputs = out.size(1), panels = (outputs + PANEL - 1) / PANEL;
  of_type(weight, Type::Char, "weight"), of_type(weight_scale, Type::Float, "weight's scale"), of_type(terms, Type::Int, "terms");
  need(bits >= 1 && bits <= 8 && group_size > 0 && out.size(0) == groups * group_size && weight.numel() == panels * groups * stored_bytes(bits, group_size) &&
       weight_scale.numel() == panels * PANEL * groups && terms.numel() == panels * PANEL * groups,
       "a weight ", weight, " of ", groups, " groups of ", group_size, " codes of ", bits, " bits is decoded into ", out, ": sizes do not agree");
  LowBit told{};
  told.weight = at<uint8_t>(weight), told.weight_scale = at<float>(weight_scale), told.terms = at<int32_t>(terms);
  told.bits = (int)bits, told.size = group_size, told.groups = groups, told.out = (char*)out.data_ptr(), told.dtype = dtype(out), told.N = outputs;
  low_bit_decode(told, threads());
}

// ---- several calls as one -----------------------------------------------------------------------------------------------
// A program has a sentence for each call, ended by a semicolon: the name of an op, and its arguments by kind. `%3` is value 3: first
// come the given tensors, then what the calls return; `-` no tensor, `[2` a list of the two that follow, `i` an integer, `b` a
// boolean, `f` a number by the bits of its double, which no locale spells otherwise, `s` a name, `t` a dtype. The sentence `return` lists what is handed back (chain.py writes it).
struct Argument {
  char kind;
  int64_t number = 0;
  double real = 0;
  std::string text;
};

struct Values {
  std::vector<Maybe> all;
  const Argument* next;  // of the call at hand

  const Argument& take(char kind) {
    need(next->kind == kind, "a program has an argument of kind ", next->kind, " where ", kind, " is needed");
    return *next++;
  }

  const Tensor& value(int64_t number) const {
    need(number >= 0 && (size_t)number < all.size() && all[number], "a program reads value ", number, ", which there is not");
    return *all[number];
  }
};

template <typename T> struct Read;
template <> struct Read<int64_t> { static int64_t from(Values& v) { return v.take('i').number; } };
template <> struct Read<bool> { static bool from(Values& v) { return v.take('b').number; } };
template <> struct Read<double> { static double from(Values& v) { return v.take('f').real; } };
template <> struct Read<std::string> { static std::string from(Values& v) { return v.take('s').text; } };
template <> struct Read<Type> { static Type from(Values& v) { return (Type)v.take('t').number; } };
template <> struct Read<Tensor> { static Tensor from(Values& v) { return v.value(v.take('%').number); } };
template <> struct Read<Maybe> {
  static Maybe from(Values& v) { return v.next->kind == '-' ? (v.next++, Maybe()) : Maybe(Read<Tensor>::from(v)); }
};
template <typename T> struct Read<std::vector<T>> {
  static std::vector<T> from(Values& v) {
    std::vector<T> items((size_t)0);
    for (int64_t left = v.take('[').number; left > 0; left--) items.push_back(Read<T>::from(v));
    return items;
  }
};

void keep(Values& v, const Tensor& result) { v.all.emplace_back(result); }

template <typename... T>
void keep(Values& v, const std::tuple<T...>& results) { std::apply([&](const auto&... one) { (v.all.emplace_back(one), ...); }, results); }

template <typename R, typename... A>
void call(R (*op)(A...), Values& v) {
  std::tuple<A...> given{Read<A>::from(v)...};  // in braces they are read in order
  keep(v, std::apply(op, std::move(given)));
}

template <auto OP>
void calling(Values& v) { call(OP, v); }

struct Callable { const char* name; void (*call)(Values&); };

constexpr Callable CALLABLE[] = {
  {"quantize_rows_u8", calling<&quantize_rows_u8>},
  {"normalize_rows_u8", calling<&normalize_rows_u8>},
  {"linear_u8s8", calling<&linear_u8s8>},
  {"linear_rows_u8s8", calling<&linear_rows_u8s8>},
  {"linear_gated_u8s8", calling<&linear_gated_u8s8>},
  {"attention", calling<&attention_op>},
  {"attend_u8s8", calling<&attend_u8s8>},
  {"low_bit_linear_u8", calling<&low_bit_product_u8<false>>},
  {"low_bit_linear_float", calling<&low_bit_product_float<false>>},
  {"low_bit_gated_u8", calling<&low_bit_product_u8<true>>},
  {"low_bit_gated_float", calling<&low_bit_product_float<true>>},
};

struct Step {
  void (*call)(Values&);
  std::vector<Argument> arguments;
  std::vector<int64_t> last;  // the values that no later call reads
};

struct Steps {
  std::vector<Step> calls;
  std::vector<int64_t> returned;
};

Type type_of(const std::string& name) {
  static constexpr const char* names[] = {"float32", "bfloat16", "float16"};
  static constexpr Type types[] = {Type::Float, Type::BFloat16, Type::Half};
  return types[number_of(name, names)];
}

Steps parse(const std::string& text) {
  Steps steps;
  std::istringstream sentences(text);
  for (std::string sentence; std::getline(sentences, sentence, ';');) {
    std::istringstream words(sentence);
    std::string name, word;
    words >> name;
    Step step{};
    for (const Callable& one : CALLABLE)
      if (name == one.name) step.call = one.call;
    need(step.call || name == "return", "there is no op '", name, "' that a program may call");
    while (words >> word) {
      Argument a{word[0]};
      const std::string rest = word.substr(1);
      switch (a.kind) {
        case '%': case '[': case 'i': case 'b': a.number = std::stoll(rest); break;
        case 'f': {
          const uint64_t bits = std::stoull(rest, nullptr, 16);
          memcpy(&a.real, &bits, sizeof bits);
          break;
        }
        case 's': a.text = rest; break;
        case 't': a.number = (int64_t)type_of(rest); break;
        case '-': break;
        default: refuse("a program has the word '", word, "', which is no argument");
      }
      if (step.call) step.arguments.push_back(a);
      else steps.returned.push_back(a.number);
    }
    if (step.call) {
      step.arguments.push_back({'.'});  // which is of no kind that is asked for
      steps.calls.push_back(step);
    }
  }
  std::vector<bool> read;
  const auto first = [&](int64_t value) {  // seen from the end
    if ((size_t)value >= read.size()) read.resize(value + 1);
    return !read[value] && (read[value] = true);
  };
  for (int64_t value : steps.returned) first(value);
  for (size_t i = steps.calls.size(); i-- > 0;)
    for (const Argument& a : steps.calls[i].arguments)
      if (a.kind == '%' && first(a.number)) steps.calls[i].last.push_back(a.number);
  return steps;
}

// Programs are read once. There is one for each run of neighbours in a compiled graph, so they are kept.
std::shared_ptr<const Steps> steps_of(const std::string& program) {
  static std::mutex& one_at_a_time = *new std::mutex;
  static auto& known = *new std::unordered_map<std::string, std::shared_ptr<const Steps>>;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  std::shared_ptr<const Steps>& found = known[program];
  if (!found) found = std::make_shared<const Steps>(parse(program));
  return found;
}

struct Chained {
  Chained() { chained = true; }
  ~Chained() { chained = false; }
};

std::vector<Tensor> chain(std::vector<Tensor> given, std::string program) {
  const std::shared_ptr<const Steps> steps = steps_of(program);
  Values values{{given.begin(), given.end()}, nullptr};
  given.clear();
  const Chained on;
  for (const Step& step : steps->calls) {
    values.next = step.arguments.data();
    step.call(values);
    need(values.next->kind == '.', "a program has more arguments than a call takes");
    for (int64_t value : step.last) values.all[value].reset();
  }
  std::vector<Tensor> results;
  for (int64_t number : steps->returned) results.push_back(values.value(number));
  return results;
}

}  // namespace

extern "C" {

// The instruction set that is used from now on; returns the one before. The results of integer products are the same.
int use_isa(int wanted) { return isa.exchange(wanted); }

// To be called once: from then on the ops run on CPU tensors.
void register_ops() {
  using torch::stable::detail::StableLibrary;
  static StableLibrary& ops = *new StableLibrary(StableLibrary::Kind::IMPL, "fxquant", "CPU", __FILE__, __LINE__);  // for as long as PyTorch
  ops.impl("quantize_rows_u8", TORCH_BOX(&quantize_rows_u8))
      .impl("normalize_rows_u8", TORCH_BOX(&normalize_rows_u8))
      .impl("linear_u8s8", TORCH_BOX(&linear_u8s8))
      .impl("linear_rows_u8s8", TORCH_BOX(&linear_rows_u8s8))
      .impl("linear_gated_u8s8", TORCH_BOX(&linear_gated_u8s8))
      .impl("attention", TORCH_BOX(&attention_op))
      .impl("attend_u8s8", TORCH_BOX(&attend_u8s8))
      .impl("low_bit_linear_u8", TORCH_BOX(&low_bit_product_u8<false>))
      .impl("low_bit_linear_float", TORCH_BOX(&low_bit_product_float<false>))
      .impl("low_bit_gated_u8", TORCH_BOX(&low_bit_product_u8<true>))
      .impl("low_bit_gated_float", TORCH_BOX(&low_bit_product_float<true>))
      .impl("low_bit_decode", TORCH_BOX(&low_bit_decode_op))
      .impl("chain", TORCH_BOX(&chain));
}
}
