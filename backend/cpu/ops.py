"""The C++ kernels as PyTorch ops, each with its meaning in plain PyTorch beside it."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, pad, relu, rms_norm, silu

from fxquant.errors import FxquantError
from fxquant.numerics.affine import IntAffine
from fxquant.numerics.granularity import PerToken

from . import build
from .build import library

PANEL = 64  # outputs per panel of packed weights
DEPTH = 64  # inputs are padded to a multiple of it: the depth of an AMX tile
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu", "relu")
NORMS = ("none", "layer", "rms")
Codes = tuple[Tensor, Tensor, Tensor]  # uint8 [..., K padded to 64], scale float32 [..., 1], zero point int32 [..., 1]
Passed = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # and the sum and the normalised rows, of shape [0] unless kept

_library = torch.library.Library("fxquant", "FRAGMENT")
_library.define("quantize_rows_u8(Tensor x, int bits, bool symmetric) -> (Tensor, Tensor, Tensor)")
_library.define(
    "linear_u8s8(Tensor codes, Tensor scale, Tensor zero_point, Tensor weight, Tensor weight_scale, Tensor sums, Tensor? bias, "
    "int out_features, str activation, ScalarType dtype) -> Tensor"
)
_library.define(
    "normalize_rows_u8(Tensor x, Tensor? residual, Tensor? residual_scale, str norm, Tensor? weight, Tensor? bias, float eps, "
    "int bits, bool symmetric, bool keep_sum, bool keep_norm) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "linear_rows_u8s8(Tensor codes, Tensor scale, Tensor zero_point, Tensor weight, Tensor weight_scale, Tensor sums, "
    "Tensor? bias, int out_features, str activation, ScalarType dtype, Tensor? residual, Tensor? residual_scale, str norm, "
    "Tensor? norm_weight, Tensor? norm_bias, float eps, int bits, bool symmetric, bool keep_sum, bool keep_norm) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define("attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool is_causal, float scale) -> Tensor")
_library.define(
    "attend_u8s8(Tensor codes, Tensor scale, Tensor zero_point, Tensor[] weights, Tensor[] weight_scales, Tensor[] sums, "
    "Tensor?[] biases, int heads, ScalarType dtype, Tensor? mask, bool is_causal, float factor, int bits, bool symmetric) "
    "-> (Tensor, Tensor, Tensor)"
)


def pack_panels(codes: Tensor) -> Tensor:
    """Weight codes int8 [N, K] as panels [ceil(N/64), K/4, 64, 4], K padded to 64; zeros where there is nothing."""
    n, k = codes.shape
    codes = pad(codes, (0, -k % DEPTH, 0, -n % PANEL))
    return codes.view(-(n // -PANEL), PANEL, -1, 4).permute(0, 2, 1, 3).contiguous()


def unpack_panels(panels: Tensor, n: int, k: int) -> Tensor:
    """The inverse of ``pack_panels``."""
    return panels.permute(0, 2, 1, 3).reshape(panels.shape[0] * PANEL, -1)[:n, :k]


def quantize_rows_reference(x: Tensor, bits: int, symmetric: bool) -> Codes:
    """[..., K] -> codes uint8 [..., K padded to 64], scale float32 [..., 1], zero point int32 [..., 1].

    Symmetric codes are shifted by 128.
    """
    format = IntAffine(bits, symmetric=symmetric)
    qparams = format.fit(x, PerToken())
    codes = format.encode(x, qparams, PerToken())
    if symmetric:
        codes = (codes.to(torch.int16) + 128).to(torch.uint8)
        zero_point = torch.full_like(qparams.scale, 128, dtype=torch.int32)
    else:
        assert qparams.zero_point is not None
        zero_point = qparams.zero_point
    return pad(codes, (0, -x.shape[-1] % DEPTH)), qparams.scale, zero_point


def normalize_rows_reference(
    x: Tensor,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    bits: int,
    symmetric: bool,
    keep_sum: bool,
    keep_norm: bool,
) -> Passed:
    """``quantize(norm(x + residual * residual_scale))``, with the sum and the norm rounded to the dtype of ``x``.

    ``residual`` [..., K] and its scale [K] have the dtype of ``x``; ``weight`` and ``bias`` of the norm are [K] in any one.
    """
    added = residual if residual is None or residual_scale is None else residual * residual_scale
    total, size = x if added is None else x + added, x.shape[-1:]
    gain, shift = (None if t is None else t.double() for t in (weight, bias))
    wide = total.double()
    if norm == "layer":
        wide = layer_norm(wide, size, gain, shift, eps)
    elif norm == "rms":
        wide = rms_norm(wide, size, gain, eps)
    normed = wide.to(x.dtype)
    kept = (total.clone() if keep_sum else x.new_empty(0), normed if keep_norm else x.new_empty(0))
    return (*quantize_rows_reference(normed, bits, symmetric), *kept)


def linear_reference(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """``act((q_x q_w - z_x sum(q_w)) s_x s_w + b)``: codes [..., K] -> [..., N] in ``dtype``. Exact up to the last line."""
    w = unpack_panels(weight, out_features, codes.shape[-1])
    exact = (codes.to(torch.float64) @ w.t().to(torch.float64)).to(torch.int64) - zero_point.to(torch.int64) * sums
    y = exact.to(torch.float32) * scale * weight_scale
    if bias is not None:
        y = y + bias.to(torch.float32)
    return _activate(y.to(torch.float64), activation).to(dtype)  # PyTorch's own GELU of floats is off by 3.5e-7 |x|


def _activate(y: Tensor, activation: str) -> Tensor:
    if activation == "none":
        return y
    return {"gelu": gelu, "gelu_tanh": lambda t: gelu(t, approximate="tanh"), "silu": silu, "relu": relu}[activation](y)


class _Linear(ctypes.Structure):
    """``struct Linear`` of linear.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "zero")),
        ("per_row", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("weight", "weight_scale", "sums", "bias")),
        ("bias_dtype", ctypes.c_int),
        ("out", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("dtype", "activation")),
        *((name, ctypes.c_int64) for name in ("rows", "outputs", "inner")),
    )


