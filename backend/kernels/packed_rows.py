"""A look-up in a quantized table: only the rows asked for are unpacked and decoded, the table itself stays packed."""

import torch
from torch import Tensor

from fxquant.graph.match import Miss
from fxquant.numerics.affine import IntAffine, QParams
from fxquant.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from fxquant.recipe import Spec

from .kernel import Claim

NAME = "packed rows, decoded on look-up"


def supports(table: Tensor, spec: Spec) -> Claim | Miss:
    """Integers of any width, one scale per tensor, row, or group of a row."""
    if not isinstance(spec.format, IntAffine):
        return Miss(f"the table is {spec.brief}, integers are needed")
    if isinstance(spec.granularity, PerChannel) and spec.granularity != PerChannel(0):
        return Miss(f"the table has one scale per index of axis {spec.granularity.axis}; rows, axis 0, are looked up")
    return Claim(NAME)


def pack(table: Tensor, spec: Spec) -> tuple[Tensor, ...]:
    """[V, K] -> packed uint8 [V, ceil(K*bits/8)], scale, and zero point if there is one, with V first (or [] for a tensor)."""
    qparams = spec.fit(table)
    return tuple(t for t in (spec.format.pack(spec.encode(table, qparams)), *qparams) if t is not None)


def look_up(packed: tuple[Tensor, ...], indices: Tensor, spec: Spec, width: int, dtype: torch.dtype) -> Tensor:
    """The rows [*indices, K] of the packed table, decoded."""
    words, *qparams = packed
    one = isinstance(spec.granularity, PerTensor)
    chosen = QParams(*(q if one else q[indices] for q in qparams))
    codes = spec.format.unpack(words[indices], width)
    granularity = spec.granularity if isinstance(spec.granularity, PerTensor | PerGroup) else PerToken()
    return spec.format.decode(codes, chosen, granularity, dtype)
