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
    from .affine import IntAffine, QParams
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


class _FakeQuantize(torch.autograd.Function):
    """Rounding to a grid as the head of this file has it; keeps its input and its result alone, and needs no compiler."""

    @staticmethod
    def forward(
        ctx: Any, blocks: Tensor, log_scale: Tensor, zero_point: Tensor | None, grid: "IntAffine", damping: float
    ) -> Tensor:
        scale = scale_of(log_scale)
        zero = None if zero_point is None else zero_point.round().clamp(grid.qmin, grid.qmax)
        value = _rounded(blocks.to(torch.promote_types(scale.dtype, torch.float32)), scale, zero, grid)
        ctx.save_for_backward(blocks, value, scale, zero)
        ctx.grid, ctx.damping = grid, damping
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        (g,), (blocks, value, scale, zero) = gradients, ctx.saved_tensors
        x = blocks.to(value.dtype)
        code = (x * scale.reciprocal()).round_().add_(0 if zero is None else zero)
        inside = code.ge(ctx.grid.qmin) & code.le(ctx.grid.qmax)
        g_inside = g * inside
        # d out / d log(scale) = out - x inside the grid, out beyond it
        of_log = ((value * g).sum_to_size(scale.shape) - (x * g_inside).sum_to_size(scale.shape)) * ctx.damping
        of_zero = None if zero is None else (g_inside - g).sum_to_size(scale.shape) * scale * ctx.damping
        return g_inside.to(blocks.dtype), of_log, of_zero, None, None


def _rounded(wide: Tensor, scale: Tensor, zero: Tensor | None, grid: "IntAffine") -> Tensor:
    """The value of every element on the grid; ``wide`` and ``scale`` of one dtype, one tensor made."""
    value = (wide * scale.reciprocal()).round_()
    if zero is None:
        return value.clamp_(grid.qmin, grid.qmax).mul_(scale)
    if zero.numel() == 1:  # the clamp moved by the zero point, which saves adding it and taking it away
        return value.clamp_(grid.qmin - zero.item(), grid.qmax - zero.item()).mul_(scale)
    return value.add_(zero).clamp_(grid.qmin, grid.qmax).sub_(zero).mul_(scale)


def rounded(x: Tensor, qparams: "QParams", format: "Format", granularity: Granularity) -> Tensor:
    """``decode(encode(x))``, bit for bit, without the codes: a third of the time where nothing fuses the operations."""
    wide = granularity.split(x).to(torch.promote_types(qparams.scale.dtype, torch.float32))
    return _narrow(_rounded(wide, qparams.scale, qparams.zero_point, _affine(format)), x.dtype, granularity)


def _narrow(value: Tensor, dtype: torch.dtype, granularity: Granularity) -> Tensor:
    limit = min(torch.finfo(dtype).max, torch.finfo(value.dtype).max)
    return granularity.join(value.clamp(-limit, limit).to(dtype))


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
    damping = 1 / math.sqrt(max(blocks.numel() / log_scale.numel(), 1) * grid.qmax)
    return _narrow(_FakeQuantize.apply(blocks, log_scale, zero_point, grid, damping), x.dtype, granularity)


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
