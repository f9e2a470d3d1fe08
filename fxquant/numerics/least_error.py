"""Observers that search the range of least squared error: on a grid of shrink factors, or by golden section.

Both start from the extremes, judge a range by the format's own arithmetic, and keep the extremes where nothing is better.

The tensor at hand is judged itself, and both ends of a block shrink together: the error is never above that of ``Dynamic()``.

Watched data is judged by its histogram, down to 2^-12 of its extremes. Magnitudes are cut first; then, under a grid with a
zero point, each end moves by itself: up to 11 % less error than both ends shrunk together, where a channel of outliers sits on
one side. The distance from a value to a grid changes by no more than the value does, and the histogram moves no
value by more than 1/512 of it (1/64 per channel; and what is below 2^-23, 2^-15, of the largest to zero). So the root mean
squared error of the range found is above that of the extremes by at most twice this part of the root mean square of the data.
Merging is exact.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import RecipeError
from .granularity import Granularity
from .histogram import Histogram, ends, histogram, merged, points, rounded
from .observer import Observer, RoundTrip, as_range, batch_of, count, extremes_of

if TYPE_CHECKING:
    from .formats import Format

Error = Callable[[Tensor | float], Tensor]
"""From the shrink factor of every block to the error of every block."""

OCTAVES = 12  # no range is searched below 2^-12 of the extremes


class _LeastError(Observer):
    """What both searches share; ``least`` and ``deepest`` are their own."""

    @abstractmethod
    def least(self, error: Error, whole: Tensor, octaves: int) -> Tensor:
        """The factor of least error of every block, 1 on a tie, in the shape of ``whole``, which is all ones."""

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

        def error(low: Tensor | float, high: Tensor | float) -> Tensor:
            off = rounded(seen.values, format, whole.lo * low, whole.hi * high).double() - seen.values
            return (seen.counts * off.square()).sum(dim=1, keepdim=True)

        one = torch.ones_like(whole.lo)
        low, high = whole.at(self.least(lambda f: error(*whole.at(f)), one, OCTAVES))
        if not getattr(format, "symmetric", False):
            found = self.least(lambda f: error(f, high), one, OCTAVES)
            low = torch.where(error(found, high) < error(low, high), found, low)
            found = self.least(lambda f: error(low, f), one, OCTAVES)
            high = torch.where(error(low, found) < error(low, high), found, high)
        return as_range((whole.lo * low)[:, 0], (whole.hi * high)[:, 0], granularity)

    def of(self, blocks: Tensor, granularity: Granularity, quantized: RoundTrip) -> tuple[Tensor, Tensor]:
        lo, hi = extremes_of(blocks, granularity)
        largest = torch.maximum(-lo, hi)
        unit = torch.where(largest > 0, largest, 1)  # errors relative to the largest magnitude, so that squares stay in range

        def error(shrink: Tensor | float) -> Tensor:
            return granularity.reduce(torch.sum, ((quantized(lo * shrink, hi * shrink) - blocks) / unit).square())

        best = self.least(error, torch.ones_like(lo), 1)
        return lo * best, hi * best


@dataclass(frozen=True)
class MinMSE(_LeastError):
    """The best of a grid of ``steps`` shrink factors below 1, evenly down to ``lowest``, block by block.

    The clip search of AWQ (Lin et al. 2024) on the error of the values themselves. Factor 1 is on the grid and wins ties. For
    watched data the grid is laid again below ``lowest``, and below that. Costs ``steps + 1`` quantizations of a weight.
    """

    steps: int = 20
    lowest: float = 0.5

    def __post_init__(self) -> None:
        count("MinMSE", "steps", self.steps)
        if type(self.lowest) not in (int, float) or not 0 < self.lowest < 1:
            raise RecipeError(f"MinMSE has lowest={self.lowest!r}, a number between 0 and 1 is needed, such as 0.5")

    def least(self, error: Error, whole: Tensor, octaves: int) -> Tensor:
        best, least = whole, error(1.0)
        for shrink in self._grid(octaves):
            found = error(shrink)
            best = torch.where(found < least, shrink, best)
            least = torch.minimum(found, least)
        return best

    def _grid(self, octaves: int) -> Iterator[float]:
        top = 1.0
        for _ in range(octaves):
            yield from (top * (1 - (1 - self.lowest) * step / self.steps) for step in range(1, self.steps + 1))
            top *= self.lowest
            if top <= 2.0**-OCTAVES:
                return


@dataclass(frozen=True)
class GoldenMSE(_LeastError):
    """Golden section: ``steps`` ever smaller brackets around the best power of two of the extremes, block by block.

    Finds what the grid finds for a third of its quantizations where the error has one minimum, as it has on smooth data; on few
    values or few bits it has several, and one of them is found. Factor 1 is tried and wins ties.
    """

    steps: int = 8

    def __post_init__(self) -> None:
        count("GoldenMSE", "steps", self.steps)

    def least(self, error: Error, whole: Tensor, octaves: int) -> Tensor:
        best, least = whole, error(1.0)
        for octave in range(1, octaves + 1):
            found = error(2.0**-octave)
            best = torch.where(found < least, 2.0**-octave, best)
            least = torch.minimum(found, least)
        a, b = best / 2, (best * 2).clamp(max=1)
        golden = (5**0.5 - 1) / 2
        left, right = b - golden * (b - a), a + golden * (b - a)
        at_left, at_right = error(left), error(right)
        for step in range(self.steps):
            best = torch.where(at_left < least, left, best)
            least = torch.minimum(at_left, least)
            best = torch.where(at_right < least, right, best)
            least = torch.minimum(at_right, least)
            if step == self.steps - 1:
                break
            down = at_left < at_right  # the minimum lies in [a, right], else in [left, b]
            a, b = torch.where(down, a, left), torch.where(down, right, b)
            tried = torch.where(down, b - golden * (b - a), a + golden * (b - a))
            at_tried = error(tried)
            left, right = torch.where(down, tried, right), torch.where(down, left, tried)
            at_left, at_right = torch.where(down, at_tried, at_right), torch.where(down, at_left, at_tried)
        return best
