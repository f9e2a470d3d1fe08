"""The C++ kernels as PyTorch ops, each with its meaning in plain PyTorch beside it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, pad, relu, rms_norm, silu
from torch.utils._pytree import tree_leaves

from fxquant.numerics.affine import IntAffine
from fxquant.numerics.granularity import PerToken

from . import build

PANEL = 64  # outputs per panel of packed weights
DEPTH = 64  # inputs are padded to a multiple of it: the depth of an AMX tile
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu", "relu")
NORMS = ("none", "layer", "rms")
Codes = tuple[Tensor, Tensor, Tensor]  # uint8 [..., K padded to 64], scale float32 [..., 1], zero point int32 [..., 1]
Passed = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # and the sum and the normalised rows, of shape [0] unless kept


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

    Symmetric codes are shifted by 128. A row that is not finite has a scale of NaN, and any codes.
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
    return activate(y.to(torch.float64), activation).to(dtype)  # PyTorch's own GELU of floats is off by 3.5e-7 |x|


def linear_gated_reference(
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
    bits: int,
    symmetric: bool,
) -> Codes:
    """``quantize(act(gate) * up)`` of a product with both: ``out_features``, whole panels, are the gate, and as many are up."""
    shifts = (None, None) if bias is None else bias.chunk(2)
    halves = zip(weight.chunk(2), weight_scale.chunk(2), sums.chunk(2), shifts, (activation, "none"), strict=True)
    gate, up = (
        linear_reference(codes, scale, zero_point, panels, s, total, shift, out_features, applied, dtype)
        for panels, s, total, shift, applied in halves
    )
    return quantize_rows_reference(gate * up, bits, symmetric)


def activate(y: Tensor, activation: str) -> Tensor:
    """``activation``, one of ACTIVATIONS, of ``y``."""
    if activation == "none":
        return y
    return {"gelu": gelu, "gelu_tanh": lambda t: gelu(t, approximate="tanh"), "silu": silu, "relu": relu}[activation](y)


def _empty_rows(like: Tensor, shape: Sequence[int], dtype: torch.dtype, keep_sum: bool, keep_norm: bool) -> Passed:
    *lead, inner = shape
    return (
        like.new_empty((*lead, inner + -inner % DEPTH), dtype=torch.uint8),
        like.new_empty((*lead, 1), dtype=torch.float32),
        like.new_empty((*lead, 1), dtype=torch.int32),
        like.new_empty(shape if keep_sum else (0,), dtype=dtype),
        like.new_empty(shape if keep_norm else (0,), dtype=dtype),
    )


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


def _fake_linear_gated(codes: Tensor, *args: Any) -> Codes:
    out_features, _, dtype = args[6:9]
    return _empty_rows(codes, (*codes.shape[:-1], out_features), dtype, False, False)[:3]


def _fake_linear(codes: Tensor, *args: Any) -> Tensor:
    out_features, _, dtype = args[-3:]
    return codes.new_empty((*codes.shape[:-1], out_features), dtype=dtype)


def _fake_attend(codes: Tensor, *args: Any) -> Codes:
    weight_scales, dtype = args[3], args[7]
    return _empty_rows(codes, (*codes.shape[:-1], weight_scales[0].shape[0]), dtype, False, False)[:3]


def declare(library: torch.library.Library, schema: str, fake: Callable[..., Any]) -> Any:
    """The op of a schema, whose kernel for CPU tensors comes with the C++ library, which the first call builds if need be."""
    name = library.define(schema)

    def build_and_call(*args: Any) -> Any:
        tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
        if not tensors or any(t.device.type != "cpu" or t.layout != torch.strided for t in tensors):
            raise NotImplementedError(f"fxquant::{name} is for CPU tensors, with strides")
        build.library()
        return op(*args)

    library.impl(name, build_and_call, "CompositeExplicitAutograd")  # behind the kernel for CPU tensors, once there is one
    torch.library.register_fake(f"fxquant::{name}", fake, lib=library)
    op = getattr(torch.ops.fxquant, name).default
    return op


_library = torch.library.Library("fxquant", "FRAGMENT")
quantize_rows = declare(
    _library,
    "quantize_rows_u8(Tensor x, int bits, bool symmetric) -> (Tensor, Tensor, Tensor)",
    _fake_quantize_rows,
)
linear = declare(
    _library,
    "linear_u8s8(Tensor codes, Tensor scale, Tensor zero_point, Tensor weight, Tensor weight_scale, Tensor sums, Tensor? bias, "
    "int out_features, str activation, ScalarType dtype) -> Tensor",
    _fake_linear,
)
normalize_rows = declare(
    _library,
    "normalize_rows_u8(Tensor x, Tensor? residual, Tensor? residual_scale, str norm, Tensor? weight, Tensor? bias, float eps, "
    "int bits, bool symmetric, bool keep_sum, bool keep_norm) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_normalize_rows,
)
linear_rows = declare(
    _library,
    "linear_rows_u8s8(Tensor codes, Tensor scale, Tensor zero_point, Tensor weight, Tensor weight_scale, Tensor sums, "
    "Tensor? bias, int out_features, str activation, ScalarType dtype, Tensor? residual, Tensor? residual_scale, str norm, "
    "Tensor? norm_weight, Tensor? norm_bias, float eps, int bits, bool symmetric, bool keep_sum, bool keep_norm) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_linear_rows,
)
linear_gated = declare(
    _library,
    "linear_gated_u8s8(Tensor codes, Tensor scale, Tensor zero_point, Tensor weight, Tensor weight_scale, Tensor sums, "
    "Tensor? bias, int out_features, str activation, ScalarType dtype, int bits, bool symmetric) -> (Tensor, Tensor, Tensor)",
    _fake_linear_gated,
)
attention = declare(
    _library,
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool is_causal, float scale) -> Tensor",
    _fake_attention,
)
attend = declare(
    _library,
    "attend_u8s8(Tensor codes, Tensor scale, Tensor zero_point, Tensor[] weights, Tensor[] weight_scales, Tensor[] sums, "
    "Tensor?[] biases, int heads, ScalarType dtype, Tensor? mask, bool is_causal, float factor, int bits, bool symmetric) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_attend,
)
