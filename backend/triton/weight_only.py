"""Four- and eight-bit weights times 16-bit activations: codes become 16-bit floats in registers, on the left of the product.

Codes lie in int16 words, four (or two) *slices* of K side by side (``numerics.packing.pack_slices``), so that one shift and one
three-input logic operation turn two codes into two floats. They arrive as ``offset + code`` (the offset is a bit pattern, not
an addition), and the offset leaves together with the zero point, once per group, through the sums of the activations:

    y[m, n]  =  sum_g scale[g, n] (sum_k x[m, k] (offset + code[n, k])  -  (offset + zero_point[g, n]) sum_k x[m, k])
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# Kernels are written in Triton's language, which has no types to annotate with.
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.numerics.packing import pack_slices, unpack_slices

from . import launch
from .epilogue import ACTIVATIONS, add_parts, finish, store_output
from .language import INTERPRETED, ceil_div, define, launches, require, rows, tl, triton, wrap_triton

OFFSET = {torch.bfloat16: 128, torch.float16: 1024}
"""The power of two whose last mantissa bits hold a four-bit code."""


def slices_of(bits: int) -> int:
    """How many codes share one int16 word."""
    return 16 // bits


def pack_weight(codes: Tensor, bits: int, width: int = 64) -> Tensor:
    """Codes [N, K] of 4 or 8 bits (int8, or uint8 with a zero point) as int16 [N, words], K filled up with code 0.

    K = 1000 codes of 4 bits in slices of 64 fill 4 blocks of 4 x 64: int16 [N, 256].
    """
    slices = slices_of(bits)
    return pack_slices(F.pad(codes, (0, -codes.shape[1] % (slices * width))), bits, width, slices)


def reference(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    group_size: int,
    activation: str,
) -> Tensor:
    """The truth: ``scale (codes - zero_point)`` multiplied in float32 and rounded once; codes: [N, K], of any integer dtype."""
    group = torch.arange(codes.shape[1], device=codes.device) // group_size
    weight = codes.float() if zero_point is None else codes.float() - zero_point.float()[group].T
    return finish(x.float() @ (weight * scale.float()[group].T).T, bias, residual, activation, x.dtype)


@triton.constexpr_function
def _widening(slice, slices, signed, dtype):
    """PTX that turns slice ``slice`` of two int16 words into two floats; lop3 0x6a is ``a & b ^ c``.

    Four bits: offset + code, the code biased by 8 if signed. Eight bits in bfloat16, whose mantissa holds seven: 128 + low
    bits, less 128 or 256; in float16: 1024 + (code ^ 128), less 1152. Both are exact: the signed code, or the unsigned one
    less 128.
    """
    bf16 = dtype == tl.bfloat16
    shift = f"shr.b32 t, $1, {16 // slices * slice};" if slice else "mov.b32 t, $1;"
    if slices == 4:
        bits = (0x4300 if bf16 else 0x6400) + (8 if signed else 0)
        body = f"lop3.b32 $0, t, 0x000f000f, 0x{bits:04x}{bits:04x}, 0x6a;"
    elif bf16:
        low = "lop3.b32 a, t, 0x007f007f, 0x43004300, 0x6a;"
        high = f"lop3.b32 b, t, 0x00800080, 0x{'c300c300' if signed else 'c380c380'}, 0x6a;"
        body = f".reg .b32 a, b, one; mov.b32 one, 0x3f803f80; {low} {high} fma.rn.bf16x2 $0, a, one, b;"
    else:
        biased = f"lop3.b32 a, t, 0x00ff00ff, 0x{'64806480' if signed else '64006400'}, 0x6a;"
        body = f".reg .b32 a, b; {biased} mov.b32 b, 0xe480e480; add.rn.f16x2 $0, a, b;"
    return "{ .reg .b32 t; " + shift + " " + body + " }"


@triton.jit
def widen(word, like, SLICE: tl.constexpr, SLICES: tl.constexpr, SIGNED: tl.constexpr, INTERPRET: tl.constexpr):
    """One slice as floats of the dtype of ``like``, with the offsets that ``_widening`` tells."""
    if INTERPRET:
        code = (word.to(tl.int32) >> (16 // SLICES * SLICE)) & (15 if SLICES == 4 else 255)
        bias: tl.constexpr = 1024 if SLICES == 4 else -128
        flip: tl.constexpr = (8 if SLICES == 4 else 128) if SIGNED else 0
        return ((code ^ flip) + bias).to(like.dtype)
    else:
        asm: tl.constexpr = _widening(SLICE, SLICES, SIGNED, like.dtype)
        return tl.inline_asm_elementwise(asm, "=r,r", [word], dtype=like.dtype, is_pure=True, pack=2)


@triton.jit
def weight_only_kernel(
    x, weight, out, parts, scale, zero_point, sums, bias, residual,
    M, N, K, stride_x, stride_w, stride_out, stride_residual, blocks, chunks, groups,
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
            if EVEN_K:  # noqa: SIM108  (decided while compiling)
                x_tile = tl.load(x_rows + base)
            else:
                x_tile = tl.load(x_rows + base, mask=k[None, :] < K - base, other=0.0)
            w_tile = widen(words, x_tile, j, SLICES, zero_point is None, INTERPRET)
            product = tl.dot(w_tile, tl.trans(x_tile), product)
            if (j + 1) % SLICES_PER_CHUNK == 0:
                chunk = block * (SLICES // SLICES_PER_CHUNK) + j // SLICES_PER_CHUNK
                # What fills K up meets zeros, but not those of a scale that is not there.
                here = tl.minimum(chunk // CHUNKS_PER_GROUP, groups - 1) * N + n_in
                if sums is not None:
                    zero = OFFSET
                    if zero_point is not None:
                        zero = OFFSET + tl.load(zero_point + here).to(tl.float32)[:, None]
                    product -= zero * tl.load(sums + m_in * chunks + chunk)[None, :]
                acc += tl.load(scale + here).to(tl.float32)[:, None] * product
                product = tl.zeros((BN, BM), dtype=tl.float32)
    y = tl.trans(acc)
    if parts is None:
        store_output(y, out, bias, residual, m, n, M, N, stride_out, stride_residual, ACTIVATION)
    else:
        here = parts + part * M * N + m[:, None] * N + n[None, :]
        tl.store(here, y, mask=(m < M)[:, None] & (n < N)[None, :])


def launch_weight_only(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: int,
    group_size: int,
    width: int,
    activation: str,
    tile: launch.Tile,
    count: int,
) -> Tensor:
    """Launch with ``tile`` and K in ``count`` parts; everything else as in ``w4a16_gemm``."""
    (M, K), N, slices = x.shape, packed.shape[0], slices_of(bits)
    x, packed, scale = rows(x), rows(packed), scale.contiguous()
    zero_point = None if zero_point is None else zero_point.contiguous()
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else rows(residual)
    block = slices * width
    blocks = ceil_div(K, block)
    group = blocks * block if group_size >= K else group_size
    chunk = min(group, block)
    chunks = blocks * block // chunk
    signed = zero_point is None
    offset = {4: OFFSET[x.dtype] + (8 if signed else 0), 8: 0 if signed else -128}[bits]
    sums = None
    if offset:  # Inductor fuses this with whatever made x
        sums = F.pad(x.float(), (0, blocks * block - K)).view(M, chunks, chunk).sum(-1)
    out = x.new_empty((M, N))
    parts = None if count == 1 else x.new_empty((count, M, N), dtype=torch.float32)
    wrap_triton(weight_only_kernel)[(ceil_div(N, tile.bn), count, ceil_div(M, tile.bm))](
        x, packed, out if parts is None else None, parts, scale, zero_point, sums, bias, residual,
        M, N, K, x.stride(0), packed.stride(0), out.stride(0), 0 if residual is None else residual.stride(0),
        blocks, chunks, scale.shape[0],
        ACTIVATION=activation, PARTS=count, EVEN_K=K % block == 0, INTERPRET=INTERPRETED,
        OFFSET=offset, SLICES=slices, SLICES_PER_CHUNK=chunk // width, CHUNKS_PER_GROUP=group // chunk,
        BM=tile.bm, BN=tile.bn, WIDTH=width, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if parts is not None:
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

    x: float16 or bfloat16 [M, K]; packed: int16 from ``pack_weight(codes, 4, width)``, signed codes without zero_point and
    unsigned ones with it; scale, zero_point: [ceil(K / group_size), N]; bias: [N]; residual: [M, N]. A group_size of K or more
    is one scale per row. Raises KernelError for other shapes or dtypes, and for groups that do not consist of whole slices.
    """
    return _weight_only(x, packed, scale, zero_point, bias, residual, 4, group_size, width, activation)


