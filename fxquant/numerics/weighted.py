"""The range of least error where every value counts by what it does to something else, such as a model's output.

With ``w`` the squared slope of the output in each value, ``sum w (q(x) - x)^2`` is the squared error of the output to first
order, if the errors of single values are independent (the diagonal of Gauss-Newton). So a tail that nobody reads is cut, and
one that the output hangs on is not; the plain squared error of ``x`` knows no difference.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .granularity import Granularity, PerToken
from .learned import rounded
from .observer import extremes_of

if TYPE_CHECKING:
    from .affine import IntAffine

SHRINKS = tuple(0.9**k for k in range(24))  # down to a twelfth
OF_WEIGHTS = tuple(1 - 0.05 * k for k in range(11))  # whose blocks have no far outliers: nobody trains them to
AT_ONCE = 1 << 18  # numbers of a weight: they stay in the processor's cache


def least_weighted(
    x: Tensor,
    weights: Tensor,
    lo: Tensor,
    hi: Tensor,
    format: "IntAffine",
    *,
    shrinks: Sequence[float] = SHRINKS,
    rounds: int = 2,
) -> tuple[Tensor, Tensor]:
    """(lo, hi), [R] each: of every row of ``x`` [R, n] the range of least ``sum weights (q(x) - x)^2``, never above that of
    the range given.

    Both ends are shrunk together from the extremes of ``x``, then one after the other, ``rounds`` times; a row without weight
    stays.
    """

    def error(lo: Tensor, hi: Tensor) -> Tensor:
        off = rounded(x, format.from_range(lo[:, None], hi[:, None]), format, PerToken()).sub_(x)
        return off.square_().mul_(weights).sum(dim=1, dtype=torch.float64)

    low, high = (end.to(lo.dtype) for end in torch.aminmax(x, dim=1))
    low, high = torch.minimum(low, lo.new_zeros(())), torch.maximum(high, hi.new_zeros(()))
    best = error(lo, hi)

    def try_(l: Tensor, h: Tensor) -> None:
        nonlocal lo, hi, best
        better = (found := error(l, h)) < best
        lo, hi, best = torch.where(better, l, lo), torch.where(better, h, hi), torch.where(better, found, best)

    for shrink in shrinks:
        try_(low * shrink, high * shrink)
    for _ in range(rounds):
        for shrink in shrinks:
            try_(lo, high * shrink)
        for shrink in shrinks:
            try_(low * shrink, hi)
    return lo, hi


def range_of_weight(
    weight: Tensor, mean_square: Tensor, format: "IntAffine", granularity: Granularity
) -> tuple[Tensor, Tensor]:
    """(lo, hi), float32: of every block of ``weight`` [N, K] the range of least error under ``mean_square`` [K] of its input.

    Each end has the shape that ``granularity.reduce`` gives: what lies in between is what ``clipped`` leaves of the weight.
    """
    blocks = granularity.split(weight.float())
    weights = granularity.split(mean_square.to(blocks).expand(weight.shape))
    ends = extremes_of(blocks, granularity)
    shared = granularity.dims(blocks.ndim)
    order = [d for d in range(blocks.ndim) if d not in shared] + list(shared)
    kept = blocks.ndim - len(shared)
    if not kept:
        blocks, weights, order, kept = blocks[None], weights[None], [0, *(d + 1 for d in order)], 1
    blocks, weights = blocks.permute(order), weights.permute(order)
    starts = [end.reshape(blocks.shape[:kept]) for end in (ends[0].clamp(max=0), ends[1].clamp(min=0))]
    size = max(1, AT_ONCE * len(blocks) // max(1, blocks.numel()))
    found: list[tuple[Tensor, Tensor]] = []
    for x, w, lo, hi in zip(*(t.split(size) for t in (blocks, weights, *starts)), strict=True):
        rows, of_rows = (t.flatten(kept).flatten(0, kept - 1) for t in (x, w))
        found.append(least_weighted(rows, of_rows, lo.flatten(), hi.flatten(), format, shrinks=OF_WEIGHTS, rounds=1))
    lo, hi = (torch.cat(end).reshape(ends[0].shape) for end in zip(*found, strict=True))
    if format.symmetric:  # the grid reaches as far on the other side
        hi = torch.maximum(-lo, hi)
        lo = -hi
    return lo, hi


def clipped(weight: Tensor, lo: Tensor, hi: Tensor, granularity: Granularity) -> Tensor:
    """``weight`` within the range of each block, so that these are its extremes; an infinity stays, to be found."""
    blocks = granularity.split(weight)
    within = torch.maximum(torch.minimum(blocks, hi), lo)
    return granularity.join(torch.where(blocks.isinf(), blocks, within))
