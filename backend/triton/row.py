"""One pass over each row: add the residual, normalise, quantize per token; what matrix products read is written once.

Codes follow ``numerics.affine.IntAffine(8)`` bit for bit, given the normalised row rounded to the dtype of ``x``. Asymmetric
codes and zero points are stored less 128, so that both fit int8 and the tensor cores need signed operands only:
``x ~ scale * (q - zero_point)`` in either case.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# Kernels are written in Triton's language, which has no types to annotate with.
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.numerics.affine import IntAffine
from fxquant.numerics.granularity import PerToken

from .language import ceil_div, define, launcher, launches, power_of_two, require, rows, tl, triton

Quantized = tuple[Tensor, Tensor, Tensor]  # q int8 [T, D], scale float32 [T, 1], zero_point int32 [T, 1]
Normalized = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # and the residual sum and the normalised rows, or empty tensors

WIDEST, WIDEST_NORM = 32768, 16384
"""The longest row that stays in the registers of 1024 threads, to be quantized or also normalised."""


def reference_quantize(x: Tensor, symmetric: bool) -> Quantized:
    """The truth: IntAffine(8) per token; x: [T, D]."""
    int8 = IntAffine(8, symmetric=symmetric)
    qparams = int8.fit(x, PerToken())
    q = int8.encode(x, qparams, PerToken())
    if qparams.zero_point is None:
        return q, qparams.scale, torch.zeros_like(qparams.scale, dtype=torch.int32)
    return (q.to(torch.int16) - 128).to(torch.int8), qparams.scale, qparams.zero_point - 128


def reference_normalize(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, Tensor]:
    """The truth: the residual sum and its LayerNorm (``centered``) or RMSNorm, in float32, each rounded to the dtype of x."""
    total = x if residual is None else x + residual
    h, size = total.float(), x.shape[-1:]
    if centered:
        y = F.layer_norm(h, size, None if weight is None else weight.float(), None if bias is None else bias.float(), eps)
    else:
        y = F.rms_norm(h, size, None if weight is None else weight.float(), eps)
    return total, y.to(x.dtype)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def quantize_tile(y, SYMMETRIC: tl.constexpr):
    """Codes (int8), scale and zero point of float32 rows y [ROWS, BLOCK], which are 0 beyond their end.

    IntAffine's arithmetic, operation by operation.
    Rounds by adding 1.5 * 2**23, which leaves the nearest integer, halves to even, in the low bits of the mantissa. The clamp
    comes first, which the integer bounds allow: it keeps the product from being fused into that addition.
    """
    MAGIC: tl.constexpr = 12582912.0
    if SYMMETRIC:
        extent = tl.reduce(tl.abs(y), 1, _larger)
        scale = extent * (1 / 127)
    else:
        hi = _larger(tl.reduce(y, 1, _larger), 0.0)  # the range holds 0
        low = _larger(tl.reduce(-y, 1, _larger), 0.0)  # -lo
        extent = _larger(hi, low)
        scale = (hi * 0.5 + low * 0.5) * (2 / 255)
    scale = tl.where(extent == 0.0, 1.0, tl.maximum(scale, 1.1754943508222875e-38))
    scale = tl.where(extent < float("inf"), scale, float("nan"))  # false for NaN too
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    steps = y * inverse[:, None]
    if SYMMETRIC:
        zero = tl.zeros_like(scale).to(tl.int32)
        steps = tl.minimum(tl.maximum(steps, -127.0), 127.0)
        codes = (steps + MAGIC).to(tl.int32, bitcast=True)
    else:
        zero_steps = tl.minimum(tl.maximum(low * inverse, 0.0), 255.0)
        rounded = (zero_steps + MAGIC) - MAGIC
        zero = rounded.to(tl.int32) - 128
        steps = tl.minimum(tl.maximum(steps, -rounded[:, None]), 255.0 - rounded[:, None])
        codes = (steps + MAGIC).to(tl.int32, bitcast=True) + zero[:, None]
    return codes.to(tl.int8), scale, zero


@triton.jit
def row_kernel(
    x, residual, weight, bias, q, scale, zero_point, total, normed,
    T, D, stride_x, stride_residual, eps,
    NORM: tl.constexpr, CENTERED: tl.constexpr, SYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)
    inside = (t < T)[:, None] & (d < D)[None, :]
    far = t.to(tl.int64)[:, None]
    dtype = x.dtype.element_ty
    y = tl.load(x + far * stride_x + d[None, :], mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        y += tl.load(residual + far * stride_residual + d[None, :], mask=inside, other=0.0).to(tl.float32)
        y = y.to(dtype).to(tl.float32)  # as an addition outside would have rounded
    if total is not None:
        tl.store(total + far * D + d[None, :], y.to(dtype), mask=inside)
    if NORM:
        if CENTERED:
            y = tl.where(inside, y - (tl.sum(y, 1) / D)[:, None], 0.0)
        y *= tl.rsqrt(tl.sum(y * y, 1) / D + eps)[:, None]
        if weight is not None:
            y *= tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        if bias is not None:
            y += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        y = y.to(dtype).to(tl.float32)
        if normed is not None:
            tl.store(normed + far * D + d[None, :], y.to(dtype), mask=inside)
    codes, row_scale, row_zero = quantize_tile(y, SYMMETRIC)
    tl.store(q + far * D + d[None, :], codes, mask=inside)
    tl.store(scale + t, row_scale, mask=t < T)
    tl.store(zero_point + t, row_zero, mask=t < T)


def shape_of(D: int) -> tuple[int, int, int]:
    """ROWS, BLOCK and warps for rows of D: 16 numbers for each thread, at least four warps, one to 16 rows in a program."""
    block = power_of_two(max(D, 32))
    count = max(1, min(16, 2048 // block))
    return count, block, max(4, min(32, count * block // 512))


def launch_rows(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    norm: bool,
    centered: bool,
    symmetric: bool,
    keep_sum: bool,
    keep_norm: bool,
) -> Normalized:
    """Launch ``row_kernel``; arguments as in ``layer_norm_quantize``, ``norm`` False to quantize x as it is."""
    x = rows(x)
    residual = None if residual is None else rows(residual)
    weight, bias = (None if v is None else v.contiguous() for v in (weight, bias))
    T, D = x.shape
    q = x.new_empty((T, D), dtype=torch.int8)
    scale = x.new_empty((T, 1), dtype=torch.float32)
    zero_point = x.new_empty((T, 1), dtype=torch.int32)
    total = x.new_empty((T, D)) if keep_sum else None
    normed = x.new_empty((T, D)) if keep_norm else None
    count, block, warps = shape_of(D)
    launcher(row_kernel)[(ceil_div(T, count),)](
        x, residual, weight, bias, q, scale, zero_point, total, normed,
        T, D, x.stride(0), 0 if residual is None else residual.stride(0), eps,
        NORM=norm, CENTERED=centered, SYMMETRIC=symmetric, ROWS=count, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return (
        q, scale, zero_point,
        x.new_empty(0) if total is None else total, x.new_empty(0) if normed is None else normed,
    )  # fmt: skip


def _quantize_rows(x: Tensor, symmetric: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize x [T, D] per token: q int8 [T, D], scale float32 [T, 1], zero_point int32 [T, 1] (0 if symmetric).

    >>> q, scale, zero_point = quantize_rows(torch.tensor([[-1.0, 0.5]]))       # doctest: +SKIP
    >>> q                                                                       # doctest: +SKIP
    tensor([[-127,   64]], dtype=torch.int8)
    """
    _check(x, None, None, None)
    if _refers(x, WIDEST):
        return reference_quantize(x, symmetric)
    q, scale, zero_point, _, _ = launch_rows(x, None, None, None, 0.0, False, False, symmetric, False, False)
    return q, scale, zero_point