class _Attention(ctypes.Structure):
    """``struct Attention`` of attention.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "mask", "out")),
        *((name, ctypes.c_int) for name in ("dtype", "mask_dtype")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "groups", "length", "keys", "width")),
        *((name, ctypes.c_int64 * 3) for name in ("query_strides", "key_strides", "value_strides")),
        ("mask_strides", ctypes.c_int64 * 4),
        ("row", ctypes.c_int64),
        ("causal", ctypes.c_int),
        ("scale", ctypes.c_float),
    )


class _Rows(ctypes.Structure):
    """``struct Rows`` of rows.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("residual", "scaled_by", "gain", "shift")),
        *((name, ctypes.c_int) for name in ("dtype", "gain_dtype", "norm")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("total", "normed", "codes", "scale", "zero")),
        *((name, ctypes.c_int64) for name in ("inner", "stride")),
        *((name, ctypes.c_int) for name in ("largest", "symmetric")),
    )


def _pass(
    like: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    bits: int,
    symmetric: bool,
    keep_sum: bool,
    keep_norm: bool,
) -> tuple[_Rows, Passed]:
    """What C++ is told of rows of ``shape`` and ``dtype``, and where it writes. Keep the tensors given alive until it has."""
    out = _empty_rows(like, shape, dtype, keep_sum, keep_norm)
    channels = tuple(shape[-1:])
    for given, size in ((residual, tuple(shape)), (residual_scale, channels), (weight, channels), (bias, channels)):
        if given is not None and (tuple(given.shape) != size or not given.is_contiguous()):
            raise FxquantError(f"rows of shape {list(shape)} meet {list(given.shape)}; {list(size)}, contiguous, is needed")
    codes, scale, zero_point, total, normed = (t.data_ptr() for t in out)
    gain_dtype = next((DTYPES[t.dtype] for t in (weight, bias) if t is not None), 0)
    rows = _Rows(
        *(None if t is None else t.data_ptr() for t in (residual, residual_scale, weight, bias)),
        DTYPES[dtype], gain_dtype, NORMS.index(norm), eps,
        total if keep_sum else None, normed if keep_norm else None, codes, scale, zero_point,
        shape[-1], out[0].shape[-1], 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1, symmetric,
    )  # fmt: skip
    return rows, out


