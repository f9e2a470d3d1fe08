"""Token-wise clipping: outliers sit in few tokens, so drop the tokens of the largest extremes (Outlier Suppression).

Wei et al., "Outlier Suppression", NeurIPS 2022, section 4.2, coarse stage, in the form of the released code: with u and l the
largest and the smallest value of every token of a batch, and a ratio a,

    c_u = max {u_t : u_t <=  quantile_a(|u|)}        c_l = min {l_t : l_t >= -quantile_a(|l|)}

and the range is the mean of (c_l, c_u) over the batches. One ratio serves the whole network, and calibration searches it on
the error of the network's output; a state answers for every ratio, so that data is watched once.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..errors import CalibrationError, RecipeError
from .extremes import mean_over_batches
from .granularity import Granularity, PerTensor
from .observer import Observer, RoundTrip, as_range, batch_of, check_same_rows, count, for_activations, number

if TYPE_CHECKING:
    from .formats import Format

KEPT = 256  # order statistics of a batch for each of many channels

# How far below 1 the search of the ratio goes, by bits (the paper gives 8, 6 and 4), and its step for 128 * 32 tokens.
SPANS = {8: 0.1, 7: 0.2, 6: 0.3, 5: 0.6, 4: 0.9}
STEP, TOKENS = 0.01, 128 * 32


class Tokens(NamedTuple):
    """For every batch, the largest and the smallest value of its tokens, [T, R] each."""

    upper: tuple[Tensor, ...] = ()
    lower: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class TokenWise(Observer):
    """The mean over batches of the extremes of the tokens that are left when the fraction ``1 - ratio`` is dropped.

    ``ratio`` in (0, 1], or None to be searched over the whole network. ``fine``: a range of each site's own afterwards. Ratio
    1 is ``AverageMinMax()``, bit for bit. How the data is cut into batches counts; their order, and that of tokens, does not.

    Per channel a token has one value in each, and 256 order statistics stand for those of a batch: ranges are nested and lie
    within the extremes all the same, and are exact for up to 256 tokens.
    """

    ratio: float | None = None
    fine: bool = False

    def __post_init__(self) -> None:
        if self.ratio is not None:
            number("TokenWise", "ratio", self.ratio, 0, 1)
        if type(self.fine) is not bool:
            raise RecipeError(f"TokenWise has fine={self.fine!r}, True or False is needed")

    @property
    def learned(self) -> bool:
        return self.fine

    def with_ratio(self, ratio: float) -> "TokenWise":
        """This observer with the ratio found; it reads the states of the one without."""
        return replace(self, ratio=ratio)

    @staticmethod
    def candidates(bits: int, batch: int, length: int) -> tuple[float, ...]:
        """The ratios to try, falling from 1.0, for batches of ``batch`` sequences of ``length`` tokens.

        >>> TokenWise.candidates(8, 32, 128)
        (1.0, 0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.93, 0.92, 0.91)
        """
        for name, value in (("bits", bits), ("batch", batch), ("length", length)):
            count("TokenWise.candidates", name, value)
        step = min(STEP, float(f"{STEP * TOKENS / (batch * length):.2g}"))
        span = SPANS[min(max(bits, 4), 8)]
        return tuple(round(1 - k * step, 10) for k in range(int(span / step + 1e-9)))

    def start(self) -> Tokens:
        return Tokens()

    def update(self, state: Tokens, x: Tensor, granularity: Granularity) -> Tokens:
        batch = batch_of(x, granularity)
        if batch is None:
            return state
        if isinstance(granularity, PerTensor):
            lower, upper = (end[:, None].cpu() for end in torch.aminmax(x.detach().float(), dim=1))
            return self.merge(state, Tokens((upper,), (lower,)))
        values = batch.rows.T.sort(dim=0).values
        if (tokens := len(values)) > KEPT:
            values = values[torch.linspace(0, tokens - 1, KEPT, dtype=torch.float64).round().long()]
        return self.merge(state, Tokens((values.cpu(),), (values.cpu(),)))

    def merge(self, a: Tokens, b: Tokens) -> Tokens:
        if a.upper and b.upper:
            check_same_rows(a.upper[0].shape[1], b.upper[0].shape[1])
        return Tokens(a.upper + b.upper, a.lower + b.lower)

    def range(self, state: Tokens, format: "Format", granularity: Granularity) -> tuple[Tensor, Tensor]:
        if self.ratio is None:
            raise CalibrationError(
                f"{self} has no ratio: calibration searches one for the whole network; give one with with_ratio(0.99)"
            )
        if not state.upper:
            return as_range(torch.empty(0), torch.empty(0), granularity)
        upper = torch.stack([clipped(u, self.ratio) for u in state.upper])
        lower = torch.stack([-clipped(-l, self.ratio) for l in state.lower])
        lo, hi = mean_over_batches(lower), mean_over_batches(upper)
        crossed = lo > hi  # both ends drop tokens by themselves; where few are left, only zero may lie between
        lo, hi = torch.where(crossed, lo.clamp(max=0), lo), torch.where(crossed, hi.clamp(min=0), hi)
        return as_range(lo, hi, granularity)

    def of(self, blocks: Tensor, granularity: Granularity, quantized: RoundTrip) -> tuple[Tensor, Tensor]:
        raise for_activations(self, "it drops tokens of batches, and a tensor at hand has neither")


def clipped(upper: Tensor, ratio: float) -> Tensor:
    """The largest of ``upper`` [T, R] that is not above the ``ratio``-quantile of its magnitudes, [R].

    The quantile between two order statistics keeps what the lower of them keeps, so none is interpolated.
    """
    rank = int(ratio * (len(upper) - 1))
    threshold = upper.abs().sort(dim=0).values[rank]
    return torch.where(upper <= threshold, upper, -torch.inf).amax(dim=0)
