"""One product whose result is cut in halves, which meet again in a gate: written as two products, which become a pair.

    y = x [G; U]^T,  silu(y[:, :H]) * y[:, H:]   ==   silu(x G^T) * x U^T
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fxquant.graph.capture import fake_mode_of
from fxquant.graph.rewrite import WRITTEN, splice
from fxquant.graph.spelling import FAMILIES
from fxquant.graph.tidy import value
from fxquant.patterns.linear import cuts_of, part_of, readers_of, same_sizes

from ..kernels.kernel import SITES
from .program import Program, kind_of, number_of

aten = torch.ops.aten


class Halves:
    """The two products, in the place of ``product``; ``undo`` puts it back, ``keep`` erases it."""

    def __init__(self, gm: fx.GraphModule, product: fx.Node, given: dict[str, Any], shown: fx.Node, cut: list[fx.Node]) -> None:
        self._graph, self._cut, before = gm.graph, cut, set(gm.graph.nodes)
        self.products = [_half(gm, product, given, i) for i in (0, 1)]
        self._ends = [_shown(gm, half, shown, product) for half in self.products]
        self._new = [node for node in gm.graph.nodes if node not in before]
        for old, new in zip(cut, self._ends, strict=True):
            old.replace_all_uses_with(new)

    def undo(self) -> None:
        """As if nothing had happened."""
        for old, new in zip(self._cut, self._ends, strict=True):
            new.replace_all_uses_with(old)
        for node in reversed(self._new):
            self._graph.erase_node(node)


def halves_of(gm: fx.GraphModule, product: fx.Node, given: dict[str, Any]) -> Halves | None:
    """``product`` (its arguments: ``given``) written as two, if nothing reads it but its two halves along the last axis."""
    width, shown = value(product).shape[-1], product
    while len(users := readers_of(shown)) == 1 and FAMILIES.get(users[0].target) == "view":
        if not same_sizes(value(users[0]).shape[-1:], (width,)):
            break
        shown = users[0]
    cut = _cut(shown, width) if isinstance(width, int) and width % 2 == 0 else None
    kinds = {kind_of(name) for name in Program.parse(given["program"]).operands}
    if cut is None or "full" in kinds or any("y1" in step.args for step in Program.parse(given["program"]).steps):
        return None
    sizes: Any = () if shown is product else shown.args[1]  # of a view
    if any(size == -1 for size in sizes[:-1] if isinstance(size, int)):
        return None
    return Halves(gm, product, given, shown, cut)


def _cut(node: fx.Node, width: int) -> list[fx.Node] | None:
    """The nodes of the lower and of the upper half of ``node`` [..., width], if these are all that reads it."""
    cuts = cuts_of(node)
    found = {(part.first, part.last): cut for cut in cuts if (part := part_of(cut)) is not None}
    halves = [found.get((0, width // 2)), found.get((width // 2, width))]
    return [cut for cut in halves if cut is not None] if len(cuts) == 2 and None not in halves else None


def _half(gm: fx.GraphModule, product: fx.Node, given: dict[str, Any], i: int) -> fx.Node:
    """The product of half the rows of the weight: [M, width / 2]."""
    each, size = len(given["weights"]), value(product).shape[-1] // 2
    columns = {number_of(n) for n in Program.parse(given["program"]).operands if kind_of(n) == "column"}
    fixed = {name: v for name, v in given.items() if name not in ("weights", "inputs")}
    leading = {name: v for name, v in fixed.items() if isinstance(v, fx.Node)}
    literals = {name: v for name, v in fixed.items() if name not in leading}

    def part(x: Tensor, dim: int) -> Tensor:
        return x.narrow(dim, i * size, size).clone(memory_format=torch.contiguous_format)

    def half(leading: dict[str, Tensor], weights: list[Tensor], inputs: list[Tensor]) -> Tensor:
        # Codes lie in rows [N, ...]; scales, sums and zero points are [N] or [G, N].
        cut = [part(w, 0 if k % each == 0 else w.dim() - 1) for k, w in enumerate(weights)]
        ends = [part(x, 0) if k in columns else x for k, x in enumerate(inputs)]
        y: Tensor = product.target(**leading, **literals, weights=cut, inputs=ends)  # type: ignore[operator]  # an op
        return y

    new: fx.Node = splice(gm, product, half, leading, given["weights"], given["inputs"])
    new.meta[SITES] = product.meta.get(SITES, ())
    return new


def _shown(gm: fx.GraphModule, half: fx.Node, shown: fx.Node, product: fx.Node) -> fx.Node:
    """``half`` in the shape that ``product`` had as ``shown``, but for the last axis."""
    if shown is product:
        return half
    given: Any = shown.args[1]  # the sizes of a view
    sizes = [*given[:-1], value(half).shape[-1]]
    with gm.graph.inserting_before(shown):
        view = gm.graph.call_function(aten.view.default, (half, sizes))
    with fake_mode_of(gm):
        view.meta = {"val": value(half).view(fx.map_arg(sizes, value)), WRITTEN: True}
    return view
