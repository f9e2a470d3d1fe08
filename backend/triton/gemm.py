"""The products of quantized operands, as ops: int8 activations (``a8_gemm``) or 16-bit ones (``a16_gemm``), any packed weight.

    a8:   y[m, n]  =  sum_g scale_w[g, n] sum_k (q_x[m, k] - zero_x[m]) q_w[n, k]  scale_x[m]
    a16:  y[m, n]  =  sum_g scale_w[g, n] (sum_k x[m, k] (offset + q_w[n, k])  -  (offset + zero_w[g, n]) sum_k x[m, k])

One product or a gated pair that reads the same activations, then the steps of a program (``program.py``), stored once. On a GPU
the kernel is written for the case at hand (``source.py``); elsewhere the op runs its reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import launch
from .codes import OFFSET, Codes
from .gemv import TOKENS, whole_words, write_gemv
from .language import INTERPRETED, ceil_div, define, launcher, launches, require, rows
from .program import Program, evaluate, kind_of, number_of
from .refuse import check_a8, check_a16, check_end
from .source import Form, kernel, write, write_sum
from .tile import Problem, Tile, bucket

ONE_GROUP = 1 << 30  # a group of K or more: one scale per output


def reference_a8(
    q: Tensor,
    scale_x: Tensor,
    zero_x: Tensor | None,
    weights: Sequence[tuple[Tensor, Tensor]],
    group_size: int,
    program: str,
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """The truth; ``weights`` holds codes [N, K] and scales of each product. float64 holds every sum of integers exactly."""
    products = []
    for codes, scale in weights:
        x = q.double() - (0 if zero_x is None else zero_x)
        parts = [a @ b.T for a, b in zip(x.split(group_size, 1), codes.double().split(group_size, 1), strict=True)]
        if scale.dim() == 1:
            products.append(parts[0].float() * (scale_x * scale))
        else:
            products.append((torch.stack(parts) * scale[:, None]).sum(0).float() * scale_x)
    return evaluate(program, products, inputs, dtype)


def reference_a16(
    x: Tensor,
    weights: Sequence[tuple[Tensor, Tensor, Tensor | None]],
    group_size: int,
    program: str,
    inputs: Sequence[Tensor],
    dtype: torch.dtype | None = None,
    codebook: Sequence[float] | None = None,
) -> Tensor:
    """The truth: ``scale (codes - zero_point)`` multiplied in float32 and rounded once; codes: [N, K], of any integer dtype.

    With a ``codebook``, whose entries are rounded to the dtype of x: ``scale codebook[codes]``.
    """
    products = []
    if codebook:
        book = torch.tensor(codebook, dtype=x.dtype, device=x.device).float()
        weights = [(book[codes.long()], scale, zero_point) for codes, scale, zero_point in weights]
    for codes, scale, zero_point in weights:
        group = torch.arange(codes.shape[1], device=codes.device) // group_size
        weight = codes.float() if zero_point is None else codes.float() - zero_point.float()[group].T
        products.append(x.float() @ (weight * scale.float()[group].T).T)
    return evaluate(program, products, inputs, dtype or x.dtype)


def _a8_gemm(
    q: Tensor,
    scale_x: Tensor,
    zero_x: Tensor | None,
    weights: list[Tensor],
    inputs: list[Tensor],
    program: str = "",
    bits: int = 8,
    group_size: int = ONE_GROUP,
    width: int = 128,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """[M, N] in ``out_dtype``: int8 codes ``q`` [M, K] times one packed weight, or two.

    scale_x: float32 [M, 1] or []; zero_x: int32 alike. ``weights``: for each product its codes, scale and sums: int8 [N, K] or
    words of ``Codes(bits).pack(codes, width)``; float32 [N], or [G, N] for groups; sum_k q_w as int32 [N], or for groups
    sum_g scale_w sum_k q_w as float32 [N]. Raises KernelError for other shapes or dtypes.
    """
    check_a8(q, scale_x, zero_x, weights, bits, group_size, width)
    check_end(q.shape[0], weights[0].shape[0], len(weights) // 3, program, inputs)
    grouped = weights[1].dim() == 2
    codes = Codes(bits)
    if not launches(q):
        plain = [
            (w if bits == 8 else codes.unpack(w, width)[:, : q.shape[1]], scale)
            for w, scale in zip(weights[::3], weights[1::3], strict=True)
        ]
        return reference_a8(q, scale_x, zero_x, plain, group_size, program, inputs, out_dtype)
    K, size = q.shape[1], group_size if grouped else ONE_GROUP
    problem = Problem(
        bucket(q.shape[0]), weights[0].shape[0], K, bits, width=0 if bits == 8 else width, group_size=min(size, K),
        products=len(weights) // 3, words=whole_words(q, *weights[::3]),
    )  # fmt: skip
    tile, count = launch.choose(problem, launch.device(q.device.index))
    return launch_a8(q, scale_x, zero_x, weights, inputs, program, bits, size, width, out_dtype, tile, count)


def launch_a8(
    q: Tensor,
    scale_x: Tensor,
    zero_x: Tensor | None,
    weights: Sequence[Tensor],
    inputs: Sequence[Tensor],
    program: str,
    bits: int,
    group_size: int,
    width: int,
    dtype: torch.dtype,
    tile: Tile,
    count: int,
) -> Tensor:
    """Launch with ``tile`` and K in ``count`` parts; everything else as in ``a8_gemm``."""
    codes = None if bits == 8 else Codes(bits)
    grouped = weights[1].dim() == 2
    form = Form(
        products=len(weights) // 3, codes=codes, program=program, zero_x=zero_x is not None, tensor_x=scale_x.dim() == 0,
        weight_left=tile.weight_left,
    )  # fmt: skip
    if codes and grouped:
        form = replace(form, **_chunks(codes, q.shape[1], group_size, width))
    values: dict[str, Any] = {"scale_x": scale_x.contiguous(), "zero_x": None if zero_x is None else zero_x.contiguous()}
    for i, (scale, total) in enumerate(zip(weights[1::3], weights[2::3], strict=True)):
        values |= {f"scale_w{i}": scale.contiguous(), f"sum_w{i}": total.contiguous()}
    values["groups"] = weights[1].shape[0]
    form = replace(form, tokens=tile.bm if tile.bm in TOKENS else 0)
    return _launch(form, rows(q), [rows(w) for w in weights[::3]], values, inputs, dtype, width, tile, count)


def _a16_gemm(
    x: Tensor,
    weights: list[Tensor],
    inputs: list[Tensor],
    program: str = "",
    shifted: bool = False,
    bits: int = 4,
    group_size: int = 128,
    width: int = 64,
    out_dtype: torch.dtype | None = None,
    codebook: list[float] | None = None,
) -> Tensor:
    """[M, N] in ``out_dtype``, or the dtype of x: float16 or bfloat16 ``x`` [M, K] times one packed weight, or two.

    ``weights``: for each product its words, int16 of ``Codes(bits, 16, not shifted).pack(codes, width)``; scale float32
    [ceil(K / group_size), N]; and, if ``shifted``, zero points alike. A group_size of K or more is one scale per output.
    ``codebook``: what 16 codes (unsigned, not shifted) mean, rounded to the dtype of x.
    Raises KernelError for other shapes or dtypes, and for groups that do not consist of whole slices.
    """
    codes, each = _codes(bits, shifted, codebook), 3 if shifted else 2
    check_a16(x, weights, codes, each, group_size, width)
    check_end(x.shape[0], weights[0].shape[0], len(weights) // each, program, inputs)
    if not launches(x):
        plain = [
            (codes.unpack(w[0], width)[:, : x.shape[1]], w[1], w[2] if shifted else None)
            for w in zip(*(weights[i::each] for i in range(each)), strict=True)
        ]
        return reference_a16(x, plain, group_size, program, inputs, out_dtype, codebook)
    require(x.dtype in OFFSET, f"the activations are {x.dtype}; the kernel multiplies in torch.float16 or torch.bfloat16")
    problem = Problem(
        bucket(x.shape[0]), weights[0].shape[0], x.shape[1], bits, True, shifted, width, min(group_size, x.shape[1]),
        products=len(weights) // each, codebook=bool(codebook),
    )  # fmt: skip
    tile, count = launch.choose(problem, launch.device(x.device.index))
    dtype = out_dtype or x.dtype
    return launch_a16(x, weights, inputs, program, shifted, bits, group_size, width, dtype, tile, count, codebook)


def launch_a16(
    x: Tensor,
    weights: Sequence[Tensor],
    inputs: Sequence[Tensor],
    program: str,
    shifted: bool,
    bits: int,
    group_size: int,
    width: int,
    dtype: torch.dtype,
    tile: Tile,
    count: int,
    codebook: Sequence[float] | None = None,
) -> Tensor:
    """Launch with ``tile`` and K in ``count`` parts; everything else as in ``a16_gemm``."""
    codes, each, K = _codes(bits, shifted, codebook), 3 if shifted else 2, x.shape[1]
    offset = codes.offset(x.dtype)
    form = Form(
        products=len(weights) // each, floats={torch.bfloat16: "bf16", torch.float16: "fp16"}[x.dtype], codes=codes,
        sums_x=bool(offset or shifted), offset=offset, program=program, weight_left=True,
    )  # fmt: skip
    form = replace(form, **_chunks(codes, K, group_size, width))
    values: dict[str, Any] = {"groups": weights[1].shape[0]}
    for name, place in (("scale_w", 1), ("zero_w", 2))[: each - 1]:
        values |= {f"{name}{i}": t.contiguous() for i, t in enumerate(weights[place::each])}
    if form.sums_x:  # Inductor fuses this with whatever made x
        size = codes.slices * width
        blocks = ceil_div(K, size)
        values["chunks"] = blocks * (codes.slices // form.chunk)
        filled = F.pad(x.float(), (0, blocks * size - K))
        values["sums_x"] = filled.view(x.shape[0], values["chunks"], form.chunk * width).sum(-1)
    return _launch(form, rows(x), [rows(w) for w in weights[::each]], values, inputs, dtype, width, tile, count)


def _codes(bits: int, shifted: bool, codebook: Sequence[float] | None) -> Codes:
    """How the codes of ``a16_gemm`` are packed: signed, unless they have zero points or mean places in a codebook."""
    return Codes(bits, 16, not shifted and not codebook, tuple(codebook or ()))


def _chunks(codes: Codes, K: int, group_size: int, width: int) -> dict[str, Any]:
    """How groups lie on slices: the facts of a Form."""
    block = codes.slices * width
    group = ceil_div(K, block) * block if group_size >= K else group_size
    chunk = min(group, block)
    return {"chunk": chunk // width, "chunks_per_group": group // chunk}


def _launch(
    form: Form,
    x: Tensor,
    weights: Sequence[Tensor],
    values: dict[str, Any],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    width: int,
    tile: Tile,
    count: int,
) -> Tensor:
    """Write the kernel, and that which adds up its parts if there are any; and launch them."""
    (M, K), N = x.shape, weights[0].shape[0]
    width = width if form.codes else tile.bk
    block = width * (form.codes.slices if form.codes else 1)
    even_m = isinstance(M, int) and M % tile.bm == 0  # a symbolic M is not looked at
    require(count == 1 or not tile.persistent, f"K is split in {count} parts, and persistent programs take whole tiles")
    form = replace(form, parts=count > 1, persistent=tile.persistent > 0, interpreted=INTERPRETED)
    form = replace(form, even_m=even_m, even_n=N % tile.bn == 0, even_k=K % block == 0)
    out = x.new_empty((M, N), dtype=dtype)
    values = values | {"x": x, "M": M, "N": N, "K": K, "stride_x": x.stride(0), "stride_w": weights[0].stride(0)}
    values |= {f"w{i}": w for i, w in enumerate(weights)}
    operands = Program.parse(form.program).operands
    for name in operands:
        operand = inputs[number_of(name)]
        values[name] = rows(operand) if kind_of(name) == "full" else operand.contiguous()
        values[f"stride_{name}"] = values[name].stride(0) if kind_of(name) == "full" else 0
    end = {"out": out, "stride_out": out.stride(0)}
    persistent = launch.device(x.device.index).processors * tile.persistent  # however few tiles: a symbolic M is not looked at
    grid = (persistent or ceil_div(M, tile.bm) * ceil_div(N, tile.bn), count)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    constants = {"PARTS": count, "BM": tile.bm, "BN": tile.bn, "WIDTH": width, "BAND": 8}
    if form.tokens:
        words = {name: values[name].view(torch.int32) for name in ("x", *(f"w{i}" for i in range(form.products)))}
        words |= {"stride_x": words["x"].stride(0), "stride_w": words["w0"].stride(0)}
        call(write_gemv(form), (ceil_div(N, tile.bn),), values | end | constants | words, options)
        return out
    if count == 1:
        call(write(form), grid, values | end | constants, options)
        return out
    parts = x.new_empty((count * form.products, M, N), dtype=torch.int32 if form.integer else torch.float32)
    call(write(form), grid, values | {"out": parts} | constants, options)
    constants = {"PARTS": count, "BM": 4, "BN": 256}
    call(write_sum(form), (ceil_div(M, 4), ceil_div(N, 256)), values | end | {"parts": parts} | constants, {"num_warps": 4})
    return out


def call(text: str, grid: tuple[int, ...], values: dict[str, Any], options: dict[str, int]) -> None:
    """Launch the kernel of ``text`` with those of ``values`` that it names."""
    written = kernel(text)
    launcher(written)[grid](**{name: values[name] for name in written.arg_names}, **options)


a8_gemm = define("a8_gemm", _a8_gemm)
a16_gemm = define("a16_gemm", _a16_gemm)
