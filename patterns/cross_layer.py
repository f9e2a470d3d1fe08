"""Cross-layer equalization: what one layer's outputs are too large by, the next layer's inputs are too small by.

    s_j = sqrt(max|W1_j:| / max|W2_:j|)        Nagel et al. (2019), eq. 11: then W1 / s and W2 s have the same ranges

No data is needed. A pair is two linears with nothing between them but what a positive scale may cross: ReLU, attention's values
(query heads that share a value head share its scale), the other branch of a gated product, views. Nothing is left over at run
time: where a reader cannot take its part the pair is refused. Balanced once, ``s`` is 1 ever after; where one layer belongs to
two pairs (a chain of linears) the second disturbs the first, and running again comes closer to both.
"""

from typing import Any

import torch
from torch import Tensor, fx

from fxquant.graph.equivalence import (
    Applied,
    Explicit,
    Note,
    PositiveScale,
    Refusal,
    Region,
    Site,
    apply,
    channels_of,
    find,
    site_name,
    source_of,
    weight_algebra,
)
from fxquant.graph.fuel import Fuel
from fxquant.graph.laws import EMBEDDING, GROUPED, LINEAR, NORMS
from fxquant.graph.layout import PRODUCTS

NAME = "cross_layer"


def cross_layer(gm: fx.GraphModule, fuel: Fuel) -> list[Note]:
    """Balance every pair of linears that a positive scale can pass between; in place, one Note per second linear of a pair."""
    notes: list[Note] = []
    done: set[fx.Node] = set()
    for linear in [node for node in gm.graph.nodes if node.target in (*LINEAR, *GROUPED)]:
        where, cut = site_name(linear), source_of(linear.args[0])
        if linear in done or cut.target in NORMS or cut.op != "call_function":
            continue  # not behind a linear: other transforms' business
        region = _pair(gm, cut, linear)
        if isinstance(region, Refusal):
            notes.append(Note(NAME, where, "refused", str(region)))
            continue
        if not fuel.take(f"{NAME} {where}"):
            break
        done |= {site.node for site in region.readers}
        first, second = _ranges(gm, region, region.producers), _ranges(gm, region, region.readers)
        s = weight_algebra(gm, balancing_scale, first, second, memo=(NAME, len(first), len(second)))
        applied = apply(gm, region, PositiveScale(s))
        assert isinstance(applied, Applied)  # the region was found for this graph
        notes.append(applied.note(NAME, where))
    gm.recompile()
    return notes


def balancing_scale(first: list[Tensor], second: list[Tensor]) -> Tensor:
    """``s`` [C] from the ranges ``max|W1_j|`` and ``max|W2_j|`` of all producers and readers; 1 where one of them is zero."""
    made, read = torch.stack(first).amax(0), torch.stack(second).amax(0)
    s = (made / read).sqrt()
    return torch.where((s > 0) & s.isfinite(), s, torch.ones_like(s))


def _pair(gm: fx.GraphModule, cut: fx.Node, linear: fx.Node) -> Region | Refusal:
    region = find(gm, cut, PositiveScale, explicit=Explicit.NOWHERE)
    if isinstance(region, Refusal):
        return region
    if not all(site.node.target in _MATRICES for site in region.producers):
        other = next(site.node for site in region.producers if site.node.target not in _MATRICES)
        return Refusal(f"'{other.name}' is no linear, and has no rows to balance", other)
    if region.constants:
        return Refusal("a parameter is added on the way, whose range would count too", region.constants[0].node)
    if not any(site.node is linear for site in region.readers):
        return Refusal(f"'{linear.name}' does not read the channels of '{cut.name}'", linear)
    return region


def _ranges(gm: fx.GraphModule, region: Region, sites: tuple[Site, ...]) -> list[fx.Node]:
    """``max|W|`` per channel [C] of the region, for each of the matrices."""
    return [channels_of(gm, site, region, _largest(gm, site)) for site in sites if site.law and site.node.target in _MATRICES]


def _largest(gm: fx.GraphModule, site: Site) -> fx.Node:
    """``max|W|`` per output of a producer, per input of a reader: of [N, K], or of experts' [E, K, N]."""
    assert site.law is not None
    transposed, made = site.node.target in LINEAR, site.argument is None
    kept = 2 if transposed == made else 1  # counted from behind

    def largest(W: Tensor) -> Tensor:
        return W.abs().amax([n for n in range(W.ndim) if n != W.ndim - kept])

    weight: Any = site.node.args[site.law.weights[0]]
    node: fx.Node = weight_algebra(gm, largest, weight, memo=("largest", kept))
    return node


_MATRICES = (*LINEAR, *GROUPED, *PRODUCTS, *EMBEDDING)
