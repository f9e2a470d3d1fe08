"""How many numbers share one scale: the whole tensor, a channel, a group along the last axis, a token.

A granularity sees a tensor as *blocks* (``split``), reduces each block to one number (``reduce``), and puts codes back into
the shape of the tensor (``join``). What ``reduce`` returns broadcasts against the blocks, and so do scales and zero points:

=============== ==================== =================== ====================
granularity     tensor               blocks              scale
=============== ==================== =================== ====================
PerTensor()     [..., K]             [..., K]            []
PerChannel(0)   [N, K]               [N, K]              [N, 1]
PerChannel(-1)  [N, K]               [N, K]              [1, K]
PerGroup(G)     [..., K]             [..., K/G, G]       [..., K/G, 1]
PerToken()      [..., K]             [..., K]            [..., 1]
=============== ==================== =================== ====================

Sizes are never turned into Python integers, so all of it traces with symbolic shapes.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import FxquantError, RecipeError


class Reduction(Protocol):
    """``torch.amax`` and its like: reduces ``dim`` of a tensor, keeping the reduced axes as size 1 on request."""

    def __call__(self, x: Tensor, /, *, dim: tuple[int, ...], keepdim: bool) -> Tensor: ...


class _Blocks(ABC):
    """What the four granularities share; ``dims`` and ``refusal`` are their own."""

    @abstractmethod
    def dims(self, ndim: int) -> tuple[int, ...]:
        """The axes of ``ndim``-dimensional *blocks* that share one scale."""

    @abstractmethod
    def refusal(self, shape: Sequence[Any]) -> str | None:
        """Why a tensor of this shape cannot be split so, as a half sentence; None if it can."""

    def split(self, x: Tensor) -> Tensor:
        """``x`` as blocks: a view. Raises FxquantError where ``refusal`` has a reason."""
        if reason := self.refusal(x.shape):
            raise FxquantError(f"{self} does not fit a tensor of shape {list(x.shape)}: {reason}")
        return x

    def join(self, blocks: Tensor) -> Tensor:
        """The inverse of ``split``, for codes and decoded values as well."""
        return blocks

    def reduce(self, op: Reduction, blocks: Tensor) -> Tensor:
        """``op`` over each block, in the shape that broadcasts against the blocks.

        >>> PerToken().reduce(torch.amax, torch.ones(2, 7, 5)).shape        # doctest: +SKIP
        torch.Size([2, 7, 1])
        """
        dims = self.dims(blocks.ndim)
        return op(blocks, dim=dims, keepdim=True) if dims else blocks  # torch reads dim=() as "all axes"


@dataclass(frozen=True)
class PerTensor(_Blocks):
    """One scale, of shape []."""

    def dims(self, ndim: int) -> tuple[int, ...]:
        return tuple(range(ndim))

    def refusal(self, shape: Sequence[Any]) -> str | None:
        return None

    def reduce(self, op: Reduction, blocks: Tensor) -> Tensor:
        return op(blocks, dim=self.dims(blocks.ndim), keepdim=False)


@dataclass(frozen=True)
class PerChannel(_Blocks):
    """One scale per index of ``axis``: for a weight [N, K], axis 0 is one per output, scale [N, 1]."""

    axis: int = 0

    def __post_init__(self) -> None:
        if type(self.axis) is not int:
            raise RecipeError(f"PerChannel has the axis {self.axis!r}, an integer is needed, such as PerChannel(0)")

    def dims(self, ndim: int) -> tuple[int, ...]:
        return tuple(d for d in range(ndim) if d != self.axis % ndim)

    def refusal(self, shape: Sequence[Any]) -> str | None:
        ndim = len(shape)
        return None if -ndim <= self.axis < ndim else f"axis {self.axis} is asked for and there are {ndim} axes"


@dataclass(frozen=True)
class PerGroup(_Blocks):
    """One scale per ``size`` neighbours along the last axis: for a weight [N, K], scale [N, K/size, 1]."""

    size: int

    def __post_init__(self) -> None:
        if type(self.size) is not int or self.size < 1:
            raise RecipeError(f"PerGroup has the size {self.size!r}, a positive integer is needed, such as PerGroup(128)")

    def dims(self, ndim: int) -> tuple[int, ...]:
        return (ndim - 1,)

    def refusal(self, shape: Sequence[Any]) -> str | None:
        if not shape:
            return "a scalar has no last axis to cut into groups"
        if shape[-1] % self.size:
            return f"the group size is {self.size} and the last axis has {shape[-1]} elements; choose a size that divides it"
        return None

    def fitted(self, inner: int) -> "PerGroup":
        """Groups that divide ``inner``: this size, or the largest below it, if that is not below a quarter of it.

        >>> PerGroup(128).fitted(576), PerGroup(128).fitted(257)
        (PerGroup(size=96), PerGroup(size=128))
        """
        if 0 < inner <= self.size:
            return PerGroup(inner)
        sizes = range(self.size, max(self.size // 4, 1) - 1, -1)
        return PerGroup(next((size for size in sizes if inner % size == 0), self.size))

    def split(self, x: Tensor) -> Tensor:
        x = super().split(x)
        return torch.unflatten(x, -1, (x.shape[-1] // self.size, self.size))

    def join(self, blocks: Tensor) -> Tensor:
        return blocks.flatten(-2)


@dataclass(frozen=True)
class PerToken(_Blocks):
    """One scale per row, a row being everything along the last axis: for activations [B, T, K], scale [B, T, 1]."""

    def dims(self, ndim: int) -> tuple[int, ...]:
        return (ndim - 1,)

    def refusal(self, shape: Sequence[Any]) -> str | None:
        return None if shape else "a scalar has no rows"


Granularity = PerTensor | PerChannel | PerGroup | PerToken

# What a recipe can name; a new granularity is one class and one entry here.
GRANULARITIES: tuple[type[Granularity], ...] = (PerTensor, PerChannel, PerGroup, PerToken)
