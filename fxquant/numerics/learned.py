"""Ranges that are learned: where they start (LSQ, LSQ+), and the fake quantization that passes gradients to them.

Esser et al., "Learned Step Size Quantization", ICLR 2020; Bhalgat et al., "LSQ+", 2020. With v = x / scale + zero point and
q = clamp(round(v), qmin, qmax), the rounding passed straight through:

    d out / d scale      = round(x / scale) - x / scale inside the grid,    (q - zero point) outside
    d out / d zero point = 0                            inside,             -scale           outside
    d out / d x          = 1                            inside,             0                outside

Gradients of scale and zero point are multiplied by 1 / sqrt(n qmax), n the elements that share them. The scale is the
exponential of what is learned: it stays positive, and a step moves it by a fraction of itself, whatever the units of x.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .granularity import Granularity
from .observer import Observer, RoundTrip, as_range, batch_of, check_same_rows, extremes_of, for_activations

if TYPE_CHECKING:
    from .affine import IntAffine
    from .formats import Format


class Moments(NamedTuple):
    """Of every row [R]: the mean, the sum of squared deviations and the mean magnitude, float64; the ends; all over ``n``."""

    mean: Tensor = torch.empty(0, dtype=torch.float64)
    squares: Tensor = torch.empty(0, dtype=torch.float64)
    magnitude: Tensor = torch.empty(0, dtype=torch.float64)
    lo: Tensor = torch.empty(0)
    hi: Tensor = torch.empty(0)
    n: int = 0


class _OfMoments(Observer):
    """Merging is exact up to rounding, in any order."""

    @property
    def learned(self) -> bool:
        return True

    def start(self) -> Moments:
        return Moments()

    def update(self, state: Moments, x: Tensor, granularity: Granularity) -> Moments:
        batch = batch_of(x, granularity)
        if batch is None:
            return state
        rows = batch.rows.double()
        mean = rows.mean(dim=1)
        squares = (rows - mean[:, None]).square().sum(dim=1)
        magnitude = rows.abs().mean(dim=1)
        return self.merge(state, Moments(mean.cpu(), squares.cpu(), magnitude.cpu(), batch.lo, batch.hi, rows.shape[1]))

    def merge(self, a: Moments, b: Moments) -> Moments:
        if not a.n or not b.n:
            return a if a.n else b
        check_same_rows(len(a.mean), len(b.mean))
        n = a.n + b.n
        return Moments(
            (a.n * a.mean + b.n * b.mean) / n,
            a.squares + b.squares + (a.mean - b.mean).square() * (a.n * b.n / n),
            (a.n * a.magnitude + b.n * b.magnitude) / n,
            torch.minimum(a.lo, b.lo),
            torch.maximum(a.hi, b.hi),
            n,
        )


@dataclass(frozen=True)
class LSQ(_OfMoments):
    """A range to learn from: ``scale = 2 mean|x| / sqrt(qmax)``, the zero point where the extremes have it.

    The rule is of few bits; of many it goes beyond all data, so its ends are cut to the extremes.
    """

    def range(self, state: Moments, format: "Format", granularity: Granularity) -> tuple[Tensor, Tensor]:
        if not state.n:
            return as_range(state.lo, state.hi, granularity)
        qmax = _affine(format).qmax
        scale = 2 * state.magnitude / math.sqrt(qmax)
        below, above = state.lo.double().clamp(max=0), state.hi.double().clamp(min=0)
        if _affine(format).symmetric:
            zero_point, top = torch.full_like(scale, qmax), 2 * qmax
        else:
            extent = torch.where(above > below, above - below, 1)
            zero_point, top = (-below / extent * qmax).round(), qmax
        lo, hi = -zero_point * scale, (top - zero_point) * scale
        return as_range(torch.maximum(lo, below), torch.minimum(hi, above), granularity)

    def of(self, blocks: Tensor, granularity: Granularity, quantized: RoundTrip) -> tuple[Tensor, Tensor]:
        raise for_activations(self, "its first scale depends on the bits, and then it is learned")


@dataclass(frozen=True)
class LSQPlus(_OfMoments):
    """A range to learn from: the mean and three standard deviations to either side, cut to the extremes."""

    def range(self, state: Moments, format: "Format", granularity: Granularity) -> tuple[Tensor, Tensor]:
        if not state.n:
            return as_range(state.lo, state.hi, granularity)
        reach = 3 * (state.squares / state.n).sqrt()
        return as_range(torch.maximum(state.mean - reach, state.lo), torch.minimum(state.mean + reach, state.hi), granularity)

    def of(self, blocks: Tensor, granularity: Granularity, quantized: RoundTrip) -> tuple[Tensor, Tensor]:
        lo, hi = extremes_of(blocks, granularity)
        if blocks.numel() == 0:
            return lo, hi
        mean = granularity.reduce(torch.mean, blocks)
        reach = 3 * granularity.reduce(torch.mean, (blocks - mean).square()).sqrt()
        return torch.maximum(mean - reach, lo), torch.minimum(mean + reach, hi)


class _Round(torch.autograd.Function):
    """Rounding, halves to even, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _Damp(torch.autograd.Function):
    """The identity, whose gradient is multiplied by ``by``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: float) -> Tensor:
        ctx.by = by
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.by, None


class _Inside(torch.autograd.Function):
    """``x`` clamped to [lo, hi], with the gradient of the identity: what has left the grid can be learned back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lo: float, hi: float) -> Tensor:
        return x.clamp(lo, hi)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


