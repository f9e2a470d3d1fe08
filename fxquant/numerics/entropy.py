"""An observer that keeps the distribution: the range of least Kullback-Leibler divergence between values and codes.

After Migacz, "8-bit inference with TensorRT" (2017), on bins of any width and with two ends. P is the histogram with what lies
outside the range moved to its outermost bins inside; Q has of every code the mass inside, spread over the bins of the code that
are not empty, in proportion to their widths. Zero is left out: every range has a code for it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .granularity import Granularity
from .histogram import Histogram, Points, ends, histogram, merged, points, rounded
from .observer import Observer, RoundTrip, as_range, batch_of, count, for_activations

if TYPE_CHECKING:
    from .formats import Format

OCTAVES = 12  # no range is searched below 2^-12 of the extremes


@dataclass(frozen=True)
class Entropy(Observer):
    """The range of least divergence, on a grid of ``steps`` per octave below the extremes; merging is exact.

    Magnitudes are cut first; then, under a grid with a zero point, each end moves by itself.
    """

    steps: int = 4

    def __post_init__(self) -> None:
        count("Entropy", "steps", self.steps)

    def start(self) -> Histogram:
        return Histogram()

    def update(self, state: Histogram, x: Tensor, granularity: Granularity) -> Histogram:
        batch = batch_of(x, granularity)
        return state if batch is None else merged(state, histogram(batch))

    def merge(self, a: Histogram, b: Histogram) -> Histogram:
        return merged(a, b)

    def range(self, state: Histogram, format: "Format", granularity: Granularity) -> tuple[Tensor, Tensor]:
        if not len(state.counts):
            return as_range(state.lo, state.hi, granularity)
        seen, whole = points(state), ends(state)
        symmetric = getattr(format, "symmetric", False)
        reach = torch.maximum(-whole.lo, whole.hi)
        one = torch.ones_like(reach)

        def loss(low: Tensor, high: Tensor) -> Tensor:
            if symmetric:
                inside = torch.maximum(-whole.lo * low, whole.hi * high)
                return divergence(seen, format, -inside, inside)
            return divergence(seen, format, whole.lo * low, whole.hi * high)

        low = high = one
        least = loss(low, high)
        for moved in ("both",) if symmetric else ("both", "low", "high"):
            stays_low, stays_high = low, high
            for step in range(1 if moved == "both" else 0, OCTAVES * self.steps + 1):
                factor = one * 2.0 ** (-step / self.steps)
                tried_low, tried_high = whole.at(factor) if moved == "both" else (factor, factor)
                tried_low = stays_low if moved == "high" else tried_low
                tried_high = stays_high if moved == "low" else tried_high
                found = loss(tried_low, tried_high)
                low, high = torch.where(found < least, tried_low, low), torch.where(found < least, tried_high, high)
                least = torch.minimum(found, least)
        return as_range((whole.lo * low)[:, 0], (whole.hi * high)[:, 0], granularity)

    def of(self, blocks: Tensor, granularity: Granularity, quantized: RoundTrip) -> tuple[Tensor, Tensor]:
        raise for_activations(self, "a divergence needs a histogram of many values, and a block has few")


def divergence(seen: Points, format: "Format", lo: Tensor, hi: Tensor) -> Tensor:
    """KL(P || Q) of every row [R, 1], as the docstring of this file defines it; infinite where nothing but zero is inside.

    ``lo``, ``hi`` [R, 1]: the ends, the same on both sides for a symmetric grid.
    """
    counts = torch.where(seen.values == 0, 0, seen.counts)
    total = counts.sum(dim=1, keepdim=True)
    inside = (counts > 0) & (seen.values >= lo) & (seen.values <= hi)
    kept = torch.where(inside, counts, 0)

    reference = kept.clone()
    place = torch.arange(counts.shape[1]).expand_as(counts)
    first = torch.where(inside, place, counts.shape[1] - 1).amin(dim=1, keepdim=True)
    last = torch.where(inside, place, 0).amax(dim=1, keepdim=True)
    reference.scatter_add_(1, first, torch.where(seen.values < lo, counts, 0).sum(dim=1, keepdim=True))
    reference.scatter_add_(1, last, torch.where(seen.values > hi, counts, 0).sum(dim=1, keepdim=True))

    value = rounded(seen.values, format, lo, hi)
    code = torch.nn.functional.pad((value.diff(dim=1) != 0).long().cumsum(dim=1), (1, 0))  # numbered along the row
    widths = torch.where(inside, (seen.right - seen.left).double(), 0)
    mass, width = (torch.zeros_like(counts).scatter_add(1, code, x).gather(1, code) for x in (kept, widths))
    model = mass * widths / width

    p, q = reference / total, model / kept.sum(dim=1, keepdim=True)
    found = torch.where(inside, p * (p / q).log(), 0).sum(dim=1, keepdim=True)
    empty = ~inside.any(dim=1, keepdim=True)
    return torch.where(empty, torch.where(total > 0, torch.inf, 0.0), found)
