"""Observers that keep the smallest and the largest value: of all data, or averaged over the batches."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from .granularity import Granularity
from .observer import Observer, RoundTrip, as_range, batch_of, check_same_rows, extremes_of, number

if TYPE_CHECKING:
    from .formats import Format


class Extremes(NamedTuple):
    """The ends of every row, [R]; [0] before any data."""

    lo: Tensor = torch.empty(0)
    hi: Tensor = torch.empty(0)


class _OfExtremes(Observer):
    """One tensor at hand is one batch, whose extremes are its range."""

    def of(self, blocks: Tensor, granularity: Granularity, quantized: RoundTrip) -> tuple[Tensor, Tensor]:
        return extremes_of(blocks, granularity)


@dataclass(frozen=True)
class MinMax(_OfExtremes):
    """The smallest and the largest value of all data. Merging is exact, in any order."""

    def start(self) -> Extremes:
        return Extremes()

    def update(self, state: Extremes, x: Tensor, granularity: Granularity) -> Extremes:
        batch = batch_of(x, granularity)
        return state if batch is None else self.merge(state, Extremes(batch.lo, batch.hi))

    def merge(self, a: Extremes, b: Extremes) -> Extremes:
        if not len(a.lo) or not len(b.lo):
            return a if len(a.lo) else b
        check_same_rows(len(a.lo), len(b.lo))
        return Extremes(torch.minimum(a.lo, b.lo), torch.maximum(a.hi, b.hi))

    def range(self, state: Extremes, format: "Format", granularity: Granularity) -> tuple[Tensor, Tensor]:
        return as_range(state.lo, state.hi, granularity)


class ByBatch(NamedTuple):
    """The ends of every row of every batch, [batches, R]."""

    lo: Tensor = torch.empty(0, 0)
    hi: Tensor = torch.empty(0, 0)


@dataclass(frozen=True)
class AverageMinMax(_OfExtremes):
    """The mean over the batches of their smallest and of their largest value (what Outlier Suppression calls Avg min-max).

    How the data is cut into batches counts; their order does not, bit for bit.
    """

    def start(self) -> ByBatch:
        return ByBatch()

    def update(self, state: ByBatch, x: Tensor, granularity: Granularity) -> ByBatch:
        batch = batch_of(x, granularity)
        return state if batch is None else self.merge(state, ByBatch(batch.lo[None], batch.hi[None]))

    def merge(self, a: ByBatch, b: ByBatch) -> ByBatch:
        if not len(a.lo) or not len(b.lo):
            return a if len(a.lo) else b
        check_same_rows(a.lo.shape[1], b.lo.shape[1])
        return ByBatch(torch.cat([a.lo, b.lo]), torch.cat([a.hi, b.hi]))

    def range(self, state: ByBatch, format: "Format", granularity: Granularity) -> tuple[Tensor, Tensor]:
        return as_range(mean_over_batches(state.lo), mean_over_batches(state.hi), granularity)


def mean_over_batches(values: Tensor) -> Tensor:
    """The mean of ``values`` [batches, R] over the first axis, summed in the order of their size: any order, the same bits."""
    return values.double().sort(dim=0).values.mean(dim=0) if len(values) else values.reshape(-1)


class Moving(NamedTuple):
    """The moving ends of every row [R], and over how many batches they have moved."""

    lo: Tensor = torch.empty(0, dtype=torch.float64)
    hi: Tensor = torch.empty(0, dtype=torch.float64)
    batches: int = 0


@dataclass(frozen=True)
class MovingAverage(_OfExtremes):
    """The exponential average of the extremes of the batches: ``end = momentum * end + (1 - momentum) * end of the batch``.

    The first batch starts it. Late batches count for more, so the order matters; a merge, the mean of both states weighted by
    their batches, commutes, and is not what one process would have found.
    """

    order_matters: ClassVar[bool] = True
    momentum: float = 0.9

    def __post_init__(self) -> None:
        number("MovingAverage", "momentum", self.momentum, 0, 1)

    def start(self) -> Moving:
        return Moving()

    def update(self, state: Moving, x: Tensor, granularity: Granularity) -> Moving:
        batch = batch_of(x, granularity)
        if batch is None:
            return state
        lo, hi = batch.lo.double(), batch.hi.double()
        if not state.batches:
            return Moving(lo, hi, 1)
        check_same_rows(len(state.lo), len(lo))
        old, new = self.momentum, 1 - self.momentum
        return Moving(old * state.lo + new * lo, old * state.hi + new * hi, state.batches + 1)

    def merge(self, a: Moving, b: Moving) -> Moving:
        if not a.batches or not b.batches:
            return a if a.batches else b
        check_same_rows(len(a.lo), len(b.lo))
        batches = a.batches + b.batches
        lo, hi = ((a.batches * x + b.batches * y) / batches for x, y in ((a.lo, b.lo), (a.hi, b.hi)))
        return Moving(lo, hi, batches)

    def range(self, state: Moving, format: "Format", granularity: Granularity) -> tuple[Tensor, Tensor]:
        return as_range(state.lo, state.hi, granularity)
