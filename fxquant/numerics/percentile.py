"""An observer that cuts off the rarest values at either end."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .granularity import Granularity
from .histogram import Histogram, histogram, merged, points
from .observer import Observer, RoundTrip, as_range, batch_of, extremes_of, number

if TYPE_CHECKING:
    from .formats import Format


@dataclass(frozen=True)
class Percentile(Observer):
    """The smallest range that the fraction ``q`` of the values is not above, and the fraction ``q`` not below.

    Of n values sorted, the ceil(q n)-th from either end: exactly so for the tensor at hand; of watched data the far end of its
    bin, 1/256 of its octave (1/32 per channel), and never beyond the extremes. q = 1 is the extremes. Merging is exact.
    """

    q: float = 0.9999

    def __post_init__(self) -> None:
        number("Percentile", "q", self.q, 0.5, 1)

    def start(self) -> Histogram:
        return Histogram()

    def update(self, state: Histogram, x: Tensor, granularity: Granularity) -> Histogram:
        batch = batch_of(x, granularity)
        return state if batch is None else merged(state, histogram(batch))

    def merge(self, a: Histogram, b: Histogram) -> Histogram:
        return merged(a, b)

    def range(self, state: Histogram, format: "Format", granularity: Granularity) -> tuple[Tensor, Tensor]:
        if not len(state.counts) or self.q == 1:
            return as_range(state.lo, state.hi, granularity)
        seen = points(state)
        rank = (self.q * seen.counts.sum(dim=1, keepdim=True)).ceil()
        not_above = seen.counts.cumsum(dim=1)
        not_below = seen.counts.flip(1).cumsum(dim=1).flip(1)
        hi = seen.right.gather(1, (not_above < rank).sum(dim=1, keepdim=True))[:, 0]
        lo = seen.left.gather(1, (not_below >= rank).sum(dim=1, keepdim=True) - 1)[:, 0]
        # both by both: what is too small for the histogram counts as zero, which may lie beyond an extreme
        return as_range(lo.clamp(state.lo, state.hi), hi.clamp(state.lo, state.hi), granularity)

    def of(self, blocks: Tensor, granularity: Granularity, quantized: RoundTrip) -> tuple[Tensor, Tensor]:
        lo, hi = extremes_of(blocks, granularity)
        if lo.numel() == 0 or blocks.numel() == 0:
            return lo, hi

        def ranked(sign: int) -> Tensor:
            def op(x: Tensor, /, *, dim: tuple[int, ...], keepdim: bool) -> Tensor:
                rows = x.movedim(dim, tuple(range(-len(dim), 0))).flatten(-len(dim))
                rank = math.ceil(self.q * rows.shape[-1])
                found = (sign * rows).sort(dim=-1).values.select(-1, rank - 1) * sign  # [..., rank - 1] bakes the rank in
                return _unsqueezed(found, dim) if keepdim else found

            return granularity.reduce(op, blocks)

        # a NaN sorts last and would be cut off; the range of what is not finite is not finite
        finite = lo.isfinite() & hi.isfinite()
        return torch.where(finite, ranked(-1), torch.nan), torch.where(finite, ranked(1), torch.nan)


def _unsqueezed(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    for dim in sorted(dims):
        x = x.unsqueeze(dim)
    return x
