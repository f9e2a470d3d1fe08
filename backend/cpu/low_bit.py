"""Linear layers whose weights have 1 to 8 bits, in groups along K: one packed layout, for u8 and for float activations.

A group is filled up to whole blocks of ``DEPTH[bits]`` inputs of 64 outputs. A block consists of *quads*, four inputs of each
of the outputs, [64, 4], as ``vpdpbusd`` multiplies them. Codes of up to 4 bits count from 0, and quads share bytes, the first
in the lowest bits; codes of 3 bits lie in two planes, of their low two bits and of their high bit. Wider codes are int8.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fxquant.errors import FxquantError
from fxquant.numerics.packing import pack_slices, unpack_slices

from . import build
from .build import library
from .ops import ACTIVATIONS, DTYPES, PANEL, _activate

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (8,), 6: (8,), 7: (8,), 8: (8,)}
DEPTH = {bits: 32 // min(planes) for bits, planes in PLANES.items()}
QUAD = 4 * PANEL
MOST_INPUTS = (2**31 - 1) // 255**2  # of a group: a sum of more products of two codes may not fit 32 bits
MOST_ROWS = {torch.float32: 256, torch.bfloat16: 64, torch.float16: 256}  # beyond these a float product of decoded weights wins
BLOCK = 8 * PANEL  # outputs that are decoded at a time
Packed = tuple[Tensor, Tensor, Tensor]  # weight int8 [ceil(N/64), G, bytes], scale float32 and terms int32 [ceil(N/64), G, 64]

_library = torch.library.Library("fxquant", "FRAGMENT")
_library.define(
    "low_bit_linear_u8(Tensor codes, Tensor scale, Tensor zero_point, Tensor weight, Tensor weight_scale, Tensor terms, "
    "Tensor? bias, int bits, int group_size, int out_features, str activation, ScalarType dtype) -> Tensor"
)
_library.define(
    "low_bit_linear_float(Tensor x, Tensor weight, Tensor weight_scale, Tensor terms, Tensor? bias, int bits, int group_size, "
    "int out_features, str activation, ScalarType dtype) -> Tensor"
)


def pack(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int) -> Packed:
    """Codes [N, K] with scale [N, G] and zero point int32 alike, or None -> what the products take.

    A word of ``terms`` holds what a group subtracts: ``(zero point << 24) + (sum of the codes & 0xffffff)``, both as stored.
    """
    (n, k), half = codes.shape, 1 << bits - 1
    groups = k // group_size
    shift = half * ((bits <= 4) - (zero_point is not None))  # of what is stored: from 0 where it is narrow, else around 0
    stored = codes.to(torch.int32).view(n, groups, group_size) + shift
    zero = torch.full_like(scale, shift, dtype=torch.int32) if zero_point is None else zero_point + shift
    terms = (zero.view(n, groups) << 24) + (stored.sum(2, dtype=torch.int32) & 0xFFFFFF)
    stored = pad(stored.to(torch.int8), (0, -group_size % DEPTH[bits], 0, 0, 0, -n % PANEL))
    quads = stored.view(-(n // -PANEL), PANEL, groups, -1, 4).permute(0, 2, 3, 1, 4)
    blocks = quads.reshape(*quads.shape[:2], -1, DEPTH[bits] * PANEL).view(torch.uint8)
    low = [sum(PLANES[bits][:p]) for p in range(len(PLANES[bits]))]
    words = [pack_slices(blocks >> at, width, QUAD, 8 // width) for at, width in zip(low, PLANES[bits], strict=True)]
    return torch.cat(words, -1).flatten(2), _panels(scale.to(torch.float32).view(n, groups)), _panels(terms)


def _panels(t: Tensor) -> Tensor:
    """[N, G] -> [ceil(N/64), G, 64], zeros where there is nothing."""
    n, groups = t.shape
    return pad(t, (0, 0, 0, -n % PANEL)).view(-(n // -PANEL), PANEL, groups).transpose(1, 2).contiguous()


def unpack(weight: Tensor, terms: Tensor, bits: int, group_size: int, n: int) -> Tensor:
    """``code - zero point`` int32 [N, G, group_size] of a packed weight."""
    panels, groups, _ = weight.shape
    widths = PLANES[bits]
    blocks = weight.view(panels, groups, -1, sum(widths) * DEPTH[bits] // 32 * QUAD)
    planes = blocks.split([width * DEPTH[bits] // 32 * QUAD for width in widths], -1)
    stored = torch.zeros((), dtype=torch.int32)
    for p, (plane, width) in enumerate(zip(planes, widths, strict=True)):
        part = unpack_slices(plane.contiguous(), width, QUAD, 8 // width, signed=bits > 4)
        stored = stored + (part.to(torch.int32) << sum(widths[:p]))
    stored = stored.view(panels, groups, -1, PANEL, 4).permute(0, 3, 1, 2, 4).flatten(3)
    zero = (terms >> 24).transpose(1, 2).unsqueeze(-1)
    return (stored[..., :group_size] - zero).flatten(0, 1)[:n]


def linear_float_reference(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    terms: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    """``act(sum_g s_g sum_k x (q - z) + b)``: x [..., K] -> [..., N] in ``dtype``."""
    codes = unpack(weight, terms, bits, group_size, out_features).double()
    scale = weight_scale.transpose(1, 2).flatten(0, 1)[:out_features].double()
    y = x.double() @ (codes * scale.unsqueeze(-1)).flatten(1).t()
    return _activate(y if bias is None else y + bias.double(), activation).to(dtype)


def linear_u8_reference(codes: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """The same with ``x = s_x (q_x - z_x)``: codes uint8 [..., K or more], scale and zero point [..., 1] or []."""
    inner = weight.shape[1] * rest[4]
    x = (codes[..., :inner].double() - zero_point) * scale.double()
    return linear_float_reference(x, weight, *rest)


class _LowBit(ctypes.Structure):
    """``struct LowBit`` of low_bit.cpp."""

    _fields_ = (
        ("x", ctypes.c_void_p), ("x_dtype", ctypes.c_int), ("x_stride", ctypes.c_int64),
        ("scale", ctypes.c_void_p), ("zero", ctypes.c_void_p), ("per_row", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("weight", "weight_scale", "terms")),
        ("bits", ctypes.c_int), ("size", ctypes.c_int64), ("groups", ctypes.c_int64),
        ("bias", ctypes.c_void_p), ("bias_dtype", ctypes.c_int),
        ("out", ctypes.c_void_p), ("dtype", ctypes.c_int), ("activation", ctypes.c_int),
        ("rows", ctypes.c_int64), ("outputs", ctypes.c_int64),
    )  # fmt: skip


def _multiply(
    isa: str,
    x: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    terms: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    activation: str,
    dtype: torch.dtype,
) -> Tensor:
    x, weight, weight_scale, terms = x.contiguous(), weight.contiguous(), weight_scale.contiguous(), terms.contiguous()
    bias = None if bias is None else bias.contiguous()
    if scale is not None and zero_point is not None:
        scale, zero_point = scale.contiguous(), zero_point.contiguous()
    groups, width, rows = weight.shape[1], x.shape[-1], x.shape[:-1].numel()
    inner, outputs = group_size * groups, -(out_features // -PANEL) * PANEL
    stored = outputs * groups * -(group_size // -DEPTH[bits]) * DEPTH[bits] * sum(PLANES[bits]) // 8
    if (
        (width != inner if scale is None else width < inner)
        or weight.numel() != stored
        or weight_scale.numel() != outputs * groups
        or terms.numel() != outputs * groups
        or (bias is not None and bias.numel() != out_features)
        or any(t is not None and t.numel() not in (1, rows) for t in (scale, zero_point))
    ):
        raise FxquantError(
            f"a product of rows {list(x.shape)}, a weight {list(weight.shape)} of {groups} groups of {group_size} codes of "
            f"{bits} bits, and {out_features} outputs (bias {None if bias is None else list(bias.shape)}): sizes do not agree"
        )
    out = x.new_empty((*x.shape[:-1], out_features), dtype=dtype)
    told = _LowBit(
        x.data_ptr(), 0 if scale is not None else DTYPES[x.dtype], x.shape[-1],
        None if scale is None else scale.data_ptr(), None if zero_point is None else zero_point.data_ptr(),
        int(scale is not None and scale.numel() == rows),
        weight.data_ptr(), weight_scale.data_ptr(), terms.data_ptr(), bits, group_size, groups,
        None if bias is None else bias.data_ptr(), 0 if bias is None else DTYPES[bias.dtype],
        out.data_ptr(), DTYPES[dtype], ACTIVATIONS.index(activation), rows, out_features,
    )  # fmt: skip
    threads = torch.get_num_threads()
    if scale is None:
        failed = library().low_bit_float(ctypes.byref(told), threads)
    else:
        failed = library().low_bit_integer(ctypes.byref(told), int(isa == "amx"), threads)
    if failed:
        raise MemoryError(f"a product of {rows} rows of {inner} needs more memory than there is")
    return out


def decode(weight: Tensor, weight_scale: Tensor, terms: Tensor, bits: int, group_size: int, out: Tensor) -> Tensor:
    """The values of a packed weight, into ``out`` [K, N] of any float dtype there is."""
    told = _LowBit(
        weight=weight.data_ptr(), weight_scale=weight_scale.data_ptr(), terms=terms.data_ptr(), bits=bits, size=group_size,
        groups=weight.shape[1], out=out.data_ptr(), dtype=DTYPES[out.dtype], outputs=out.shape[1],
    )  # fmt: skip
    library().low_bit_decode(ctypes.byref(told), torch.get_num_threads())
    return out


def linear_u8_on(isa: str, *args: Any) -> Tensor:
    """``linear_u8`` on the instruction set ``isa``: "amx" or "vnni"; the same to the last bit."""
    return _multiply(isa, *args)


def _linear_u8(*args: Any) -> Tensor:
    return _multiply(build.isa(), *args)


def _linear_float(x: Tensor, *rest: Any) -> Tensor:
    """Few rows meet codes that are decoded in registers; many meet blocks of decoded weights, in PyTorch's own product."""
    if x.shape[:-1].numel() <= MOST_ROWS[x.dtype]:
        return _multiply("", x, None, None, *rest)
    *packed, bias, bits, group_size, out_features, activation, dtype = rest
    rows = x.reshape(-1, x.shape[-1])
    y = x.new_empty((rows.shape[0], out_features))
    memory = x.new_empty(x.shape[-1] * min(BLOCK, out_features))
    for first in range(0, out_features, BLOCK):
        n = min(BLOCK, out_features - first)
        weight, scale, terms = (t.contiguous()[first // PANEL : (first + BLOCK) // PANEL] for t in packed)
        block = decode(weight, scale, terms, bits, group_size, memory[: x.shape[-1] * n].view(-1, n))
        torch.mm(rows, block, out=y[:, first : first + n])
    y = _activate(y if bias is None else y.add_(bias), activation).to(dtype)
    return y.view(*x.shape[:-1], out_features)


def _fake(x: Tensor, *rest: Any) -> Tensor:
    out_features, _, dtype = rest[-3:]
    return x.new_empty((*x.shape[:-1], out_features), dtype=dtype)


_library.impl("low_bit_linear_u8", _linear_u8, "CPU")
_library.impl("low_bit_linear_float", _linear_float, "CPU")
torch.library.register_fake("fxquant::low_bit_linear_u8", _fake, lib=_library)
torch.library.register_fake("fxquant::low_bit_linear_float", _fake, lib=_library)

linear_u8 = torch.ops.fxquant.low_bit_linear_u8.default
linear_float = torch.ops.fxquant.low_bit_linear_float.default
