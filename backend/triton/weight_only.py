"""Four- and eight-bit weights times 16-bit activations: codes become 16-bit floats in registers, on the left of the product.

Four-bit codes lie in int16 words, four *slices* of K side by side (``numerics.packing.pack_slices``), so that one shift and one
three-input logic operation turn two codes into two floats. They arrive as ``offset + code`` (the offset is a bit pattern, not an
addition), and the offset leaves together with the zero point, once per group, through the sums of the activations:

    y[m, n]  =  sum_g scale[g, n] (sum_k x[m, k] (offset + code[n, k])  -  (offset + zero_point[g, n]) sum_k x[m, k])
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.numerics.packing import pack_slices, unpack_slices

from . import launch
from .epilogue import ACTIVATIONS, add_parts, finish, store_output
from .language import INTERPRETED, ceil_div, define, launches, require, rows, tl, triton, wrap_triton

SLICES = 4
"""Four-bit codes in one int16 word."""

OFFSET = {torch.bfloat16: 128, torch.float16: 1024}
"""The power of two whose last mantissa bits hold a code."""


def pack_weight(codes: Tensor, width: int) -> Tensor:
    """Four-bit codes [N, K] (int8 -7..7 or uint8 0..15) as int16 [N, ceil(K / 4 width) width]; filled up with code 0."""
    return pack_slices(F.pad(codes, (0, -codes.shape[1] % (SLICES * width))), 4, width, SLICES)


def reference(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    """The truth: ``scale (codes - zero_point)`` multiplied in float32 and rounded once; codes: [N, K], of any integer dtype."""
    group = torch.arange(codes.shape[1], device=codes.device) // group_size
    weight = codes.float() if zero_point is None else codes.float() - zero_point.float()[group].T
    return finish(x.float() @ (weight * scale.float()[group].T).T, bias, residual, activation, x.dtype)


@triton.constexpr_function
def _widening(slice, signed, dtype):
    """PTX that turns slice ``slice`` of two int16 words into two floats; ``a & 15 ^ c``, lop3 0x6a, also biases signed codes."""
    bits = (0x4300 if dtype == tl.bfloat16 else 0x6400) + (8 if signed else 0)
    shift = f"shr.b32 t, $1, {4 * slice};" if slice else "mov.b32 t, $1;"
    return "{ .reg .b32 t; " + shift + f" lop3.b32 $0, t, 0x000f000f, 0x{bits:04x}{bits:04x}, 0x6a; " + "}"


@triton.jit
def widen(word, like, SLICE: tl.constexpr, SLICES: tl.constexpr, SIGNED: tl.constexpr, INTERPRET: tl.constexpr):
    """One slice as floats of the dtype of ``like``: offset + code, 8 more for signed four-bit codes; int8 codes as they are."""
    if SLICES == 1:
        return word.to(like.dtype)
    elif INTERPRET:
        codes = (word.to(tl.int32) >> (4 * SLICE)) & 15
        return ((codes ^ (8 if SIGNED else 0)) + 1024).to(like.dtype)
    else:
        asm: tl.constexpr = _widening(SLICE, SIGNED, like.dtype)
        return tl.inline_asm_elementwise(asm, "=r,r", [word], dtype=like.dtype, is_pure=True, pack=2)


@triton.jit
def weight_only_kernel(
    x, weight, out, parts, scale, zero_point, sums, bias, residual,
    M, N, K, stride_x, stride_w, stride_out, stride_residual, blocks, chunks,
    ACTIVATION: tl.constexpr, PARTS: tl.constexpr, EVEN_K: tl.constexpr, INTERPRET: tl.constexpr,
    OFFSET: tl.constexpr, SLICES: tl.constexpr, SLICES_PER_CHUNK: tl.constexpr, CHUNKS_PER_GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    k = tl.arange(0, WIDTH)
    share = tl.cdiv(blocks, PARTS)
    first = part * share

    # Rows beyond the edge read the last row instead of a mask: loads stay wide, and what they compute is not stored.
    n_in = tl.minimum(n, N - 1)
    m_in = tl.minimum(m, M - 1)
    x_rows = x + m_in.to(tl.int64)[:, None] * stride_x + k[None, :]
    w_rows = weight + n_in.to(tl.int64)[:, None] * stride_w + k[None, :]
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for block in range(first, tl.minimum(first + share, blocks)):
        words = tl.load(w_rows + block * WIDTH)
        product = tl.zeros((BN, BM), dtype=tl.float32)
        for j in tl.static_range(SLICES):
            base = (block * SLICES + j) * WIDTH
            if EVEN_K:
                x_tile = tl.load(x_rows + base)
            else:
                x_tile = tl.load(x_rows + base, mask=k[None, :] < K - base, other=0.0)
            w_tile = widen(words, x_tile, j, SLICES, zero_point is None, INTERPRET)
            product = tl.dot(w_tile, tl.trans(x_tile), product)
            if (j + 1) % SLICES_PER_CHUNK == 0:
                chunk = block * (SLICES // SLICES_PER_CHUNK) + j // SLICES_PER_CHUNK
                here = (chunk // CHUNKS_PER_GROUP) * N + n_in
                if sums is not None:
                    zero = OFFSET
                    if zero_point is not None:
                        zero = OFFSET + tl.load(zero_point + here).to(tl.float32)[:, None]
                    product -= zero * tl.load(sums + m_in * chunks + chunk)[None, :]
                acc += tl.load(scale + here).to(tl.float32)[:, None] * product
                product = tl.zeros((BN, BM), dtype=tl.float32)
    y = tl.trans(acc)
    if PARTS == 1:
        store_output(y, out, bias, residual, m, n, M, N, stride_out, stride_residual, ACTIVATION)
    else:
        here = parts + part * M * N + m[:, None] * N + n[None, :]
        tl.store(here, y, mask=(m < M)[:, None] & (n < N)[None, :])


def launch_weight_only(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    slices: int,
    width: int,
    activation: str,
    residual: Tensor | None,
    tile: launch.Tile,
    count: int,
) -> Tensor:
    """Launch with ``tile`` and K in ``count`` parts; ``slices`` of ``width`` codes share a word of ``weight``."""
    (M, K), N = x.shape, weight.shape[0]
    x, weight, scale = rows(x), rows(weight), scale.contiguous()
    zero_point = None if zero_point is None else zero_point.contiguous()
    residual = None if residual is None else rows(residual)
    block = slices * width
    blocks = ceil_div(K, block)
    group = blocks * block if group_size >= K else group_size
    chunk = min(group, block)
    chunks = blocks * block // chunk
    offset = 0 if slices == 1 else OFFSET.get(x.dtype, 1024) + (8 if zero_point is None else 0)
    sums = None
    if offset or zero_point is not None:  # Inductor fuses this with whatever made x
        sums = F.pad(x.float(), (0, blocks * block - K)).view(M, chunks, chunk).sum(-1)
    out = x.new_empty((M, N))
    parts = out if count == 1 else x.new_empty((count, M, N), dtype=torch.float32)
    wrap_triton(weight_only_kernel)[(ceil_div(N, tile.bn), count, ceil_div(M, tile.bm))](
        x, weight, out, parts, scale, zero_point, sums, bias, residual,
        M, N, K, x.stride(0), weight.stride(0), out.stride(0), 0 if residual is None else residual.stride(0), blocks, chunks,
        ACTIVATION=activation, PARTS=count, EVEN_K=K % block == 0, INTERPRET=INTERPRETED,
        OFFSET=offset, SLICES=slices, SLICES_PER_CHUNK=chunk // width, CHUNKS_PER_GROUP=group // chunk,
        BM=tile.bm, BN=tile.bn, WIDTH=width, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if count > 1:
        add_parts(parts, out, (None, None, None, None), bias, residual, activation)
    return out


def _w4a16_gemm(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    group_size: int = 128,
    width: int = 64,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """act(x (scale (codes - zero_point))^T + bias) + residual, [M, N] in the dtype of x.

    x: float16 or bfloat16 [M, K]; packed: int16 [N, ceil(K / 4 width) width] from ``pack_weight``, signed codes without
    zero_point and codes 0..15 with it; scale, zero_point: [ceil(K / group_size), N]; bias: [N]; residual: [M, N].
    Raises KernelError for other shapes or dtypes, and for groups and slices of which neither divides the other.
    """
    (M, K), N = _check(x, packed, scale, zero_point, bias, group_size, activation, residual), packed.shape[0]
    block = SLICES * width
    require(
        packed.dtype == torch.int16 and packed.shape[1] == ceil_div(K, block) * width,
        f"{N} rows of {K} four-bit codes in slices of {width} are int16 [{N}, {ceil_div(K, block) * width}], "
        f"not {packed.dtype} {list(packed.shape)}",
    )
    fits = group_size >= K or group_size % block == 0 or (block % group_size == 0 and group_size % width == 0)
    require(fits, f"groups of {group_size} and words of {SLICES} slices of {width} overlap; pack with a width of {group_size // 4}")
    if not launches(x):
        codes = unpack_slices(packed, 4, width, SLICES, signed=zero_point is None)[:, :K]
        return reference(x, codes, scale, zero_point, bias, group_size, activation, residual)
    return _launch(x, packed, scale, zero_point, bias, group_size, SLICES, width, activation, residual)


def _w8a16_gemm(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    group_size: int = 1 << 30,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """As ``w4a16_gemm`` with int8 codes [N, K]; one group per row unless told, else a multiple of 32."""
    (_, K), N = _check(x, codes, scale, zero_point, bias, group_size, activation, residual), codes.shape[0]
    require(
        codes.dtype == torch.int8 and codes.shape[1] == K,
        f"w8a16_gemm takes int8 codes [{N}, {K}], not {codes.dtype} {list(codes.shape)}",
    )
    width = next((w for w in (128, 64, 32) if group_size >= K or group_size % w == 0), 0)
    require(width > 0, f"a group of {group_size} weights is no multiple of 32, the least step of the kernel")
    if not launches(x):
        return reference(x, codes, scale, zero_point, bias, group_size, activation, residual)
    return _launch(x, codes, scale, zero_point, bias, group_size, 1, width, activation, residual)


def _launch(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    slices: int,
    width: int,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    (M, K), N = x.shape, weight.shape[0]
    tile = launch.weight_only_tile(M)
    count = launch.parts(M, N, ceil_div(K, slices * width), tile, launch.device(x.device.index))
    return launch_weight_only(
        x, weight, scale, zero_point, bias, group_size, slices, width, activation, residual, tile, count
    )


def _check(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    activation: str,
    residual: Tensor | None,
) -> tuple[int, int]:
    require(x.dim() == 2 and weight.dim() == 2, f"a product takes matrices, not {list(x.shape)} and {list(weight.shape)}")
    (M, K), N = x.shape, weight.shape[0]
    groups = ceil_div(K, group_size)
    require(
        x.device.type != "cuda" or x.dtype in OFFSET,
        f"the activations are {x.dtype}; the kernel multiplies in torch.float16 or torch.bfloat16",
    )
    require(
        scale.shape == (groups, N) and (zero_point is None or zero_point.shape == (groups, N)),
        f"{groups} groups of {group_size} weights and {N} outputs have scales and zero points [{groups}, {N}], "
        f"not {list(scale.shape)}" + ("" if zero_point is None else f" and {list(zero_point.shape)}"),
    )
    require(bias is None or bias.shape == (N,), f"the bias of {N} outputs must be [{N}]")
    require(residual is None or residual.shape == (M, N), f"the residual of this product must be [{M}, {N}]")
    require(
        activation in ACTIVATIONS, f"there is no activation {activation!r}; known: {', '.join(map(repr, ACTIVATIONS))}"
    )
    return M, K


w4a16_gemm = define("w4a16_gemm", _w4a16_gemm)
w8a16_gemm = define("w8a16_gemm", _w8a16_gemm)