def _layer_norm_quantize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    symmetric: bool = True,
    keep_sum: bool = False,
    keep_norm: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Quantize LayerNorm(x + residual) per token: q, scale, zero_point, x + residual, LayerNorm.

    x, residual: float32, float16 or bfloat16 [T, D]; weight, bias: [D]. The last two results have the dtype of x, and are
    empty, of shape [0], unless ``keep_sum`` (a pre-norm block reads the sum again) or ``keep_norm`` (a post-norm block reads
    the norm again).
    """
    return _norm(x, residual, weight, bias, eps, True, symmetric, keep_sum, keep_norm)


def _rms_norm_quantize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    symmetric: bool = True,
    keep_sum: bool = False,
    keep_norm: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``layer_norm_quantize`` for RMSNorm: no mean, no bias."""
    return _norm(x, residual, weight, None, eps, False, symmetric, keep_sum, keep_norm)


def _norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centered: bool,
    symmetric: bool,
    keep_sum: bool,
    keep_norm: bool,
) -> Normalized:
    _check(x, residual, weight, bias)
    if not _refers(x, WIDEST_NORM):
        return launch_rows(x, residual, weight, bias, eps, True, centered, symmetric, keep_sum, keep_norm)
    total, y = reference_normalize(x, residual, weight, bias, eps, centered)
    q, scale, zero_point = reference_quantize(y, symmetric)
    kept_sum = total.clone(memory_format=torch.contiguous_format) if keep_sum else x.new_empty(0)
    return q, scale, zero_point, kept_sum, y.contiguous() if keep_norm else x.new_empty(0)


def _refers(x: Tensor, widest: int) -> bool:
    """True where the plain meaning runs: off the GPU, and for rows that no block of threads can hold."""
    return not launches(x) or x.shape[1] > widest


def _check(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
    require(
        x.dim() == 2 and x.dtype in (torch.float32, torch.float16, torch.bfloat16),
        f"rows to be quantized are float32, float16 or bfloat16 [T, D], not {x.dtype} {list(x.shape)}",
    )
    require(
        residual is None or (residual.shape == x.shape and residual.dtype == x.dtype),
        f"the residual of rows {x.dtype} {list(x.shape)} must be the same, "
        f"not {None if residual is None else (residual.dtype, list(residual.shape))}",
    )
    for name, vector in (("weight", weight), ("bias", bias)):
        require(vector is None or vector.shape == x.shape[1:], f"the {name} of rows of {x.shape[1]} must be [{x.shape[1]}]")


quantize_rows = define("quantize_rows", _quantize_rows)
layer_norm_quantize = define("layer_norm_quantize", _layer_norm_quantize)
rms_norm_quantize = define("rms_norm_quantize", _rms_norm_quantize)
