"""The range of least error where every value counts by what it does to something else, such as a model's output.

With ``w`` the squared slope of the output in each value, ``sum w (q(x) - x)^2`` is the squared error of the output to first
order, if the errors of single values are independent (the diagonal of Gauss-Newton). So a tail that nobody reads is cut, and
one that the output hangs on is not; the plain squared error of ``x`` knows no difference.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .granularity import PerToken
from .learned import rounded

if TYPE_CHECKING:
    from .affine import IntAffine

SHRINKS = tuple(0.9**k for k in range(24))  # down to a twelfth


def least_weighted(x: Tensor, weights: Tensor, lo: Tensor, hi: Tensor, format: "IntAffine") -> tuple[Tensor, Tensor]:
    """(lo, hi), [R] each: of every row of ``x`` [R, n] the range of least ``sum weights (q(x) - x)^2``, never above that of
    the range given.

    Both ends are shrunk together from the extremes of ``x``, then one after the other, twice; a row without weight stays.
    """

    def error(lo: Tensor, hi: Tensor) -> Tensor:
        off = rounded(x, format.from_range(lo[:, None], hi[:, None]), format, PerToken()).sub_(x)
        return off.square_().mul_(weights).sum(dim=1, dtype=torch.float64)

    low, high = (end.to(lo.dtype) for end in torch.aminmax(x, dim=1))
    low, high = torch.minimum(low, lo.new_zeros(())), torch.maximum(high, hi.new_zeros(()))
    return shrunk(error, low, high, lo, hi, SHRINKS, rounds=2)


def shrunk(
    error: Callable[[Tensor, Tensor], Tensor],
    low: Tensor,
    high: Tensor,
    lo: Tensor,
    hi: Tensor,
    shrinks: Sequence[float],
    rounds: int,
) -> tuple[Tensor, Tensor]:
    """(lo, hi), [R] each, of least ``error(lo, hi)`` [R] among those given and those tried: never worse than those given.

    Tried are ``low`` and ``high`` times each of ``shrinks``, both together, then one after the other, ``rounds`` times.
    """
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
