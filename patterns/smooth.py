"""Smoothing: channels with large activations and small weights are made alike, so that neither is hard to quantize.

    s_j = max|X_j|^a / max_k|W_kj|^(1-a)        SmoothQuant (Xiao et al., 2023), eq. 4; W of all readers together

``smooth`` is told ``max|X_j|`` by data. ``balance`` has no data: behind a norm ``reach * |g_j| + |b_j|`` stands in for it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.errors import RecipeError
from fxquant.graph.equivalence import (
    Applied,
    Note,
    PositiveScale,
    Refusal,
    Region,
    Site,
    apply,
    channels_of,
    constant,
    find,
    site_name,
    weight_algebra,
)
from fxquant.graph.fuel import Fuel
from fxquant.graph.laws import LINEAR
from fxquant.graph.weights import parameter_only

from .inputs import check_lengths, region_at, sites_of
from .measured import Measured
from .migrate_gain import bias_of, norms_with_gain
from .output_error import check_finite

FLOOR = 1e-5


def smooth(gm: fx.GraphModule, fuel: Fuel, *, statistics: Mapping[str, Tensor], alpha: float = 0.5) -> list[Note]:
    """Smooth every linear input with a statistic; in place, one Note per site.

    ``statistics``: per-channel ``max|X|`` [K] of a linear's input, by the path of the weight of the first linear that reads it.
    They must be of this graph as it is: the same ones given twice smooth twice. Behind norms, and where the channels come from
    a linear by ways that a scale may go (values, gates), the scale is absorbed; else one multiply is left before the linear.
    Raises RecipeError for a statistic of another length, or an alpha that is not from 0 to 1.
    """
    _check(alpha)
    check_lengths(gm, "statistic", statistics)
    sites, notes = sites_of(gm, "smooth", statistics)
    # Backwards: a scale made by a linear's rows changes the weights that the site before it looks at.
    for where, linear in reversed(sites):
        region = region_at(gm, linear, PositiveScale)
        if isinstance(region, Refusal) or not fuel.take(f"smooth {where}"):
            continue
        own = next(site for site in region.readers if site.node is linear)
        statistic = statistics[where].to(linear.meta["val"].device, linear.meta["val"].dtype)
        measured = channels_of(gm, own, region, constant(gm, statistic, "statistic"))
        notes.append(_apply(gm, region, [measured], None, alpha, "smooth", where))
    gm.recompile()
    return notes


def choose(measured: Measured) -> dict[str, Tensor]:
    """The statistic that ``smooth`` needs: ``max|X_j|`` [K]."""
    check_finite(measured)
    return {"statistics": torch.maximum(measured.low.abs(), measured.high.abs())}


def balance(gm: fx.GraphModule, fuel: Fuel, *, alpha: float = 0.6, reach: float = 0.5) -> list[Note]:
    """Smooth behind every norm without data: a token is taken to reach ``reach`` standard deviations in every channel.

    Raises RecipeError for an alpha that is not from 0 to 1.
    """
    _check(alpha)
    notes = []
    for norm in norms_with_gain(gm):
        where = site_name(norm)
        region = find(gm, norm, PositiveScale)
        if "balanced" in norm.meta:
            continue
        if isinstance(region, Refusal) or norm.args[2] not in parameter_only(gm):
            reason = str(region) if isinstance(region, Refusal) else f"the gain of '{norm.name}' depends on an input"
            notes.append(Note("balance", where, "refused", reason))
            continue
        if not fuel.take(f"balance {where}"):
            break
        given = [n for n in (norm.args[2], bias_of(norm)) if n is not None]
        notes.append(_apply(gm, region, given, reach, alpha, "balance", where))
        norm.meta["balanced"] = alpha
    gm.recompile()
    return notes


def smoothing_scale(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """``s`` [C] from ``max|X|`` and ``max|W|`` [C]; 1 for a channel that carries next to nothing: it needs no help."""
    s = activation.clamp_min(FLOOR) ** alpha / weight.clamp_min(FLOOR) ** (1 - alpha)
    return torch.where((activation > FLOOR) & (weight > FLOOR), s, torch.ones_like(s))


def _check(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise RecipeError(f"alpha is {alpha}; 0 (the scale of the weights alone) to 1 (of the activations alone) is needed")


def _apply(
    gm: fx.GraphModule, region: Region, given: list[Any], reach: float | None, alpha: float, name: str, where: str
) -> Note:
    """``given`` is a measured ``max|X|``, or, if ``reach`` is, a norm's gain and bias."""
    weights = [channels_of(gm, site, region, _largest(gm, site)) for site in region.readers if site.law and site.law.whole_axis]

    def scale(given: list[Tensor], weights: list[Tensor]) -> Tensor:
        activation = given[0] if reach is None else sum((b.abs() for b in given[1:]), reach * given[0].abs())
        return smoothing_scale(activation, torch.stack(weights).amax(0), alpha)

    applied = apply(gm, region, PositiveScale(weight_algebra(gm, scale, given, weights, memo=(name, reach, alpha))))
    assert isinstance(applied, Applied)  # the region was found for this graph
    return applied.note(name, where)


def _largest(gm: fx.GraphModule, site: Site) -> fx.Node:
    """``max|W|`` over the outputs, per input channel [K] of a linear's [N, K] or of experts' [E, K, N]."""
    assert site.law is not None
    back = 1 if site.node.target in LINEAR else 2

    def largest(W: Tensor) -> Tensor:
        return W.abs().amax([n for n in range(W.ndim) if n != W.ndim - back])

    node: fx.Node = weight_algebra(gm, largest, site.node.args[site.law.weights[0]], memo=("largest", back))
    return node
