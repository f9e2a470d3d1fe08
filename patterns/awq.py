"""AWQ: input channels that carry much are enlarged in the weight, where rounding then hurts them less.

    s_j = mean|X_j|^r / sqrt(max s * min s),  r in {0, 1/20, ..., 19/20} of least || X W^T - (X / s) Q(W diag(s))^T ||^2

(Lin et al., 2024, section 3.2; also with root mean squares.) ``r = 0`` is the identity, so the outputs on the tokens looked at
are never worse than those of plain rounding. Meant for recipes that quantize weights alone; where activations are rounded
too, that counts as well.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx

from fxquant.graph.equivalence import Note, PositiveScale, Refusal
from fxquant.graph.fuel import Fuel
from fxquant.numerics.observer import Observer

from .inputs import check_lengths, check_scales, put, sites_of
from .measured import Measured, standing_for_all
from .output_error import OutputError, check_finite, left_alone

NAME = "awq"
FLOOR = 1e-4


def awq(gm: fx.GraphModule, fuel: Fuel, *, scale: Mapping[str, Tensor]) -> list[Note]:
    """Divide the linear inputs listed by their scale [K] and multiply the weights; in place, one Note per site.

    ``scale``: by the path of the weight of the first linear that reads the value. Behind norms, and where the channels come
    from a linear by ways that a scale may go (values, gates), nothing is left over; else one multiply before the linear.
    Raises RecipeError for a scale of another length, or one that is not positive.
    """
    check_lengths(gm, "scale", scale)
    check_scales(scale)
    sites, notes = sites_of(gm, NAME, scale)
    for where, linear in sites:
        if not fuel.take(f"{NAME} {where}"):
            break
        applied = put(gm, linear, PositiveScale, scale[where])
        notes.append(Note(NAME, where, "refused", str(applied)) if isinstance(applied, Refusal) else applied.note(NAME, where))
    gm.recompile()
    return notes


def choose(measured: Measured, *, steps: int = 20, rows: int = 256, outputs: int = 512) -> dict[str, Tensor] | str:
    """The scale of least output error among ``r = 0, 1/steps, ...``, or why the site is left alone.

    The search looks at that many of the sampled tokens, at those that reach farthest, and at that many of the outputs; what it
    finds must also beat the identity on the whole sample (and 4096 outputs), with the recipe's own ranges. Tried beside mean
    magnitudes are root mean squares, which a massive token moves more. Raises CalibrationError for NaN, and where no token was
    seen.
    """
    check_finite(measured)
    if measured.weight is None:
        return f"the recipe does not quantize the weight of '{measured.where}'"
    if reason := left_alone(measured):
        return reason
    searched = isinstance(measured.weight.range, Observer)  # on every weight tried, at twenty times the cost
    some, everything = all_tokens(measured, rows), all_tokens(measured, len(measured.rows))
    error = OutputError.of(some, rows=len(some.rows), outputs=outputs // 4 if searched else outputs).shifted()
    sizes = (measured.mean, everything.rows.float().square().mean(0).sqrt())
    grid = [importance_scale(size, step / steps) for step in range(steps) for size in sizes]
    best = grid[min(range(len(grid)), key=lambda i: error(grid[i]))]  # the smallest power among equals
    final = OutputError.of(everything, rows=len(everything.rows), outputs=4096).shifted()
    if final(best) < final(grid[0]):
        return {"scale": best}
    return f"no scale of the input of '{measured.where}' does better than none"


def all_tokens(measured: Measured, rows: int) -> Measured:
    """``measured`` with rows whose squared errors add up as those of all tokens: ``rows`` of the sample, and the farthest.

    A massive token is one of thousands, and a sample misses it; but what it makes of its channel the model lives on. Where
    activations are rounded too a row cannot stand for many by its size, and the sample is all there is.
    """
    some = measured.rows[:rows].float()
    if measured.far is None or measured.activation is not None:
        return replace(measured, rows=some)
    return replace(measured, rows=standing_for_all(some, measured.far.float(), measured.tokens))


def importance_scale(mean: Tensor, power: float) -> Tensor:
    """``s`` [K] from the mean magnitudes [K], around 1; 1 for a channel that carries nothing."""
    live = mean > 0
    if not bool(live.any()):
        return torch.ones_like(mean, dtype=torch.float32)
    s = mean.float().pow(power).clamp_min(FLOOR)
    s = s / (s[live].max() * s[live].min()).sqrt()
    return torch.where(live, s, 1.0)
