"""Linear layers whose weights have 1 to 8 bits, in groups along K: one packed layout, for u8 and for float activations.

A group is filled up to whole blocks of ``DEPTH[bits]`` inputs of 64 outputs. A block consists of *quads*, four inputs of each
of the outputs, [64, 4], as ``vpdpbusd`` multiplies them. Codes of up to 4 bits count from 0, and quads share bytes, the first
in the lowest bits; codes of 3 bits lie in two planes, of their low two bits and of their high bit. Wider codes are int8.

Float activations are multiplied as integers of 24 bits where there is AVX512 (16 for 16-bit floats in groups of up to 256):
off by at most 2^-23 (2^-15) of the largest of their group, or 2^-127; a row with an infinity or a NaN is NaN.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fxquant.numerics.packing import pack_slices, unpack_slices

from .ops import PANEL, activate, declare

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (8,), 6: (8,), 7: (8,), 8: (8,)}
DEPTH = {bits: 32 // min(planes) for bits, planes in PLANES.items()}
QUAD = 4 * PANEL
MOST_INPUTS = (2**31 - 1) // 255**2  # of a group: a sum of more products of two codes may not fit 32 bits
BLOCK = 8 * PANEL  # outputs that are decoded at a time
Packed = tuple[Tensor, Tensor, Tensor]  # weight int8 [ceil(N/64), G, bytes], scale float32 and terms int32 [ceil(N/64), G, 64]


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
    return activate(y if bias is None else y + bias.double(), activation).to(dtype)


def linear_u8_reference(codes: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """The same with ``x = s_x (q_x - z_x)``: codes uint8 [..., K or more], scale and zero point [..., 1] or []."""
    inner = weight.shape[1] * rest[4]
    x = (codes[..., :inner].double() - zero_point) * scale.double()
    return linear_float_reference(x, weight, *rest)


def gated_float_reference(x: Tensor, *rest: Any) -> Tensor:
    """``act(gate(x)) * up(x)``, the weight of ``out_features`` gates before that of as many outputs that they multiply."""
    *weight, out_features, activation, dtype = rest
    joined = [*weight, 2 * out_features, "none", torch.float64]
    both = linear_float_reference(x, *joined)
    gate, up = both.chunk(2, -1)
    return (activate(gate, activation) * up).to(dtype)


def gated_u8_reference(codes: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """The same with ``x = s_x (q_x - z_x)``, as in ``linear_u8_reference``."""
    inner = weight.shape[1] * rest[4]
    return gated_float_reference((codes[..., :inner].double() - zero_point) * scale.double(), weight, *rest)


def _gated_decoded(x: Tensor, *rest: Any) -> Tensor:
    """``gated_float`` for many rows."""
    *front, out_features, activation, dtype = rest
    gate, up = _linear_decoded(x, *front, 2 * out_features, "none", x.dtype).chunk(2, -1)
    return activate(gate, activation).mul_(up).to(dtype)


def _linear_decoded(x: Tensor, *rest: Any) -> Tensor:
    """``linear_float`` for many rows: they meet blocks of decoded weights, in PyTorch's own product."""
    *packed, bias, bits, group_size, out_features, activation, dtype = rest
    rows = x.reshape(-1, x.shape[-1])
    y = x.new_empty((rows.shape[0], out_features))
    memory = x.new_empty(x.shape[-1] * min(BLOCK, out_features))
    for first in range(0, out_features, BLOCK):
        n = min(BLOCK, out_features - first)
        weight, scale, terms = (t.contiguous()[first // PANEL : (first + BLOCK) // PANEL] for t in packed)
        block = memory[: x.shape[-1] * n].view(-1, n)
        decode(weight, scale, terms, bits, group_size, block)
        torch.mm(rows, block, out=y[:, first : first + n])
    y = activate(y if bias is None else y.add_(bias), activation).to(dtype)
    return y.view(*x.shape[:-1], out_features)


def _fake(x: Tensor, *rest: Any) -> Tensor:
    out_features, _, dtype = rest[-3:]
    return x.new_empty((*x.shape[:-1], out_features), dtype=dtype)


_WEIGHT = (
    "Tensor weight, Tensor weight_scale, Tensor terms, Tensor? bias, int bits, int group_size, int out_features, "
    "str activation, ScalarType dtype) -> Tensor"
)
_library = torch.library.Library("fxquant", "FRAGMENT")
linear_u8 = declare(_library, "low_bit_linear_u8(Tensor codes, Tensor scale, Tensor zero_point, " + _WEIGHT, _fake)
linear_float = declare(_library, "low_bit_linear_float(Tensor x, " + _WEIGHT, _fake)
gated_u8 = declare(_library, "low_bit_gated_u8(Tensor codes, Tensor scale, Tensor zero_point, " + _WEIGHT, _fake)
gated_float = declare(_library, "low_bit_gated_float(Tensor x, " + _WEIGHT, _fake)
GATED = {linear_u8: gated_u8, linear_float: gated_float}  # act(gate) * up of two products of one input
decode = declare(  # the values of a packed weight, into ``out`` [K, N] of any float dtype there is
    _library,
    "low_bit_decode(Tensor weight, Tensor weight_scale, Tensor terms, int bits, int group_size, Tensor(a!) out) -> ()",
    lambda *args: None,
)
_library.define("low_bit_linear_decoded(Tensor x, " + _WEIGHT)
_library.impl("low_bit_linear_decoded", _linear_decoded, "CPU")  # which the C++ of low_bit_linear_float calls
_library.define("low_bit_gated_decoded(Tensor x, " + _WEIGHT)
_library.impl("low_bit_gated_decoded", _gated_decoded, "CPU")  # and that of low_bit_gated_float
linear_decoded = torch.ops.fxquant.low_bit_linear_decoded.default
