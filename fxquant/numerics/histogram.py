"""A histogram whose bins are those of floating point: the exponent and the first bits of the mantissa are the bin.

One value three hundred times the others leaves bins of equal width nothing to tell the others apart with; here every octave has
as many bins, down from the largest value seen. A larger value than all before makes the window of octaves rise: what falls out
below counts as zero. So the counts depend on the values alone, not on the order they came in, and merging is exact.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .granularity import Granularity, PerChannel
from .observer import Batch, RoundTrip, check_same_rows

if TYPE_CHECKING:
    from .formats import Format

MANTISSA = 23  # bits of float32


class Layout(NamedTuple):
    """``2 ** bits`` bins in each of ``octaves`` octaves, for either sign, and one bin for zero."""

    bits: int
    octaves: int

    @property
    def half(self) -> int:
        """The bins of one sign."""
        return self.octaves << self.bits


ONE_ROW = Layout(8, 24)  # 12289 counts; a bin is 1/256 of its octave, as fine as 8 bits at the top
MANY_ROWS = Layout(5, 16)  # 1025 counts each, as there may be thousands of channels


class Histogram(NamedTuple):
    """Counts of every row [R, 2 * half + 1], negative to positive, zero in the middle; and the exact ends."""

    counts: Tensor = torch.empty(0, 0, dtype=torch.int64)
    top: Tensor = torch.empty(0, dtype=torch.int32)  # the exponent of the largest magnitude, biased as in float32
    lo: Tensor = torch.empty(0)
    hi: Tensor = torch.empty(0)
    layout: Layout = ONE_ROW


def histogram(batch: Batch) -> Histogram:
    """The histogram of one batch."""
    layout = ONE_ROW if len(batch.rows) == 1 else MANY_ROWS
    top = torch.maximum(batch.lo.abs(), batch.hi.abs()).view(torch.int32) >> MANTISSA
    magnitude = batch.rows.abs()
    place = (magnitude.contiguous().view(torch.int32) >> MANTISSA - layout.bits) - _first(top, layout).to(magnitude.device)
    place = torch.where(magnitude > 0, place + 1, 0).clamp(min=0)
    index = layout.half + torch.where(batch.rows < 0, -place, place).long()
    counts = torch.zeros(len(index), 2 * layout.half + 1, dtype=torch.int64, device=index.device)
    counts.scatter_add_(1, index, counts.new_ones(()).expand(index.shape))
    return Histogram(counts.cpu(), top, batch.lo, batch.hi, layout)


def merged(a: Histogram, b: Histogram) -> Histogram:
    """The histogram of the data of both."""
    if not len(a.counts) or not len(b.counts):
        return a if len(a.counts) else b
    check_same_rows(len(a.counts), len(b.counts))
    top = torch.maximum(a.top, b.top)
    counts = _raised(a, top) + _raised(b, top)
    return Histogram(counts, top, torch.minimum(a.lo, b.lo), torch.maximum(a.hi, b.hi), a.layout)


class Points(NamedTuple):
    """What a histogram stands for: values [R, P], rising along each row, how often each occurs, and the bins they are in.

    Bins that are empty in every row are left out. Zero, and what is too small for the window, is the value 0 of width 0.
    """

    values: Tensor  # float32
    counts: Tensor  # float64
    left: Tensor  # float32, the ends of the bin
    right: Tensor


def points(h: Histogram) -> Points:
    """The middle of each bin, not beyond the extremes of the row."""
    place = torch.arange(h.layout.half, dtype=torch.int32)
    inner = _edge(place + _first(h.top, h.layout), h.layout)
    outer = _edge(place + 1 + _first(h.top, h.layout), h.layout)
    values = inner + (outer - inner) / 2
    zero = torch.zeros(len(values), 1)
    below, above = h.lo[:, None].clamp(max=0), h.hi[:, None].clamp(min=0)

    def both_signs(negative: Tensor, positive: Tensor) -> Tensor:
        return torch.cat([-negative.flip(1), zero, positive], dim=1)[:, seen]

    seen = h.counts.any(dim=0)
    return Points(
        both_signs(values.minimum(-below), values.minimum(above)),
        h.counts[:, seen].double(),
        both_signs(outer, inner),
        both_signs(inner, outer),
    )


@dataclass(frozen=True)
class _Ends:
    """A range as tensors that broadcast against the blocks."""

    lo: Tensor
    hi: Tensor

    def of(self, blocks: Tensor, granularity: Granularity, quantized: RoundTrip) -> tuple[Tensor, Tensor]:
        return self.lo, self.hi


def rounded(values: Tensor, format: "Format", lo: Tensor, hi: Tensor) -> Tensor:
    """``values`` [R, P] as ``format`` sees them under the ranges ``lo`` and ``hi`` [R, 1] of the rows."""
    return format.fake_quantize(values, PerChannel(0), _Ends(lo, hi))  # type: ignore[arg-type]  # it has what a range needs


class Ends(NamedTuple):
    """The ends of rows, [R, 1] each, widened to hold zero; a search shrinks them by factors."""

    lo: Tensor
    hi: Tensor

    def at(self, factor: Tensor | float) -> tuple[Tensor, Tensor]:
        """The factors of both ends that cut magnitudes at ``factor`` of the largest: of the wider end first, then of both."""
        reach = torch.maximum(-self.lo, self.hi)
        widths = (torch.where(end > 0, end, reach) for end in (-self.lo, self.hi))
        low, high = ((reach * factor / torch.where(width > 0, width, 1)).clamp(max=1) for width in widths)
        return low, high


def ends(h: Histogram) -> Ends:
    """The extremes of every row."""
    return Ends(h.lo.clamp(max=0)[:, None], h.hi.clamp(min=0)[:, None])


def _first(top: Tensor, layout: Layout) -> Tensor:
    """The key of the first bin of every row, [R, 1]; negative where fewer octaves than the window has lie below ``top``."""
    return (top - (layout.octaves - 1) << layout.bits)[:, None]


def _edge(key: Tensor, layout: Layout) -> Tensor:
    """The smallest number of the bin ``key``; the one past the largest number is the largest number."""
    largest = torch.finfo(torch.float32).max
    return (key.clamp(min=0) << MANTISSA - layout.bits).view(torch.float32).clamp(max=largest)


def _raised(h: Histogram, top: Tensor) -> Tensor:
    """The counts in the window that ends at ``top``, which is not below ``h.top``."""
    rise = (top - h.top << h.layout.bits)[:, None].long()
    if not rise.any():
        return h.counts
    place = torch.arange(-h.layout.half, h.layout.half + 1)
    moved = (place.abs() - rise).clamp(min=0) * place.sign()
    return torch.zeros_like(h.counts).scatter_add_(1, moved + h.layout.half, h.counts)
