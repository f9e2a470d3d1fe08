"""Gain migration: a norm's gain moves into the linears that read it, so that what is quantized is no longer stretched by it.

    W (g * n + b)  ==  (W diag(g)) (n + b / g)          Outlier Suppression (Wei et al., 2022), eq. 6

The map is ``s = g``. Post-norm shortcuts and other readers that are no linears get one explicit multiply by ``s``. A negative
gain migrates like a positive one: what it passes is linear. A gain near zero would make ``b / g`` a new outlier, so that
channel keeps its gain: ``s_j = 1`` where ``|g_j| <= tau * median |g|``. The norm keeps its eps.
"""

from dataclasses import dataclass

import torch
from torch import fx

from fxquant.graph.equivalence import Applied, Note, Refusal, Region, Scale, Shift, apply, find, site_name, weight_algebra
from fxquant.graph.fuel import Fuel
from fxquant.graph.laws import LAYER_NORM, NORMS
from fxquant.graph.weights import parameter_only

NAME = "migrate_gain"


@dataclass(frozen=True)
class Migrated:
    """Set as ``node.meta["migrated"]`` of a norm whose gain has left it: a second run finds nothing to do."""

    gain: str


def migrate_gain(gm: fx.GraphModule, fuel: Fuel, *, tau: float = 1e-2, bias: bool = False) -> list[Note]:
    """Migrate the gain of every LayerNorm and RMSNorm that a linear reads; in place, one Note per norm with a gain.

    With ``bias`` a LayerNorm's bias migrates too (into the readers' biases), which leaves the plain normalised value.
    """
    notes = []
    weights = parameter_only(gm)
    for norm in norms_with_gain(gm):
        if "migrated" in norm.meta:
            continue
        where, gain = site_name(norm), norm.args[2]
        region = find(gm, norm, Scale) if gain in weights else Refusal("the gain depends on an input", norm)
        if isinstance(region, Refusal):
            notes.append(Note(NAME, where, "refused", str(region)))
            continue
        if not fuel.take(f"{NAME} {where}"):
            break
        cut: fx.Node | Region = region
        if bias and (b := bias_of(norm)) is not None:
            apply(gm, norm, Shift(b))
            cut = norm  # the shift may have left an op, which is a reader too
        s = weight_algebra(gm, lambda gain: safe_gain(gain, tau), gain, memo=(NAME, tau))
        applied = apply(gm, cut, Scale(s))
        assert isinstance(applied, Applied)  # the region was found
        norm.meta["migrated"] = Migrated(where)
        notes.append(applied.note(NAME, where))
    gm.recompile()
    return notes


def norms_with_gain(gm: fx.GraphModule) -> list[fx.Node]:
    """Every norm over one axis that multiplies by a gain, in the order of the graph."""
    norms = [node for node in gm.graph.nodes if node.target in NORMS]
    return [norm for norm in norms if len(norm.args) > 2 and isinstance(norm.args[2], fx.Node) and len(norm.args[1]) == 1]


def bias_of(norm: fx.Node) -> fx.Node | None:
    """The bias of a LayerNorm that has one."""
    has = norm.target in LAYER_NORM and len(norm.args) > 3 and isinstance(norm.args[3], fx.Node)
    return norm.args[3] if has else None  # type: ignore[return-value]  # mypy does not see through `has`


def safe_gain(gain: torch.Tensor, tau: float) -> torch.Tensor:
    """``s = g``, and 1 where the gain is too small to divide the bias by (or is not a number)."""
    size = gain.abs()
    floor = torch.maximum(tau * size.median(), 1e-6 * size.max())  # more than half of the gains may be zero
    return torch.where(size > floor, gain, torch.ones_like(gain))
