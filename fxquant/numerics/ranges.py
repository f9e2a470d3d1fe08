"""Where the range [lo, hi] of a block comes from: the data at hand, numbers given, an observer, or a product's outputs."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RecipeError
from .granularity import Granularity, PerChannel, PerTensor
from .least_error import MinMSE as MinMSE
from .observer import Observer, RoundTrip, extremes_of
from .observers import OBSERVERS


class _Range(ABC):
    @abstractmethod
    def of(self, blocks: Tensor, granularity: Granularity, quantized: RoundTrip) -> tuple[Tensor, Tensor]:
        """(lo, hi) of every block, each in the shape that ``granularity.reduce`` gives."""


@dataclass(frozen=True)
class Dynamic(_Range):
    """The minimum and maximum of the data at hand: of each call for activations, of each version for weights."""

    def of(self, blocks: Tensor, granularity: Granularity, quantized: RoundTrip) -> tuple[Tensor, Tensor]:
        return extremes_of(blocks, granularity)


DYNAMIC = Dynamic()

End = float | tuple[float, ...]


@dataclass(frozen=True)
class Given(_Range):
    """A static range: ``Given(-4.0, 6.0)`` for every site, ``Given()`` for what the recipe's ``ranges`` lists for the site.

    Values outside saturate. Two numbers are the range of a tensor, PerTensor(); two tuples (lists will do) hold one range for
    each index of the last axis, PerChannel(-1).
    """

    lo: End | None = None
    hi: End | None = None

    def __post_init__(self) -> None:
        if self.lo is None and self.hi is None:
            return
        if self.lo is None or self.hi is None:
            raise RecipeError(f"{self} has one end; give both, or none and list the range of each site in the recipe")
        if not isinstance(self.lo, list | tuple) and not isinstance(self.hi, list | tuple):
            check_range(self.lo, self.hi, "Given")
            return
        los, his = (tuple(end) if isinstance(end, list | tuple) else () for end in (self.lo, self.hi))
        if len(los) != len(his) or not los:
            raise RecipeError(f"Given has {len(los)} low and {len(his)} high ends, as many of both are needed, one per channel")
        for channel, (lo, hi) in enumerate(zip(los, his, strict=True)):
            check_range(lo, hi, f"channel {channel} of Given")
        object.__setattr__(self, "lo", los)
        object.__setattr__(self, "hi", his)

    @property
    def per_channel(self) -> bool:
        """Whether there is a range for every channel."""
        return isinstance(self.lo, tuple)

    @property
    def granularity(self) -> Granularity:
        """The granularity that these numbers are of."""
        return PerChannel(-1) if self.per_channel else PerTensor()

    def of(self, blocks: Tensor, granularity: Granularity, quantized: RoundTrip) -> tuple[Tensor, Tensor]:
        if self.lo is None or self.hi is None:
            raise RecipeError("the range of this site is to be given and is not; add (site, lo, hi) to the recipe's ranges")
        if not isinstance(self.lo, tuple):
            return blocks.new_full((), self.lo), blocks.new_full((), self.hi)  # type: ignore[arg-type]  # a tuple has a tuple
        if blocks.shape[-1] != len(self.lo):
            raise RecipeError(f"Given has ranges of {len(self.lo)} channels, the tensor has {blocks.shape[-1]}")
        shape = (*[1] * (blocks.ndim - 1), len(self.lo))
        lo, hi = (torch.tensor(end, dtype=blocks.dtype, device=blocks.device).reshape(shape) for end in (self.lo, self.hi))
        return lo, hi


@dataclass(frozen=True)
class OutputMSE(_Range):
    """For weights: the ranges of least squared error of the product's outputs, on inputs that calibration samples.

    ``fxquant.calibrate`` looks for them (numerics/of_outputs.py) and keeps them in the plan; a weight without one stays in
    floating point.
    """

    def of(self, blocks: Tensor, granularity: Granularity, quantized: RoundTrip) -> tuple[Tensor, Tensor]:
        raise RecipeError(
            "OutputMSE() takes no range of the weight alone, it depends on what the weight is multiplied by; give the recipe "
            "to fxquant.calibrate() and compile with its plan, or use MinMSE()"
        )


def check_range(lo: object, hi: object, where: str) -> None:
    """Raise RecipeError unless ``lo <= hi`` are finite Python numbers."""
    for end in (lo, hi):
        if type(end) not in (int, float) or not math.isfinite(end):  # type: ignore[arg-type]  # the left side has narrowed it
            raise RecipeError(f"{where} has {end!r} as an end of a range, a finite Python number is needed")
    if lo > hi:  # type: ignore[operator]  # both are numbers by now
        raise RecipeError(f"{where} has the range ({lo!r}, {hi!r}), whose low end lies above its high end; swap them")


Range = Dynamic | Given | OutputMSE | Observer

# What a recipe can name; a new way to a range is one class and one entry here, an observer one in observers.py.
RANGES: tuple[type[Range], ...] = (Dynamic, Given, OutputMSE, *OBSERVERS)