def _w8a16_gemm(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    group_size: int = 1 << 30,
    width: int = 64,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """``w4a16_gemm`` for eight-bit codes, packed by ``pack_weight(codes, 8, width)``; one scale per row unless told."""
    return _weight_only(x, packed, scale, zero_point, bias, residual, 8, group_size, width, activation)


def _weight_only(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: int,
    group_size: int,
    width: int,
    activation: str,
) -> Tensor:
    _check(x, packed, scale, zero_point, bias, residual, bits, group_size, width, activation)
    (M, K), N, slices = x.shape, packed.shape[0], slices_of(bits)
    if not launches(x):
        codes = unpack_slices(packed, bits, width, slices, signed=zero_point is None)[:, :K]
        return reference(x, codes, scale, zero_point, bias, residual, group_size, activation)
    require(x.dtype in OFFSET, f"the activations are {x.dtype}; the kernel multiplies in torch.float16 or torch.bfloat16")
    on = launch.device(x.device.index)
    tile = launch.weight_only_tile(M, slices, width, on)
    count = launch.parts(N, ceil_div(K, slices * width), tile, on)
    return launch_weight_only(
        x, packed, scale, zero_point, bias, residual, bits, group_size, width, activation, tile, count
    )


def _check(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: int,
    group_size: int,
    width: int,
    activation: str,
) -> None:
    require(x.dim() == 2 and packed.dim() == 2, f"a product takes matrices, not {list(x.shape)} and {list(packed.shape)}")
    (M, K), N, block = x.shape, packed.shape[0], slices_of(bits) * width
    words, groups = ceil_div(K, block) * width, ceil_div(K, group_size)
    require(
        packed.dtype == torch.int16 and packed.shape[1] == words,
        f"{N} rows of {K} codes of {bits} bits in slices of {width} are int16 [{N}, {words}], "
        f"not {packed.dtype} {list(packed.shape)}",
    )
    whole = group_size >= K or group_size % block == 0 or (block % group_size == 0 and group_size % width == 0)
    require(whole, f"groups of {group_size} weights do not consist of whole slices of {width}; pack in a width that divides it")
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


w4a16_gemm = define("w4a16_gemm", _w4a16_gemm)
w8a16_gemm = define("w8a16_gemm", _w8a16_gemm)