def _empty_rows(like: Tensor, shape: Sequence[int], dtype: torch.dtype, keep_sum: bool, keep_norm: bool) -> Passed:
    *lead, inner = shape
    return (
        like.new_empty((*lead, inner + -inner % DEPTH), dtype=torch.uint8),
        like.new_empty((*lead, 1), dtype=torch.float32),
        like.new_empty((*lead, 1), dtype=torch.int32),
        like.new_empty(shape if keep_sum else (0,), dtype=dtype),
        like.new_empty(shape if keep_norm else (0,), dtype=dtype),
    )


def _run_rows(x: Tensor, rows: _Rows, count: int) -> None:
    at = ctypes.c_void_p(x.data_ptr())
    if library().quantize_rows(at, ctypes.c_int64(count), ctypes.byref(rows), torch.get_num_threads()):
        raise MemoryError(f"rows of {x.shape[-1]} numbers need more memory than there is")


def _quantize_rows(x: Tensor, bits: int, symmetric: bool) -> Codes:
    if x.dtype not in DTYPES:
        return quantize_rows_reference(x, bits, symmetric)
    x = x.contiguous()
    rows, out = _pass(x, x.shape, x.dtype, None, None, "none", None, None, 0.0, bits, symmetric, False, False)
    _run_rows(x, rows, out[1].numel())
    return out[:3]


def _normalize_rows(
    x: Tensor,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    *how: Any,
) -> Passed:
    x, given = x.contiguous(), (residual, residual_scale, weight, bias)
    residual, residual_scale, weight, bias = (None if t is None else t.contiguous() for t in given)
    rows, out = _pass(x, x.shape, x.dtype, residual, residual_scale, norm, weight, bias, *how)
    _run_rows(x, rows, out[1].numel())
    return out


def linear_on(isa: str, codes: Tensor, *args: Any) -> Tensor:
    """``linear_reference`` on the instruction set ``isa``: "amx" or "vnni"; the same to the last bit."""
    out_features, _, dtype = args[-3:]
    out = codes.new_empty((*codes.shape[:-1], out_features), dtype=dtype)
    product, _alive = _product(codes, *args)
    product.out = out.data_ptr()
    _multiply(product, None, isa)
    return out


def linear_rows_on(isa: str, codes: Tensor, *args: Any) -> Passed:
    """``normalize_rows_reference`` of ``linear_reference`` on the instruction set ``isa``; the same to the last bit.

    The arguments of the product, and behind them those of the pass over its rows.
    """
    of_product, (residual, residual_scale, norm, weight, bias, *how) = args[:9], args[9:]
    out_features, _, dtype = of_product[-3:]
    given = (residual, residual_scale, weight, bias)
    residual, residual_scale, weight, bias = (None if t is None else t.contiguous() for t in given)
    shape = (*codes.shape[:-1], out_features)
    rows, out = _pass(codes, shape, dtype, residual, residual_scale, norm, weight, bias, *how)
    product, _alive = _product(codes, *of_product)
    _multiply(product, rows, isa)
    return out


def _product(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
    dtype: torch.dtype,
) -> tuple[_Linear, tuple[Tensor | None, ...]]:
    """What C++ is told of a product, but for where it writes, and the tensors that it reads: keep them until it is done."""
    given = (codes, scale, zero_point, weight, weight_scale, sums, bias)
    codes, scale, zero_point, weight, weight_scale, sums = (t.contiguous() for t in given[:6] if t is not None)
    bias = bias.contiguous() if bias is not None else None
    inner = codes.shape[-1]
    rows = codes.numel() // inner
    panels = (-(out_features // -PANEL), inner // 4, PANEL, 4)
    per_output = [t.numel() for t in (weight_scale, sums, bias) if t is not None]
    fits = scale.numel() in (1, rows) and zero_point.numel() == scale.numel()
    if inner % DEPTH or weight.shape != panels or set(per_output) != {out_features} or not fits:
        raise FxquantError(
            f"a product of codes {list(codes.shape)} and panels {list(weight.shape)} to {out_features} outputs, of which "
            f"{per_output} have scale, sum (and bias), {scale.numel()} rows a scale and {zero_point.numel()} a zero point: the "
            "sizes do not agree"
        )
    product = _Linear(
        codes.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), scale.numel() == rows,
        weight.data_ptr(), weight_scale.data_ptr(), sums.data_ptr(),
        None if bias is None else bias.data_ptr(), 0 if bias is None else DTYPES[bias.dtype],
        None, out_features, DTYPES[dtype], ACTIVATIONS.index(activation),
        rows, out_features, inner,
    )  # fmt: skip
    return product, (codes, scale, zero_point, weight, weight_scale, sums, bias)


def _multiply(product: _Linear, passed: _Rows | None, isa: str) -> None:
    given = None if passed is None else ctypes.byref(passed)
    if library().linear(ctypes.byref(product), given, int(isa == "amx"), torch.get_num_threads()):
        raise MemoryError(f"a product of {product.rows} rows and {product.outputs} outputs needs more memory than there is")


def attention_reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """``softmax(q k^T scale + mask) v``: [B, H, L, D], [B, G, T, D] twice -> [B, H, L, D].

    Zeros where a row is masked throughout.
    """
    gqa = query.shape[1] != key.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=gqa
    )


