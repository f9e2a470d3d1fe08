"""The range of a weight's blocks by what rounding does to the outputs of the product, on a sample of its inputs.

With ``E = q(W) - W`` the error is ``|| X E^T ||^2``. Outputs, the rows of ``W``, do not meet in it; the groups along a row do:
what one leaves over, the next may make up for. So one group after the other takes the ends of least error of the whole row, the
groups behind it unrounded at first, and then once more with all others as they are.

Kept is which share of the extremes that is, not the range itself: a scale on the rows of a weight, or a change of the weight
after calibration, leaves the share as it is.

AWQ's clip search (Lin et al., 2024, in its code) tries one shrink for both ends, of each group by itself.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .granularity import Granularity, PerGroup, PerTensor, PerToken
from .learned import rounded
from .observer import extremes_of
from .weighted import shrunk

if TYPE_CHECKING:
    from .affine import IntAffine

SHRINKS = tuple(1 - 0.05 * k for k in range(13))
SWEEPS = 2
AT_ONCE = 1 << 20  # outputs of a weight that are looked at at once: rows of it times inputs


def clips_of(weight: Tensor, inputs: Tensor, format: "IntAffine", granularity: Granularity) -> tuple[Tensor, Tensor]:
    """(low, high), float32, in the shape that ``granularity.reduce`` gives: the shares of the extremes for ``clipped``.

    ``weight`` [..., N, K], one block or several along K. ``inputs`` [R, K]: their squared errors add up as those of all tokens.
    Where a row of ``weight`` is one block, and in float32, never worse on them than the extremes.
    """
    rows, inputs = weight.flatten(0, -2).float(), inputs.float()
    together = isinstance(granularity, PerTensor)
    size = granularity.size if isinstance(granularity, PerGroup) else rows.shape[1]
    columns = [slice(start, start + size) for start in range(0, rows.shape[1], size)]
    parts = [torch.linalg.qr(inputs[:, c]) for c in columns]  # of an error in a part, R alone changes the length
    some = len(rows) if together else max(1, AT_ONCE // max(1, len(inputs)))
    found = [_shares(chunk, inputs, columns, parts, format, together) for chunk in rows.split(some)]
    low, high = (torch.cat(share) for share in zip(*found, strict=True))  # [N, groups]
    shape = () if together else (*weight.shape[:-1], *([len(columns)] if isinstance(granularity, PerGroup) else []), 1)
    return low.reshape(shape), high.reshape(shape)


def clipped(weight: Tensor, low: Tensor, high: Tensor, granularity: Granularity, symmetric: bool) -> Tensor:
    """``weight`` within these shares of each block's extremes; on a ``symmetric`` grid the larger one is that of both sides.

    What a block's scale is fitted to afterwards is that range. An infinity stays, to be found.
    """
    blocks = granularity.split(weight)
    lo, hi = extremes_of(blocks, granularity)
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    if symmetric:
        hi = torch.maximum(-lo, hi)
        lo = -hi
    return granularity.join(torch.maximum(torch.minimum(blocks, hi * high), lo * low))


def _shares(
    weight: Tensor,
    inputs: Tensor,
    columns: list[slice],
    parts: list[tuple[Tensor, Tensor]],
    format: "IntAffine",
    together: bool,
) -> tuple[Tensor, Tensor]:
    """(low, high) [N, groups] for rows ``weight`` [N, K]; [1, 1] for all of them ``together``."""

    def rounding(x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        return rounded(x, format.from_range(lo[:, None], hi[:, None]), format, PerToken()).sub_(x)

    left = weight.new_zeros(len(weight), len(inputs))  # over in the outputs: of the groups rounded so far
    errors: list[Tensor | None] = [None] * len(columns)
    shares: dict[int, tuple[Tensor, Tensor]] = {}
    for _ in range(SWEEPS if len(columns) > 1 else 1):
        for i, (group, (q, r)) in enumerate(zip(columns, parts, strict=True)):
            x, before = weight[:, group], errors[i]
            if before is not None:
                left = left - before @ inputs[:, group].T
            rest = left @ q

            def error(lo: Tensor, hi: Tensor, x: Tensor = x, rest: Tensor = rest, r: Tensor = r) -> Tensor:
                off = torch.addmm(rest, rounding(x, lo, hi), r.T).square_()
                return off.sum()[None] if together else off.sum(1)

            low, high = (end.reshape(1) for end in torch.aminmax(x)) if together else torch.aminmax(x, dim=1)
            low, high = low.clamp(max=0), high.clamp(min=0)
            if format.symmetric:
                high = torch.maximum(-low, high)
                low = -high
            lo, hi = shrunk(error, low, high, low, high, SHRINKS, rounds=0 if format.symmetric else 1)
            errors[i] = now = rounding(x, lo, hi)
            left = left + now @ inputs[:, group].T
            shares[i] = torch.where(low == 0, 1, lo / low), torch.where(high == 0, 1, hi / high)
    low, high = (torch.stack(share, 1) for share in zip(*shares.values(), strict=True))
    return low, high