def learned_fake_quantize(
    x: Tensor, log_scale: Tensor, zero_point: Tensor | None, format: "Format", granularity: Granularity
) -> Tensor:
    """``x`` fake-quantized with ``scale = exp(log_scale)``: same shape, same dtype, differentiable in all three tensors.

    ``log_scale`` and ``zero_point`` (None for a symmetric grid): float32 (float64 for float64 data), of a shape that broadcasts
    against the blocks, such as [] or [channels]. The value is that of the format's ``encode`` and ``decode`` under this scale
    and the zero point rounded and clamped to the grid, bit for bit; the gradients are those of the docstring of this file.
    """
    grid = _affine(format)
    blocks = granularity.split(x)
    wide = blocks.to(torch.promote_types(log_scale.dtype, torch.float32))
    damping = 1 / math.sqrt(max(blocks.numel() / log_scale.numel(), 1) * grid.qmax)
    scale = scale_of(_Damp.apply(log_scale, damping))
    code = _Round.apply(wide * scale.reciprocal())
    if zero_point is not None:
        zero = _Inside.apply(_Round.apply(_Damp.apply(zero_point, damping)), grid.qmin, grid.qmax)
        value = ((code + zero).clamp(grid.qmin, grid.qmax) - zero) * scale
    else:
        value = code.clamp(grid.qmin, grid.qmax) * scale
    limit = min(torch.finfo(x.dtype).max, torch.finfo(value.dtype).max)
    return granularity.join(value.clamp(-limit, limit).to(x.dtype))


def scale_of(log_scale: Tensor) -> Tensor:
    """The scale that ``log_scale`` stands for: a positive, normal number."""
    limits = torch.finfo(log_scale.dtype)
    return log_scale.exp().clamp(limits.tiny, limits.max)


def to_learn(lo: Tensor, hi: Tensor, format: "Format") -> tuple[Tensor, Tensor | None]:
    """(log_scale, zero_point or None), float32, of the range [lo, hi]: where learning starts."""
    scale, zero_point = _affine(format).from_range(lo, hi)
    return scale.log(), None if zero_point is None else zero_point.to(scale.dtype)


def to_range(log_scale: Tensor, zero_point: Tensor | None, format: "Format") -> tuple[Tensor, Tensor]:
    """(lo, hi), float32, of what was learned: ``format.from_range`` gives the zero point back, and the scale up to one ulp."""
    grid, limit = _affine(format), torch.finfo(torch.float32).max
    scale = scale_of(log_scale.detach().float())
    zero = torch.full_like(scale, grid.qmax) if zero_point is None else zero_point.detach().round().clamp(grid.qmin, grid.qmax)
    top = 2 * grid.qmax if zero_point is None else grid.qmax

    def at(factor: float) -> tuple[Tensor, Tensor]:
        wide = scale.double() * factor
        return (-zero * wide).clamp(min=-limit).float(), ((top - zero) * wide).clamp(max=limit).float()

    lo, hi = at(1.0)
    off = (grid.from_range(lo, hi).scale - scale).abs()
    for ulps in (-2, -1, 1, 2):  # the ends are rounded, and from_range rounds three times more
        low, high = at(1 + ulps * torch.finfo(torch.float32).eps / 2)
        better = (found := (grid.from_range(low, high).scale - scale).abs()) < off
        lo, hi, off = torch.where(better, low, lo), torch.where(better, high, hi), torch.minimum(found, off)
    return lo, hi


def _affine(format: "Format") -> "IntAffine":
    """``format``, of which more is needed than the protocol has: the ends of its grid."""
    return format  # type: ignore[return-value]
