"""What an observer is: a way to a range [lo, hi] that watches data batch by batch, keeps little of it, and can be merged.

An observer is a Range as well, so a weight, whose data is at hand, takes one as it is (``of``). An activation is watched:

    state = observer.start()
    state = observer.update(state, x, granularity)          # for each batch; x [tokens, channels]
    state = observer.merge(state, of_another_process)
    lo, hi = observer.range(state, format, granularity)

States are named tuples of CPU tensors, small beside the data, and are never changed: ``update`` and ``merge`` return new ones.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..errors import CalibrationError, RecipeError
from .granularity import Granularity, PerChannel, PerTensor

if TYPE_CHECKING:
    from .formats import Format

RoundTrip = Callable[[Tensor, Tensor], Tensor]
"""``quantized(lo, hi)``: the blocks quantized with that range and dequantized again."""


class Observer(ABC):
    """A frozen dataclass of JSON values. ``State`` stands for what ``start`` returns, a type of the observer's own."""

    order_matters: ClassVar[bool] = False
    """Whether batches in another order, or shared out to processes, may give another range (beyond rounding)."""

    @property
    def learned(self) -> bool:
        """Whether the range is where learning starts from (learned.py) rather than the result."""
        return False

    @abstractmethod
    def start(self) -> Any:
        """The state that has seen nothing."""

    @abstractmethod
    def update(self, state: Any, x: Tensor, granularity: Granularity) -> Any:
        """The state after one more batch ``x`` [tokens, channels], float, without padding; an empty batch changes nothing.

        Raises CalibrationError for a NaN or an infinity, and for another number of channels than before.
        """

    @abstractmethod
    def merge(self, a: Any, b: Any) -> Any:
        """The state that has seen what ``a`` and ``b`` have seen."""

    @abstractmethod
    def range(self, state: Any, format: "Format", granularity: Granularity) -> tuple[Tensor, Tensor]:
        """(lo, hi), float32 on the CPU: [] for PerTensor(), [channels] for PerChannel(-1).

        Raises CalibrationError where nothing was seen.
        """

    @abstractmethod
    def of(self, blocks: Tensor, granularity: Granularity, quantized: RoundTrip) -> tuple[Tensor, Tensor]:
        """(lo, hi) of every block of the tensor at hand, in the shape that ``granularity.reduce`` gives; it traces."""


class Batch(NamedTuple):
    """A batch as *rows* that share one range each: one row for PerTensor(), one per channel for PerChannel(-1)."""

    rows: Tensor  # [R, n] float32
    lo: Tensor  # [R], on the CPU as all that states are made of
    hi: Tensor


def batch_of(x: Tensor, granularity: Granularity) -> Batch | None:
    """``x`` [tokens, channels] as rows, None if there is nothing in it; raises as ``Observer.update`` says."""
    check_watched(granularity)
    if x.ndim != 2 or not x.is_floating_point():
        raise CalibrationError(
            f"an observer is shown a tensor of shape {list(x.shape)} and dtype {x.dtype}, floats [tokens, channels] are needed"
        )
    if not x.numel():
        return None
    x = x.detach().to(torch.float32)
    rows = x.reshape(1, -1) if isinstance(granularity, PerTensor) else x.T
    lo, hi = torch.aminmax(rows, dim=1)  # a NaN is the extreme of its row
    if not (lo.isfinite() & hi.isfinite()).all():
        bad = int((~x.isfinite()).sum())
        raise CalibrationError(
            f"{bad} of {x.numel()} values shown to an observer are NaN or infinite in float32, and no range holds them; "
            "repair the model or the data, or leave the site alone with the recipe's ignore"
        )
    return Batch(rows, lo.cpu(), hi.cpu())


def check_watched(granularity: Granularity) -> None:
    """Raise RecipeError unless a static range has this granularity."""
    if not (isinstance(granularity, PerTensor) or granularity == PerChannel(-1)):
        raise RecipeError(f"an observed range has the granularity {granularity}; use PerTensor() or PerChannel(-1)")


def check_same_rows(a: int, b: int) -> None:
    """Raise CalibrationError unless both states, or the state and the batch, have as many rows."""
    if a != b:
        raise CalibrationError(
            f"an observer that has watched {a} channels is shown {b} (a whole tensor counts as one); "
            "keep one state for each site and granularity"
        )


def as_range(lo: Tensor, hi: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """The ends of every row [R] in the shape that ``Observer.range`` promises."""
    check_watched(granularity)
    if not lo.numel():
        raise CalibrationError("the range of a site is asked for, and no data was seen there; run the model on some batches")
    lo, hi = lo.to(torch.float32), hi.to(torch.float32)
    if isinstance(granularity, PerTensor):
        check_same_rows(len(lo), 1)
        return lo.reshape(()), hi.reshape(())
    return lo, hi


def extremes_of(blocks: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """The minimum and the maximum of every block, zero where a block is empty."""
    if any(type(blocks.shape[d]) is int and blocks.shape[d] == 0 for d in granularity.dims(blocks.ndim)):
        nothing = granularity.reduce(torch.sum, blocks)  # amin of nothing raises; the sum of nothing is zero
        return nothing, nothing
    return granularity.reduce(torch.amin, blocks), granularity.reduce(torch.amax, blocks)


def for_activations(observer: Observer, why: str) -> RecipeError:
    """The error of an observer that cannot take the range of the tensor at hand."""
    return RecipeError(
        f"{observer} takes no range of the tensor at hand: {why}; it is for activations that calibration watches. "
        "Use MinMSE() or Percentile() for weights"
    )


def number(owner: str, name: str, value: object, low: float, high: float) -> None:
    """Raise RecipeError unless ``value`` is a Python number with ``low < value <= high``."""
    if type(value) not in (int, float) or not low < value <= high:  # type: ignore[operator]  # the left side has narrowed it
        raise RecipeError(f"{owner} has {name}={value!r}, a number above {low} and at most {high} is needed")


def count(owner: str, name: str, value: object) -> None:
    """Raise RecipeError unless ``value`` is a positive integer."""
    if type(value) is not int or value < 1:
        raise RecipeError(f"{owner} has {name}={value!r}, a positive integer is needed")
