"""The range of a weight's blocks by what rounding does to the outputs of the product, on a sample of its inputs.

With ``E = q(W) - W`` the error is ``|| X E^T ||^2``. Outputs, the rows of ``W``, do not meet in it; the groups along a row do:
what one leaves over, the next may make up for. So one group after the other takes the ends of least error of the whole row, the
groups behind it unrounded at first, and then once more with all others as they are.

AWQ's clip search (Lin et al., 2024, in its code) tries one shrink for both ends, of each group by itself.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .granularity import Granularity, PerGroup, PerTensor, PerToken
from .learned import rounded
from .weighted import shrunk

if TYPE_CHECKING:
    from .affine import IntAffine

SHRINKS = tuple(1 - 0.05 * k for k in range(13))
SWEEPS = 2
AT_ONCE = 1 << 20  # outputs of a weight that are looked at at once: rows of it times inputs


def range_of_weight(weight: Tensor, inputs: Tensor, format: "IntAffine", granularity: Granularity) -> tuple[Tensor, Tensor]:
    """(lo, hi), float32, in the shape that ``granularity.reduce`` gives: what ``clipped`` then leaves of ``weight``.

    ``weight`` [..., N, K], ``inputs`` [R, K]: rows whose squared errors add up as those of all tokens. Never worse on them than
    the extremes, where a row of ``weight`` is one block.
    """
    rows, inputs = weight.flatten(0, -2).float(), inputs.float()
    together = isinstance(granularity, PerTensor)
    size = granularity.size if isinstance(granularity, PerGroup) else rows.shape[1]
    columns = [slice(start, start + size) for start in range(0, rows.shape[1], size)]
    parts = [torch.linalg.qr(inputs[:, c]) for c in columns]  # of an error in a part, R alone changes the length
    some = len(rows) if together else max(1, AT_ONCE // max(1, len(inputs)))
    found = [_ends(chunk, inputs, columns, parts, format, together) for chunk in rows.split(some)]
    lo, hi = (torch.cat(end) for end in zip(*found, strict=True))  # [N, groups]
    shape = () if together else (*weight.shape[:-1], *([len(columns)] if isinstance(granularity, PerGroup) else []), 1)
    return lo.reshape(shape), hi.reshape(shape)


def clipped(weight: Tensor, lo: Tensor, hi: Tensor, granularity: Granularity) -> Tensor:
    """``weight`` within the range of each block, so that these are its extremes; an infinity stays, to be found."""
    blocks = granularity.split(weight)
    within = torch.maximum(torch.minimum(blocks, hi), lo)
    return granularity.join(torch.where(blocks.isinf(), blocks, within))


def _ends(
    weight: Tensor,
    inputs: Tensor,
    columns: list[slice],
    parts: list[tuple[Tensor, Tensor]],
    format: "IntAffine",
    together: bool,
) -> tuple[Tensor, Tensor]:
    """(lo, hi) [N, groups] for rows ``weight`` [N, K]; [1, 1] for all of them ``together``."""

    def rounding(x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        return rounded(x, format.from_range(lo[:, None], hi[:, None]), format, PerToken()).sub_(x)

    left = weight.new_zeros(len(weight), len(inputs))  # over in the outputs: of the groups rounded so far
    errors: list[Tensor | None] = [None] * len(columns)
    ends: list[tuple[Tensor, Tensor]] = [(left, left)] * len(columns)
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
            ends[i] = shrunk(error, low, high, low, high, SHRINKS, rounds=0 if format.symmetric else 1)
            errors[i] = now = rounding(x, *ends[i])
            left = left + now @ inputs[:, group].T
    lo, hi = (torch.stack(end, 1) for end in zip(*ends, strict=True))
    if format.symmetric:  # the grid reaches as far on the other side
        hi = torch.maximum(-lo, hi)
        lo = -hi
    return lo, hi
