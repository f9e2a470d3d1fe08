"""Outlier Suppression+: every channel is centred, then those that still reach far are shrunk, and the weights make up for it.

    X~ = (X - z) / s,   W x + b  ==  (W diag(s)) x~ + (b + W z)                 (Wei et al., 2023)

    z_j = (max X_j + min X_j) / 2,   s_j = max(1, max|X_j - z_j| / t)

The shift comes first, and sees the weight before it is scaled. ``t`` is searched for the least error of the outputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, fx

from fxquant.errors import RecipeError
from fxquant.graph.equivalence import Applied, Map, Note, PositiveScale, Refusal, Shift
from fxquant.graph.fuel import Fuel
from fxquant.numerics.observer import Observer

from .inputs import check_lengths, check_scales, put, sites_of
from .measured import Measured
from .output_error import OutputError, check_finite, left_alone, reach_of

NAME = "shift_scale"
SMALLEST = 1e-3  # of the largest: t goes no lower, and a smaller channel or weight counts as this in a power
WORTH_AN_OP = 0.99  # a shift must bring the error below this fraction

Family = Callable[[Tensor, Tensor, float], Tensor]
"""``s`` [K] from the reach of each channel [K], the largest weights that read it [K], and a number from 0 to 1."""


def shift_scale(gm: fx.GraphModule, fuel: Fuel, *, scale: Mapping[str, Tensor], shift: Mapping[str, Tensor]) -> list[Note]:
    """Shift, then scale, the linear inputs listed in either mapping, by [K] numbers each; in place, one Note per site.

    Sites are named by the path of the weight of the first linear that reads the value. What makes the value takes the map
    where it can: norms (the gain, the bias; a post-norm shortcut gets it back), values through attention, the linear before a
    ReLU or a gate. Else an op is left before the linear, such as a subtraction behind GELU, which a quantizer that follows
    takes along. A linear without a bias gets one.
    Raises RecipeError for numbers of another length, a shift that is not finite, or a scale that is not positive.
    """
    check_lengths(gm, "scale", scale)
    check_lengths(gm, "shift", shift)
    check_scales(scale)
    for where, z in shift.items():
        if not bool(z.isfinite().all()):
            raise RecipeError(f"the shift of '{where}' holds NaN or infinity")
    sites, notes = sites_of(gm, NAME, {**shift, **scale})
    for where, linear in sites:
        maps: list[tuple[type[Map], Tensor]] = []
        if where in shift and bool((shift[where] != 0).any()):
            maps.append((Shift, shift[where]))
        if where in scale and bool((scale[where] != 1).any()):
            maps.append((PositiveScale, scale[where]))
        if not maps:
            notes.append(Note(NAME, where, "refused", "the shift is zero and the scale one: nothing to do"))
            continue
        if not fuel.take(f"{NAME} {where}"):
            break
        notes.append(_note(where, [put(gm, linear, kind, m) for kind, m in maps]))
    gm.recompile()
    return notes


def _note(where: str, outcomes: list[Applied | Refusal]) -> Note:
    applied = [outcome for outcome in outcomes if isinstance(outcome, Applied)]
    if not applied:
        return Note(NAME, where, "refused", str(outcomes[0]))
    explicit = tuple(op for outcome in applied for op in outcome.explicit)
    note = Applied(applied[-1].region, explicit).note(NAME, where)
    refused = "".join(f"; {outcome}" for outcome in outcomes if isinstance(outcome, Refusal))
    return Note(NAME, where, note.outcome, note.reason + refused)


# ---- the choice


def by_threshold(reach: Tensor, weight: Tensor, at: float) -> Tensor:
    """``max(1, reach / t)`` with ``t`` from the largest reach (``at = 0``: the identity) down to the smallest, evenly in log t.

    Outlier Suppression+: channels within ``t`` are left as they are, the others end at ``t``.
    """
    if not bool((reach > 0).any()):
        return torch.ones_like(reach)
    smallest = reach[reach > 0].min().clamp_min(SMALLEST * reach.max())
    t = reach.max() * (smallest / reach.max()) ** at
    return (reach / t).clamp_min(1)


def by_power(reach: Tensor, weight: Tensor, at: float) -> Tensor:
    """``reach^a / weight^(1 - a)``, around 1: SmoothQuant (Xiao et al., 2023, eq. 4). 1 for a channel that carries nothing."""
    live = (reach > 0) & (weight > 0)
    if not bool(live.any()):
        return torch.ones_like(reach)
    reach, weight = (numbers.clamp_min(SMALLEST * numbers.max()) for numbers in (reach, weight))
    s = reach**at / weight ** (1 - at)
    return torch.where(live, s / (s[live].max() * s[live].min()).sqrt(), 1.0)


FAMILIES: tuple[Family, ...] = (by_threshold, by_power)


def choose(
    measured: Measured, *, families: tuple[Family, ...] = FAMILIES, rows: int = 128, outputs: int = 128
) -> dict[str, Tensor] | str:
    """The shift and the scale [K] of least output error, or why the site is left alone.

    Shifts tried: none, the middle of each channel's extremes, the middle of its inner 98 %, and its median. For each, one
    number of every family is searched, coarse to fine, on that many of the sampled tokens and of the outputs. What it finds
    must also beat the identity on all tokens (and 4096 outputs), with the recipe's own ranges; a shift must beat none by a
    hundredth. Raises CalibrationError for NaN, and where no token was seen.
    """
    check_finite(measured)
    if measured.activation is None:
        return f"the recipe does not quantize the input of '{measured.where}'"
    if reason := left_alone(measured):
        return reason
    weight = torch.stack([w.float().abs().amax(0) for w in measured.weights]).amax(0)
    quick = OutputError.of(measured, rows=rows, outputs=outputs, exact_ranges=False)
    curves = [
        _Curve(z, partial(family, reach_of(measured, z), weight), error)
        for z in _shifts(measured, quick.x)
        for error in [quick.shifted(z)]
        for family in families
    ]
    # Weight ranges that are searched themselves cost too much to try at every point: the best points are tried again with them.
    searched = measured.weight is not None and isinstance(measured.weight.range, Observer)
    settled = OutputError.of(measured, rows=rows, outputs=outputs // 2) if searched else None
    final = OutputError.of(measured, rows=len(measured.rows), outputs=4096)
    ones, zeros = torch.ones_like(weight), torch.zeros_like(weight)
    (s, z), least, margin = (ones, zeros), final(ones), 1.0
    for rivals in (curves[: len(families)], curves[len(families) :]):  # without a shift, and with one
        found = min(rivals, key=_Curve.coarse)
        scale = found.scale(found.fine() if settled is None else found.settled(settled))
        if (error := final(scale, found.shift)) < margin * least:
            (s, z), least = (scale, found.shift), error
        margin = WORTH_AN_OP
    if torch.equal(s, ones) and torch.equal(z, zeros):
        return f"no shift or scale of the input of '{measured.where}' does better than none"
    return {"scale": s, "shift": z}


def _shifts(measured: Measured, rows: Tensor) -> list[Tensor]:
    """The shifts [K] that are tried, none first."""
    ordered = rows.T.contiguous().sort(-1).values  # [K, R]
    inner = round(0.01 * (ordered.shape[-1] - 1))
    return [
        torch.zeros_like(ordered[:, 0]),
        (measured.high.float() + measured.low.float()) / 2,
        (ordered[:, inner] + ordered[:, -1 - inner]) / 2,
        ordered[:, (ordered.shape[-1] - 1) // 2],
    ]


@dataclass(frozen=True, eq=False)
class _Curve:
    """One shift and one family of scales: the error as a function of one number in [0, 1]."""

    shift: Tensor
    scale: Callable[[float], Tensor]
    error: Callable[[Tensor], float]
    known: dict[float, float] = field(default_factory=dict)

    def at(self, a: float) -> float:
        if a not in self.known:
            self.known[a] = self.error(self.scale(a))
        return self.known[a]

    def coarse(self) -> float:
        """The least error on a grid of steps of a sixth."""
        return min(self.at(i / 6) for i in range(7))

    def fine(self) -> float:
        """Where the error is least: the grid's best point, refined twice to a quarter of the step."""
        self.coarse()
        for step in (1 / 24, 1 / 96):
            best = self.best()
            for i in (-3, -2, -1, 1, 2, 3):
                self.at(min(max(best + i * step, 0.0), 1.0))
        return self.best()

    def settled(self, error: OutputError) -> float:
        """The best, by another error, of the coarse grid and of what is best by this one."""
        other = replace(self, error=error.shifted(self.shift), known={})
        other.at(self.fine())
        other.coarse()
        return other.best()

    def best(self) -> float:
        """The point of least error so far, the smallest of equals."""
        return min(self.known, key=lambda a: (self.known[a], a))
