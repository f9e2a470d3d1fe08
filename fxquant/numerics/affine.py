"""Integers of 1 to 8 bits on an affine grid: ``x ~ (code - zero_point) * scale``.

The arithmetic is a contract, so that a kernel can be equal to it bit for bit. With ``L`` the largest code (2^(b-1) - 1, or
2^b - 1), everything in float32 (float64 for float64 data), every operation rounded once, halves to even:

=========== ================================================ =====================================================
\\            symmetric (narrow grid, -L..L)                   asymmetric (0..L), with lo <= 0 <= hi
=========== ================================================ =====================================================
scale       max(-lo, hi) * (1 / L)                           (hi / 2 - lo / 2) * (2 / L)
zero point  none                                             clamp(round(-lo * (1 / scale)), 0, L)
code        clamp(round(x * (1 / scale)), -L, L)             clamp(round(x * (1 / scale)) + zero_point, 0, L)
value       code * scale                                     (code - zero_point) * scale
=========== ================================================ =====================================================

- ``1 / L`` and ``2 / L`` are constants and multiply; ``1 / scale`` is one correctly rounded division per block, and then it
  multiplies too: no element is ever divided. No product feeds an inexact sum, so fused multiply-add changes nothing.
- The halves keep ``hi - lo`` from overflowing. Real zero is a code, exactly.
- A scale is a finite normal number: floored at the smallest one, capped at the largest, and 1 for an all-zero block. The cap
  binds for one asymmetric bit alone, whose step is the whole range; the error may then be a step rather than half of one.
- Decoded values saturate at the largest finite number of their dtype (65504 * (1 + 1/510) is no float16).
- A block that holds a NaN or an infinity has scale NaN, and decodes to NaN throughout: nothing is laundered, and with
  per-token granularity the damage stays in its row. Its zero point is 0, and its codes mean nothing. Under a given (static)
  range an infinity saturates, and a NaN has no code: what it becomes is not specified.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import FxquantError, RecipeError
from .granularity import Granularity
from .packing import pack, unpack
from .ranges import DYNAMIC, Given, Range


class QParams(NamedTuple):
    """Scales and zero points in the shape that broadcasts against the blocks (the table in granularity.py)."""

    scale: Tensor  # float32 (float64 for float64 data)
    zero_point: Tensor | None = None  # int32; None for a symmetric grid


@dataclass(frozen=True)
class IntAffine:
    """An integer grid of ``bits`` bits: -L..L without a zero point, or 0..L with one.

    >>> int4 = IntAffine(4)
    >>> weight = torch.tensor([[-1.0, 0.5, 0.25]])
    >>> int4.encode(weight, int4.fit(weight, PerChannel(0)), PerChannel(0))
    tensor([[-7,  4,  2]], dtype=torch.int8)
    """

    bits: int = 8
    symmetric: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 1 <= self.bits <= 8:
            raise RecipeError(f"IntAffine has bits={self.bits!r}, an integer from 1 to 8 is needed")
        if type(self.symmetric) is not bool:
            raise RecipeError(f"IntAffine has symmetric={self.symmetric!r}, True or False is needed")
        if self.bits == 1 and self.symmetric:
            raise RecipeError("a symmetric grid of 1 bit holds zero alone; use IntAffine(1, symmetric=False)")

    @property
    def qmin(self) -> int:
        """The smallest code. The symmetric grid is narrow: -2^(b-1) is not used."""
        return -self.qmax if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """The largest code, L."""
        return (1 << self.bits - 1) - 1 if self.symmetric else (1 << self.bits) - 1

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of codes: int8, or uint8 for an asymmetric grid."""
        return torch.int8 if self.symmetric else torch.uint8

    def fit(self, x: Tensor, granularity: Granularity, range: Range = DYNAMIC) -> QParams:
        """The scale (and zero point) of every block of ``x`` [any shape, any float dtype]."""
        if not x.is_floating_point():
            raise FxquantError(f"a tensor of dtype {x.dtype} is to be quantized, a floating-point one is needed")
        blocks = granularity.split(x)
        blocks = blocks.to(torch.promote_types(x.dtype, torch.float32))

        def quantized(lo: Tensor, hi: Tensor) -> Tensor:
            return self._value(self._code(blocks, qparams := self._from_bounds(lo, hi)), qparams)

        return self._from_bounds(*range.of(blocks, granularity, quantized))

    def from_range(self, lo: Tensor | float, hi: Tensor | float, *, device: torch.device | str | None = None) -> QParams:
        """The scale (and zero point) for the range [lo, hi], widened to hold zero; floats give shape [], on ``device``.

        Raises RecipeError for Python numbers that are not finite or not in order; tensors are not looked into.
        """
        if not isinstance(lo, Tensor) and not isinstance(hi, Tensor):
            Given(lo, hi)  # refuses what is no range
        lo, hi = (e if isinstance(e, Tensor) else torch.full((), e, dtype=torch.float32, device=device) for e in (lo, hi))
        dtype = torch.promote_types(torch.promote_types(lo.dtype, hi.dtype), torch.float32)
        return self._from_bounds(lo.to(dtype), hi.to(dtype))

    def encode(self, x: Tensor, qparams: QParams, granularity: Granularity) -> Tensor:
        """The codes of ``x``: same shape, ``self.dtype``; values beyond the range saturate."""
        blocks = granularity.split(x).to(qparams.scale.dtype)
        return granularity.join(self._code(blocks, qparams).to(self.dtype))

    def decode(self, codes: Tensor, qparams: QParams, granularity: Granularity, dtype: torch.dtype) -> Tensor:
        """The values of ``codes``: same shape, ``dtype``, saturating at its largest finite number."""
        value = self._value(granularity.split(codes).to(qparams.scale.dtype), qparams)
        limit = min(torch.finfo(dtype).max, torch.finfo(value.dtype).max)
        return granularity.join(value.clamp(-limit, limit).to(dtype))

    def fake_quantize(self, x: Tensor, granularity: Granularity, range: Range = DYNAMIC) -> Tensor:
        """``x`` as this format sees it: ``decode(encode(x))`` with the range fitted to ``x``; same shape, same dtype."""
        qparams = self.fit(x, granularity, range)
        return self.decode(self.encode(x, qparams, granularity), qparams, granularity, x.dtype)

    def pack(self, codes: Tensor) -> Tensor:
        """Codes [..., K] as dense bytes [..., ceil(K * bits / 8)]."""
        return pack(codes, self.bits)

    def unpack(self, packed: Tensor, size: int) -> Tensor:
        """The inverse of ``pack``: codes [..., size] in ``self.dtype``."""
        return unpack(packed, self.bits, size, signed=self.symmetric)

    def _from_bounds(self, lo: Tensor, hi: Tensor) -> QParams:
        if self.symmetric:
            extent = torch.maximum(-lo, hi)
            return QParams(_normal(extent, extent * (1 / self.qmax)))
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
        extent = hi / 2 - lo / 2
        scale = _normal(torch.maximum(-lo, hi), extent * (2 / self.qmax))
        zero_point = (-lo * scale.reciprocal()).round().clamp(0, self.qmax)
        return QParams(scale, zero_point.nan_to_num().to(torch.int32))  # a NaN would be another integer on each machine

    def _code(self, blocks: Tensor, qparams: QParams) -> Tensor:
        """Codes as floats: an integer dtype would cost the search a conversion each way."""
        code = (blocks * qparams.scale.reciprocal()).round()
        if qparams.zero_point is not None:
            code = code + qparams.zero_point
        return code.clamp(self.qmin, self.qmax)

    def _value(self, codes: Tensor, qparams: QParams) -> Tensor:
        if qparams.zero_point is not None:
            codes = codes - qparams.zero_point
        return codes * qparams.scale


def _normal(extent: Tensor, scale: Tensor) -> Tensor:
    """``scale`` between the smallest normal and the largest number; 1 where ``extent`` is zero, NaN where it is not finite."""
    limits = torch.finfo(scale.dtype)
    scale = torch.where(extent == 0, 1, scale.clamp(limits.tiny, limits.max))
    return torch.where(extent.isfinite(), scale, torch.nan)


def check_finite(name: str, weight: Tensor) -> None:
    """Raise FxquantError if the parameter ``name`` holds a NaN or an infinity: it has no codes, and training went wrong.

    Looks at the data, so it cannot be called on a fake or meta tensor.
    """
    if weight.numel() and not torch.isfinite(weight).all():
        bad = int((~torch.isfinite(weight)).sum())
        raise FxquantError(
            f"parameter {name!r} holds NaN or infinity ({bad} of {weight.numel()} elements), and such a weight cannot be "
            f"quantized; repair it, or add {name!r} to the recipe's ignore"
        )
