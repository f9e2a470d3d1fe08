"""What a matrix product still does in registers before it stores: bias, activation, residual, cast."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# Kernels are written in Triton's language, which has no types to annotate with.
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .language import ceil_div, tl, triton, wrap_triton

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


def finish(
    y: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, activation: str, dtype: torch.dtype
) -> torch.Tensor:
    """The meaning of ``store_output``: ``act(y + bias) + residual`` in float32, rounded once to ``dtype``."""
    y = y.float()
    if bias is not None:
        y = y + bias.float()
    y = ACTIVATIONS[activation](y)
    if residual is not None:
        y = y + residual.float()
    return y.to(dtype)


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh z) == sigmoid(2 z): one exponential, and no cancellation where tanh is near -1
        z = 0.7978845608028654 * y * (1.0 + 0.044715 * y * y)
        y = y / (1.0 + tl.exp(-2.0 * z))
    elif ACTIVATION == "silu":
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit
def store_output(
    y, out, bias, residual, m, n, M, N, stride_out, stride_residual, ACTIVATION: tl.constexpr
):
    """Store act(y + bias) + residual; y: float32 [BM, BN] at rows m and columns n of an [M, N] result."""
    inside = (m < M)[:, None] & (n < N)[None, :]
    far = m.to(tl.int64)[:, None]
    if bias is not None:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y = activate(y, ACTIVATION)
    if residual is not None:
        y += tl.load(residual + far * stride_residual + n[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + far * stride_out + n[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rescale(acc, scale_x, zero_x, scale_w, row_sum_w, m, n, M, N):
    """(acc - zero_x row_sum_w) (scale_x scale_w): int32 [BM, BN] to float32; exact in the integer part."""
    if zero_x is not None:
        zero = tl.load(zero_x + m, mask=m < M, other=0)
        row_sum = tl.load(row_sum_w + n, mask=n < N, other=0)
        acc -= zero[:, None] * row_sum[None, :]
    left = tl.load(scale_x + m, mask=m < M, other=0.0)
    right = tl.load(scale_w + n, mask=n < N, other=0.0)
    return acc.to(tl.float32) * (left[:, None] * right[None, :])


@triton.jit
def add_parts_kernel(
    parts, out, scale_x, zero_x, scale_w, row_sum_w, bias, residual, M, N, stride_out, stride_residual,
    PARTS: tl.constexpr, ACTIVATION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Sum PARTS partial products [PARTS, M, N] in their order, then the epilogue; the same answer on every run."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (m < M)[:, None] & (n < N)[None, :]
    here = parts + m.to(tl.int64)[:, None] * N + n[None, :]
    acc = tl.zeros((BM, BN), dtype=parts.dtype.element_ty)
    for part in tl.static_range(PARTS):
        acc += tl.load(here + part * M * N, mask=inside, other=0)
    y = acc
    if scale_x is not None:
        y = rescale(acc, scale_x, zero_x, scale_w, row_sum_w, m, n, M, N)
    store_output(y, out, bias, residual, m, n, M, N, stride_out, stride_residual, ACTIVATION)


def add_parts(
    parts: torch.Tensor,
    out: torch.Tensor,
    scales: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
) -> None:
    """Launch ``add_parts_kernel``: parts int32 or float32 [PARTS, M, N]; scales: scale_x, zero_x, scale_w, row_sum_w."""
    M, N = out.shape
    BM, BN = 4, 256
    wrap_triton(add_parts_kernel)[(ceil_div(M, BM), ceil_div(N, BN))](
        parts, out, *scales, bias, residual, M, N, out.stride(0), 0 if residual is None else residual.stride(0),
        PARTS=parts.shape[0], ACTIVATION=activation, BM=BM, BN=BN, num_warps=4,
    )  # fmt: skip
