"""What the products cannot take, refused in a sentence before anything is launched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .codes import Codes
from .language import ceil_div, require
from .program import KINDS, Program, kind_of, number_of

WIDTHS = range(16, 257, 16)
"""Of the heads that attention is computed for."""
MAX_K = 65536
"""|sum (q_x - zero_x) q_w| <= 255 * 128 * K stays below 2**31."""


def fits(codes: Codes, group_size: int, width: int) -> bool:
    """Whether groups consist of whole slices, and blocks of whole groups or groups of whole blocks."""
    block = codes.slices * width
    return group_size % width == 0 and (group_size % block == 0 or block % group_size == 0)


def check_a8(
    q: Tensor, scale_x: Tensor, zero_x: Tensor | None, weights: list[Tensor], bits: int, group_size: int, width: int
) -> None:
    """Codes, scales and sums of ``a8_gemm``."""
    require(q.dim() == 2 and q.dtype == torch.int8, f"a8_gemm takes int8 codes [M, K], not {q.dtype} {list(q.shape)}")
    require(len(weights) in (3, 6), f"a product has codes, scale, sums; {len(weights)} tensors are not one or two of them")
    require(bits in (2, 3, 4, 8), f"codes of {bits} bits are multiplied; 2, 3, 4 or 8 are known")
    M, K = q.shape
    N, codes, groups = weights[0].shape[0], Codes(bits), ceil_div(K, group_size)
    require(0 < K <= MAX_K, f"a8_gemm sums K = {K} products in 32 bits; 1 to {MAX_K} are exact")
    words = K if bits == 8 else ceil_div(K, codes.slices * width) * codes.words * width
    scales = [N] if group_size >= K else [groups, N]
    for w, scale, total in zip(weights[::3], weights[1::3], weights[2::3], strict=True):
        require(
            w.dtype == torch.int8 and list(w.shape) == [N, words],
            f"{N} rows of {K} codes of {bits} bits are int8 [{N}, {words}], not {w.dtype} {list(w.shape)}",
        )
        require(list(scale.shape) == scales, f"the scales of the weight must be {scales}, not {list(scale.shape)}")
        require(list(total.shape) == [N], f"the sums of the weight's rows must be [{N}], not {list(total.shape)}")
    require(group_size >= K or bits < 8, "int8 codes have one scale for each output")
    whole = group_size >= K or fits(codes, group_size, width)
    require(whole, f"groups of {group_size} weights do not consist of whole slices of {width}")
    for name, value in (("scales", scale_x), ("zero points", zero_x)):
        if value is not None:
            shape = list(value.shape)
            require(shape in ([], [M, 1]), f"{name} of activations must be [{M}, 1] or [], not {shape}")
    require(zero_x is None or zero_x.shape == scale_x.shape, "scales and zero points of activations must be of one shape")


def check_a16(x: Tensor, weights: list[Tensor], codes: Codes, each: int, group_size: int, width: int) -> None:
    """Words, scales and zero points of ``a16_gemm``."""
    require(x.dim() == 2 and len(weights) in (each, 2 * each), f"a16_gemm takes [M, K] and {each} tensors for each product")
    book = len(codes.codebook)
    fit = not book or (codes.bits == 4 and book == 16 and each == 2)
    require(fit, f"a codebook has {book} entries for {codes.bits} bits; 16 for 4 bits, and no zero points, are needed")
    K, N = x.shape[1], weights[0].shape[0]
    words, groups = ceil_div(K, codes.slices * width) * codes.words * width, ceil_div(K, group_size)
    whole = group_size >= K or fits(codes, group_size, width)
    require(whole, f"groups of {group_size} weights do not consist of whole slices of {width}; pack in a width that divides it")
    for w, *rest in zip(*(weights[i::each] for i in range(each)), strict=True):
        require(
            w.dtype == torch.int16 and list(w.shape) == [N, words],
            f"{N} rows of {K} codes of {codes.bits} bits in slices of {width} are int16 [{N}, {words}], "
            f"not {w.dtype} {list(w.shape)}",
        )
        for t in rest:
            require(
                list(t.shape) == [groups, N],
                f"{groups} groups of {group_size} weights and {N} outputs have scales and zero points [{groups}, {N}], "
                f"not {list(t.shape)}",
            )


def check_attention(q: Tensor, k: Tensor, v: Tensor, scale_q: Tensor, scale_k: Tensor, mask: Tensor | None) -> None:
    """Codes, values, scales and mask of ``int8_attention``."""
    for name, t in (("queries", q), ("keys", k)):
        right = t.dim() == 4 and t.dtype == torch.int8
        require(right, f"int8_attention takes {name} as int8 codes [B, H, L, D], not {t.dtype} {list(t.shape)}")
    right = v.dim() == 4 and v.dtype in (torch.float16, torch.bfloat16)
    require(right, f"int8_attention takes values as float16 or bfloat16 [B, G, T, D], not {v.dtype} {list(v.shape)}")
    (B, H, L, D), (_, G, T, _) = q.shape, k.shape
    shapes = [list(t.shape) for t in (q, k, v)]
    together = k.shape[3] == D and k.shape[0] == B and v.shape[:3] == k.shape[:3]
    require(together, f"queries, keys and values do not fit: {shapes}")
    require(G > 0 and H % G == 0, f"{H} heads of queries are not shared by {G} heads of keys")
    for width in (D, v.shape[3]):
        require(width in WIDTHS, f"a head has a width of {width}; multiples of 16 up to 256 are known")
    for name, scale, shape in (("queries", scale_q, [B, H, L]), ("keys", scale_k, [B, G, T])):
        fits = scale.dtype == torch.float32 and list(scale.shape) in ([], shape)
        require(fits, f"the scales of {name} must be float32 {shape} or [], not {scale.dtype} {list(scale.shape)}")
    if mask is not None:
        whole = [1] * (4 - mask.dim()) + list(mask.shape)
        fits = len(whole) == 4 and all(found in (1, size) for found, size in zip(whole, [B, H, L, T], strict=True))
        require(fits, f"a mask of {list(mask.shape)} does not broadcast to {[B, H, L, T]}")
        right = mask.dtype == torch.bool or mask.is_floating_point()
        require(right, f"the mask is {mask.dtype}; it must be boolean, or floating point to be added")


def check_end(M: Any, N: Any, products: int, text: str, inputs: list[Tensor]) -> None:
    """Each operand of the program is there, and of the shape that its name says."""
    program = Program.parse(text)
    shapes: dict[str, list[Any]] = {"full": [M, N], "column": [N], "row": [M, 1], "scalar": []}
    known = {f"y{i}" for i in range(products)}
    for step in program.steps:
        for name in step.args:
            if kind_of(name) in KINDS:
                require(number_of(name) < len(inputs), f"{name} of {text!r} is not among {len(inputs)} operands")
                wanted, shape = shapes[kind_of(name)], list(inputs[number_of(name)].shape)
                require(shape == wanted, f"{name} of {text!r} must be {wanted}, not {shape}")
            else:
                require(name in known or not kind_of(name), f"{name} of {text!r} is not there yet")
        known.add(step.name)
