"""Where the range [lo, hi] of a block comes from: the data at hand, a search for the least error, or numbers given."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RecipeError
from .granularity import Granularity

RoundTrip = Callable[[Tensor, Tensor], Tensor]
"""``quantized(lo, hi)``: the blocks quantized with that range and dequantized again."""


class _Range(ABC):
    @abstractmethod
    def of(self, blocks: Tensor, granularity: Granularity, quantized: RoundTrip) -> tuple[Tensor, Tensor]:
        """(lo, hi) of every block, each in the shape that ``granularity.reduce`` gives."""


@dataclass(frozen=True)
class Dynamic(_Range):
    """The minimum and maximum of the data at hand: of each call for activations, of each version for weights."""

    def of(self, blocks: Tensor, granularity: Granularity, quantized: RoundTrip) -> tuple[Tensor, Tensor]:
        if any(type(blocks.shape[d]) is int and blocks.shape[d] == 0 for d in granularity.dims(blocks.ndim)):
            nothing = granularity.reduce(torch.sum, blocks)  # amin of nothing raises; the sum of nothing is zero
            return nothing, nothing
        return granularity.reduce(torch.amin, blocks), granularity.reduce(torch.amax, blocks)


DYNAMIC = Dynamic()


@dataclass(frozen=True)
class MinMSE(_Range):
    """The shrunken min-max range of least squared error, block by block: for weights, whose tails few bits cannot afford.

    The grid has ``steps`` shrink factors below 1, evenly down to ``lowest`` (the clip search of AWQ, Lin et al. 2024, on the
    weight's own error). Factor 1 is on the grid and wins ties, so the error is never above that of ``Dynamic()``.
    Costs ``steps + 1`` quantizations.
    """

    steps: int = 20
    lowest: float = 0.5

    def __post_init__(self) -> None:
        if type(self.steps) is not int or self.steps < 1:
            raise RecipeError(f"MinMSE has steps={self.steps!r}, a positive integer is needed, such as MinMSE(steps=20)")
        if type(self.lowest) not in (int, float) or not 0 < self.lowest < 1:
            raise RecipeError(f"MinMSE has lowest={self.lowest!r}, a number between 0 and 1 is needed, such as 0.5")

    def of(self, blocks: Tensor, granularity: Granularity, quantized: RoundTrip) -> tuple[Tensor, Tensor]:
        lo, hi = DYNAMIC.of(blocks, granularity, quantized)
        largest = torch.maximum(-lo, hi)
        unit = torch.where(largest > 0, largest, 1)  # errors relative to the largest magnitude, so that squares stay in range

        def error(shrink: float) -> Tensor:
            return granularity.reduce(torch.sum, ((quantized(lo * shrink, hi * shrink) - blocks) / unit).square())

        best, least = torch.ones_like(lo), error(1.0)
        for step in range(1, self.steps + 1):
            shrink = 1 - (1 - self.lowest) * step / self.steps
            found = error(shrink)
            best = torch.where(found < least, shrink, best)
            least = torch.minimum(found, least)
        return lo * best, hi * best


@dataclass(frozen=True)
class Given(_Range):
    """A static range: ``Given(-4.0, 6.0)`` for every site, ``Given()`` for what the recipe's ``ranges`` lists for the site.

    Values outside saturate. It describes a whole tensor, so the granularity is PerTensor().
    """

    lo: float | None = None
    hi: float | None = None

    def __post_init__(self) -> None:
        if self.lo is None and self.hi is None:
            return
        if self.lo is None or self.hi is None:
            raise RecipeError(f"{self} has one end; give both, or none and list the range of each site in the recipe")
        check_range(self.lo, self.hi, "Given")

    def of(self, blocks: Tensor, granularity: Granularity, quantized: RoundTrip) -> tuple[Tensor, Tensor]:
        if self.lo is None or self.hi is None:
            raise RecipeError("the range of this site is to be given and is not; add (site, lo, hi) to the recipe's ranges")
        return blocks.new_full((), self.lo), blocks.new_full((), self.hi)


def check_range(lo: object, hi: object, where: str) -> None:
    """Raise RecipeError unless ``lo <= hi`` are finite Python numbers."""
    for end in (lo, hi):
        if type(end) not in (int, float) or not math.isfinite(end):  # type: ignore[arg-type]  # the left side has narrowed it
            raise RecipeError(f"{where} has {end!r} as an end of a range, a finite Python number is needed")
    if lo > hi:  # type: ignore[operator]  # both are numbers by now
        raise RecipeError(f"{where} has the range ({lo!r}, {hi!r}), whose low end lies above its high end; swap them")


Range = Dynamic | MinMSE | Given

# What a recipe can name; a new way to a range is one class and one entry here.
RANGES: tuple[type[Range], ...] = (Dynamic, MinMSE, Given)