def attention_on(
    isa: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """``attention`` on the instruction set ``isa``: in float32 on "vnni", in pairs of bfloat16 on "amx"."""
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    batch, heads, length, width = query.shape
    groups, keys = key.shape[1:3]
    if key.shape != value.shape or key.shape[0] != batch or key.shape[3] != width or not groups or heads % groups:
        raise FxquantError(f"attention of {list(query.shape)} to {list(key.shape)} and {list(value.shape)}: sizes do not agree")
    mask, mask_dtype, mask_strides = _mask(mask, (batch, heads, length, keys), query.dtype)
    out = query.new_empty((batch, length, heads, width))
    given = _Attention(
        query.data_ptr(), key.data_ptr(), value.data_ptr(), None if mask is None else mask.data_ptr(), out.data_ptr(),
        DTYPES[query.dtype], mask_dtype, batch, heads, groups, length, keys, width,
        *((ctypes.c_int64 * 3)(*t.stride()[:3]) for t in (query, key, value)), mask_strides,
        heads * width, is_causal, scale,
    )  # fmt: skip
    if library().attention(ctypes.byref(given), int(isa == "amx"), torch.get_num_threads()):
        raise MemoryError(f"attention over {keys} keys of width {width} needs more memory than there is")
    return out.transpose(1, 2)


def _mask(mask: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor | None, int, Any]:
    """The mask as [B, H, L, T] that C++ can read, its dtype and strides. Keep it alive until it is read."""
    if mask is None:
        return None, DTYPES[dtype], (ctypes.c_int64 * 4)()
    mask = mask.expand(shape)
    mask = mask if mask.stride(-1) in (0, 1) else mask.contiguous()
    return mask, 3 if mask.dtype is torch.bool else DTYPES[mask.dtype], (ctypes.c_int64 * 4)(*mask.stride())


def attend_reference(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weights: Sequence[Tensor],
    weight_scales: Sequence[Tensor],
    sums: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    heads: int,
    dtype: torch.dtype,
    mask: Tensor | None,
    is_causal: bool,
    factor: float,
    bits: int,
    symmetric: bool,
) -> Codes:
    """``quantize(attention(q, k, v))``, its heads side by side: codes [B, L, K] -> those of [B, L, N].

    q, k and v are ``linear`` of the codes, each with its own weight, ``heads`` heads of N / ``heads``; ``factor`` is what
    attention calls its scale.
    """
    query, key, value = (
        linear_reference(codes, scale, zero_point, weight, weight_scale, total, bias, weight_scale.numel(), "none", dtype)
        .unflatten(-1, (heads, -1))
        .transpose(1, 2)
        for weight, weight_scale, total, bias in zip(weights, weight_scales, sums, biases, strict=True)
    )
    mixed = attention_reference(query, key, value, mask, is_causal, factor)
    return quantize_rows_reference(mixed.transpose(1, 2).flatten(2), bits, symmetric)


def attend_on(
    isa: str,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weights: Sequence[Tensor],
    weight_scales: Sequence[Tensor],
    sums: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    heads: int,
    dtype: torch.dtype,
    mask: Tensor | None,
    is_causal: bool,
    factor: float,
    bits: int,
    symmetric: bool,
) -> Codes:
    """``attend`` on the instruction set ``isa``."""
    batch, length, _ = codes.shape
    outputs = weight_scales[0].numel()
    if outputs % heads:
        raise FxquantError(f"{outputs} outputs do not make {heads} heads; a multiple is needed")
    made = [
        _product(codes, scale, zero_point, *operand, outputs, "none", dtype)
        for operand in zip(weights, weight_scales, sums, biases, strict=True)
    ]
    products = (_Linear * 3)(*(product for product, _ in made))
    shape = (batch, length, outputs)
    rows, out = _pass(codes, shape, dtype, None, None, "none", None, None, 0.0, bits, symmetric, False, False)
    mask, mask_dtype, mask_strides = _mask(mask, (batch, heads, length, length), dtype)
    none = (ctypes.c_int64 * 3)()
    given = _Attention(
        None, None, None, None if mask is None else mask.data_ptr(), None, DTYPES[dtype], mask_dtype,
        batch, heads, heads, length, length, outputs // heads, none, none, none, mask_strides, outputs, is_causal, factor,
    )  # fmt: skip
    operands = (products, ctypes.byref(given), ctypes.byref(rows))
    if batch * length and library().attend(*operands, int(isa == "amx"), torch.get_num_threads()):
        raise MemoryError(f"attention of {length} queries and {outputs} channels needs more memory than there is")
    return out[:3]


def _fake_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    batch, heads, length, width = query.shape
    return query.new_empty((batch, length, heads, width)).transpose(1, 2)


def _fake_quantize_rows(x: Tensor, bits: int, symmetric: bool) -> Codes:
    return _empty_rows(x, x.shape, x.dtype, False, False)[:3]


def _fake_normalize_rows(x: Tensor, *how: Any) -> Passed:
    return _empty_rows(x, x.shape, x.dtype, *how[-2:])


def _fake_linear_rows(codes: Tensor, *args: Any) -> Passed:
    out_features, _, dtype = args[6:9]
    return _empty_rows(codes, (*codes.shape[:-1], out_features), dtype, *args[-2:])


def _fake_linear(codes: Tensor, *args: Any) -> Tensor:
    out_features, _, dtype = args[-3:]
    return codes.new_empty((*codes.shape[:-1], out_features), dtype=dtype)


def _fake_attend(codes: Tensor, *args: Any) -> Codes:
    weight_scales, dtype = args[3], args[7]
    return _empty_rows(codes, (*codes.shape[:-1], weight_scales[0].shape[0]), dtype, False, False)[:3]


def _linear(*args: Any) -> Tensor:
    return linear_on(build.isa(), *args)


def _linear_rows(*args: Any) -> Passed:
    return linear_rows_on(build.isa(), *args)


def _attention(*args: Any) -> Tensor:
    return attention_on(build.isa(), *args)


def _attend(*args: Any) -> Codes:
    return attend_on(build.isa(), *args)


_library.impl("quantize_rows_u8", _quantize_rows, "CPU")
_library.impl("normalize_rows_u8", _normalize_rows, "CPU")
_library.impl("linear_u8s8", _linear, "CPU")
_library.impl("linear_rows_u8s8", _linear_rows, "CPU")
_library.impl("attention", _attention, "CPU")
_library.impl("attend_u8s8", _attend, "CPU")
torch.library.register_fake("fxquant::attention", _fake_attention, lib=_library)
torch.library.register_fake("fxquant::attend_u8s8", _fake_attend, lib=_library)
torch.library.register_fake("fxquant::quantize_rows_u8", _fake_quantize_rows, lib=_library)
torch.library.register_fake("fxquant::normalize_rows_u8", _fake_normalize_rows, lib=_library)
torch.library.register_fake("fxquant::linear_u8s8", _fake_linear, lib=_library)
torch.library.register_fake("fxquant::linear_rows_u8s8", _fake_linear_rows, lib=_library)

quantize_rows = torch.ops.fxquant.quantize_rows_u8.default
normalize_rows = torch.ops.fxquant.normalize_rows_u8.default
linear = torch.ops.fxquant.linear_u8s8.default
linear_rows = torch.ops.fxquant.linear_rows_u8s8.default
attention = torch.ops.fxquant.attention.default
attend = torch.ops.fxquant.attend_u8s8.default
