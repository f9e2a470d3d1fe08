"""int8 times int8 into int32 on the tensor cores, with scales, zero points, bias, activation and residual on the way out.

    y  =  act((q_x q_w^T  -  zero_x row_sum_w) (scale_x scale_w)  +  bias)  +  residual

The integer part is exact; the rest is float32, rounded once. Weights lie as [N, K], K contiguous: the other order costs Hopper
its asynchronous copies and doubles the inner loop.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# Kernels are written in Triton's language, which has no types to annotate with.
from __future__ import annotations

import torch
from torch import Tensor

from . import launch
from .epilogue import ACTIVATIONS, add_parts, finish, rescale, store_output
from .language import ceil_div, define, launches, require, rows, tl, triton, wrap_triton

MAX_K = 65536
"""|sum (q_x - zero_x) q_w| <= 255 * 128 * K stays below 2**31."""


def reference(
    q_x: Tensor,
    q_w: Tensor,
    scale_x: Tensor,
    zero_x: Tensor | None,
    scale_w: Tensor,
    row_sum_w: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """The truth: shapes and dtypes as in ``int8_gemm``; float64 holds every sum of the integer part exactly."""
    acc = (q_x.double() @ q_w.double().T).to(torch.int32)
    if zero_x is not None and row_sum_w is not None:
        acc = acc - zero_x * row_sum_w
    return finish(acc.float() * (scale_x * scale_w), bias, residual, activation, dtype)


@triton.jit
def int8_gemm_kernel(
    x, weight, out, parts, scale_x, zero_x, scale_w, row_sum_w, bias, residual,
    M, N, K, stride_x, stride_w, stride_out, stride_residual,
    ACTIVATION: tl.constexpr, PARTS: tl.constexpr, EVEN_K: tl.constexpr, WEIGHT_LEFT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    # Programs walk down bands of BAND tiles of rows, so that neighbours in time share weight tiles in the L2 cache.
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    program = tl.program_id(0)
    band = program // (BAND * tiles_n)
    height = tl.minimum(tiles_m - band * BAND, BAND)
    m = (band * BAND + (program % (BAND * tiles_n)) % height) * BM + tl.arange(0, BM)
    n = ((program % (BAND * tiles_n)) // height) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)

    # Rows beyond the edge read the last row instead of a mask: loads stay wide, and what they compute is not stored.
    x_rows = x + tl.minimum(m, M - 1).to(tl.int64)[:, None] * stride_x + k[None, :]
    w_rows = weight + tl.minimum(n, N - 1).to(tl.int64)[:, None] * stride_w + k[None, :]
    steps = tl.cdiv(K, BK)
    share = tl.cdiv(steps, PARTS)
    part = tl.program_id(1)
    first = part * share

    acc = tl.zeros((BN, BM) if WEIGHT_LEFT else (BM, BN), dtype=tl.int32)
    x_rows += first * BK
    w_rows += first * BK
    for step in range(first, tl.minimum(first + share, steps)):
        if EVEN_K:
            x_tile = tl.load(x_rows)
            w_tile = tl.load(w_rows)
        else:
            x_tile = tl.load(x_rows, mask=k[None, :] < K - step * BK, other=0)
            w_tile = tl.load(w_rows, mask=k[None, :] < K - step * BK, other=0)
        if WEIGHT_LEFT:
            acc = tl.dot(w_tile, tl.trans(x_tile), acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(x_tile, tl.trans(w_tile), acc, out_dtype=tl.int32)
        x_rows += BK
        w_rows += BK
    if WEIGHT_LEFT:
        acc = tl.trans(acc)

    if parts is None:
        y = rescale(acc, scale_x, zero_x, scale_w, row_sum_w, m, n, M, N)
        store_output(y, out, bias, residual, m, n, M, N, stride_out, stride_residual, ACTIVATION)
    else:
        here = parts + part * M * N + m[:, None] * N + n[None, :]
        tl.store(here, acc, mask=(m < M)[:, None] & (n < N)[None, :])


def launch_int8_gemm(
    q_x: Tensor,
    q_w: Tensor,
    scale_x: Tensor,
    zero_x: Tensor | None,
    scale_w: Tensor,
    row_sum_w: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    tile: launch.Tile,
    count: int,
) -> Tensor:
    """Launch with ``tile`` and K in ``count`` parts; everything else as in ``int8_gemm``."""
    (M, K), N = q_x.shape, q_w.shape[0]
    q_x, q_w = rows(q_x), rows(q_w)
    residual = None if residual is None else rows(residual)
    scale_x, scale_w = scale_x.contiguous(), scale_w.contiguous()
    zero_x, row_sum_w, bias = (None if v is None else v.contiguous() for v in (zero_x, row_sum_w, bias))
    out = q_x.new_empty((M, N), dtype=dtype)
    parts = None if count == 1 else q_x.new_empty((count, M, N), dtype=torch.int32)
    wrap_triton(int8_gemm_kernel)[(ceil_div(M, tile.bm) * ceil_div(N, tile.bn), count)](
        q_x, q_w, out if parts is None else None, parts, scale_x, zero_x, scale_w, row_sum_w, bias, residual,
        M, N, K, q_x.stride(0), q_w.stride(0), out.stride(0), 0 if residual is None else residual.stride(0),
        ACTIVATION=activation, PARTS=count, EVEN_K=K % tile.bk == 0, WEIGHT_LEFT=tile.weight_left,
        BM=tile.bm, BN=tile.bn, BK=tile.bk, BAND=8, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if parts is not None:
        add_parts(parts, out, (scale_x, zero_x, scale_w, row_sum_w), bias, residual, activation)
    return out


def _int8_gemm(
    q_x: Tensor,
    q_w: Tensor,
    scale_x: Tensor,
    zero_x: Tensor | None,
    scale_w: Tensor,
    row_sum_w: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """act((q_x q_w^T - zero_x row_sum_w) (scale_x scale_w) + bias) + residual, [M, N] in ``out_dtype``.

    q_x: int8 [M, K]; q_w: int8 [N, K]; scale_x: float32 [M, 1]; zero_x: int32 [M, 1]; scale_w: float32 [N];
    row_sum_w: int32 [N], the sum of each row of q_w, needed with zero_x; bias: [N]; residual: [M, N];
    activation: a key of ``epilogue.ACTIVATIONS``. Raises KernelError for other shapes or dtypes.
    """
    _check(q_x, q_w, scale_x, zero_x, scale_w, row_sum_w, bias, residual, activation)
    if not launches(q_x):
        return reference(q_x, q_w, scale_x, zero_x, scale_w, row_sum_w, bias, residual, activation, out_dtype)
    (M, K), N = q_x.shape, q_w.shape[0]
    on = launch.device(q_x.device.index)
    tile = launch.int8_tile(M, on)
    count = launch.parts(N, ceil_div(K, tile.bk), tile, on)
    return launch_int8_gemm(
        q_x, q_w, scale_x, zero_x, scale_w, row_sum_w, bias, residual, activation, out_dtype, tile, count
    )


def _check(
    q_x: Tensor,
    q_w: Tensor,
    scale_x: Tensor,
    zero_x: Tensor | None,
    scale_w: Tensor,
    row_sum_w: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> None:
    require(
        q_x.dim() == 2 and q_w.dim() == 2 and q_x.shape[1] == q_w.shape[1],
        f"int8_gemm takes codes [M, K] and [N, K], not {list(q_x.shape)} and {list(q_w.shape)}",
    )
    require(
        q_x.dtype == q_w.dtype == torch.int8, f"int8_gemm takes int8 codes, not {q_x.dtype} and {q_w.dtype}"
    )
    (M, K), N = q_x.shape, q_w.shape[0]
    require(0 < K <= MAX_K, f"int8_gemm sums K = {K} products in 32 bits; 1 to {MAX_K} are exact")
    require(
        scale_x.shape == (M, 1) and scale_w.shape == (N,),
        f"int8_gemm takes scales [{M}, 1] and [{N}], not {list(scale_x.shape)} and {list(scale_w.shape)}",
    )
    require(
        zero_x is None or (zero_x.shape == (M, 1) and row_sum_w is not None and row_sum_w.shape == (N,)),
        f"zero points of activations must be [{M}, 1] and need the weight's row sums, [{N}]",
    )
    require(bias is None or bias.shape == (N,), f"the bias of {N} outputs must be [{N}]")
    require(residual is None or residual.shape == (M, N), f"the residual of this product must be [{M}, {N}]")
    require(
        activation in ACTIVATIONS, f"there is no activation {activation!r}; known: {', '.join(map(repr, ACTIVATIONS))}"
    )


int8_gemm = define("int8_gemm", _int8_gemm)
