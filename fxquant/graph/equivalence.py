"""Equivalence: a map on a channel axis is inserted with its inverse, and both are moved until weights have absorbed them.

``LAWS`` (see ``fxquant.graph.laws``) says what each op does with a map, ``find`` (see ``fxquant.graph.region``) decides, and
``apply`` writes. A transform then only chooses the map:

    region = find(gm, norm, Scale)                                             # or a Refusal with its reason
    s = weight_algebra(gm, lambda gain: gain.abs().sqrt(), gain_node)          # an expression of parameters, in the graph
    apply(gm, region, Scale(s))
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .blocks import Blocks
from .capture import Parameter, fake_mode_of
from .fuel import Fuel
from .laws import LAWS, Centre, Effect, Law, Map, Matrix, PositiveScale, Rotation, Scale, Shift, laws_of
from .layout import Layout
from .region import Explicit, Refusal, Region, Site, find, source_of
from .rewrite import WRITTEN, splice
from .tidy import value
from .weights import depends_on_parameters_only, parameter_only

__all__ = [
    "LAWS", "Applied", "Centre", "Effect", "Explicit", "Law", "Map", "Matrix", "Note", "PositiveScale", "Refusal", "Region",
    "Rotation", "Scale", "Shift", "Site", "apply", "channels_of", "constant", "find", "laws_of", "root_of", "site_name",
    "source_of", "weight_algebra",
]  # fmt: skip


@dataclass(frozen=True)
class Note:
    """What a transform did at one place: ``outcome`` is "absorbed", "explicit" (an op was left over) or "refused"."""

    transform: str
    where: str
    outcome: str
    reason: str


@dataclass(frozen=True)
class Applied:
    """A map that was moved: how many producers and readers absorbed it, and the explicit ops that it left."""

    region: Region
    explicit: tuple[fx.Node, ...]

    def note(self, transform: str, where: str) -> Note:
        """The sentence about it for the report."""
        readers, names = self.region.readers, ", ".join(dict.fromkeys(site_name(site.node) for site in self.region.readers))
        took = f"{len(readers)} reader{'s' * (len(readers) != 1)} took it: {names}"
        if not self.explicit:
            return Note(transform, where, "absorbed", took)
        count = len(self.explicit)
        ops = "one op" if count == 1 else f"{count} ops"
        return Note(transform, where, "explicit", f"{took}; costs {ops} at run time")


def apply(
    gm: fx.GraphModule, cut: fx.Node | Region, map: Map, *, explicit: Explicit = Explicit.READERS, fuel: Fuel | None = None
) -> Applied | Refusal:
    """Move ``map`` on the last axis of ``cut`` into the weights around it; the graph computes the same function.

    ``cut`` is a value, or its region already found for this kind of map in this graph as it is. All is decided before anything
    is written: a Refusal leaves the graph as it was. Weights stay symbolic: what is written is ``W * s``, not a number.
    The caller recompiles ``gm`` when it has moved all that it wants to move.
    """
    region = cut if isinstance(cut, Region) else find(gm, cut, type(map), explicit=explicit)
    if isinstance(region, Refusal):
        return region
    if fuel is not None and not fuel.take(f"{type(map).__name__} on {region.cut.name}"):
        return Refusal("no fuel left", region.cut)
    return Applied(region, _write(gm, region, map))


def weight_algebra(gm: fx.GraphModule, fn: Callable[..., Any], *args: Any, memo: Hashable = None) -> Any:
    """``fn(*args)`` spliced in where the weights are computed, before everything that depends on an input; its node(s).

    ``args`` are nodes that depend on parameters and constants only, and plain Python values; ``memo`` as for ``splice``.
    """
    return splice(gm, _end_of_weights(gm), fn, *args, memo=memo)


def constant(gm: fx.GraphModule, tensor: Tensor, name: str = "constant") -> fx.Node:
    """A tensor that the graph owns (a statistic, an index), as a buffer of ``gm`` and a node among the weights."""
    number = 0
    while hasattr(gm, attribute := f"_fxquant_{name}{number}"):
        number += 1
    gm.register_buffer(attribute, tensor, persistent=False)
    with gm.graph.inserting_before(_end_of_weights(gm)):
        node = gm.graph.get_attr(attribute)
    node.meta["val"] = fake_mode_of(gm).from_tensor(tensor, static_shapes=True)
    return node


def channels_of(gm: fx.GraphModule, site: Site, region: Region, numbers: fx.Node) -> fx.Node:
    """The largest of the ``numbers`` [K] that belong to each channel of the region [C]; one per position of ``site``, none < 0.

    Query heads that share a value head have one channel at several positions; a fused projection has positions without any.
    """
    if site.layout.is_plain(region.channels):
        return numbers
    index = _layout_constant(gm, site.layout, region, numbers.meta["val"].device)

    def largest(x: Tensor, index: Tensor) -> Tensor:
        return x.new_zeros(region.channels + 1).scatter_reduce(0, index, x, "amax")[: region.channels]

    node: fx.Node = weight_algebra(gm, largest, numbers, index, memo=("channels_of", region.channels))
    return node


def site_name(node: fx.Node) -> str:
    """The path of the parameter behind the first weight that an op reads, through any algebra on it; else the op's name.

    >>> site_name(linear)                                                    # doctest: +SKIP
    'encoder.layer.0.attention.self.query.weight'
    """
    for weight in filter(depends_on_parameters_only, node.all_input_nodes):
        root = root_of(weight)
        if root is not None:
            return root.meta["parameter"].path  # type: ignore[no-any-return]
    return node.name


def root_of(weight: fx.Node) -> fx.Node | None:
    """The parameter that ``weight`` is made of: at every op that of the operand which accounts for most numbers, else the left.

    ``W_v / s`` is made of ``W_v``, though a larger weight may stand behind ``s``, and so are some of its columns, each twice.
    """
    roots: dict[fx.Node, fx.Node | None] = {}
    stack = [weight]
    while stack:  # operands first; in the midst of a rewrite the order of the graph is no guide
        node = stack[-1]
        if Parameter.of(node) is not None:
            roots[stack.pop()] = node
            continue
        if ahead := [n for n in node.all_input_nodes if n not in roots]:
            stack += ahead
            continue
        best, most = None, -1
        for operand in node.all_input_nodes:
            root = roots[operand]
            if root is not None and (accounts_for := min(map(_numel, (node, operand, root)))) > most:
                best, most = root, accounts_for
        roots[stack.pop()] = best
    return roots[weight]


def _numel(node: fx.Node) -> int:
    x = value(node)
    return x.numel() if isinstance(x, Tensor) else 0


def _end_of_weights(gm: fx.GraphModule) -> fx.Node:
    """The first node that depends on an input; every node that does not is moved before it."""
    weights = parameter_only(gm)
    late = False
    first: fx.Node | None = None
    for node in list(gm.graph.nodes):
        if node.op == "placeholder":
            continue
        if node not in weights:
            first, late = first or node, True
        elif late and first is not None:
            first.prepend(node)
    return first or gm.graph.output_node()


def _write(gm: fx.GraphModule, region: Region, map: Map) -> tuple[fx.Node, ...]:
    """The weight algebra of the whole region in one piece (tracing is what costs), then its explicit ops; the latter."""
    kind, entries = type(map), list(region.entries)
    sites = [*region.producers, *region.readers, *region.constants]
    left = {site.value: site.layout for site in region.explicit}
    old = [_weights(site) for site in sites]
    ends = [*left.values(), *(region.carried[value] for value in entries)]
    indices = [_index(gm, layout, region, map) for layout in [*(site.layout for site in sites), *ends]]

    def algebra(m: Tensor, weights: list[Any], indices: list[Any]) -> tuple[list[Any], list[Tensor]]:
        new = [_new_weights(site, m, w, i, kind) for site, w, i in zip(sites, weights, indices, strict=False)]
        spread = [_laid_out(m, layout, i, kind) for layout, i in zip(ends, indices[len(sites) :], strict=True)]
        operands = [_operand(m, value, kind.operand) for m, value in zip(spread, left, strict=False)]
        return new, operands + [_operand(m, v, kind.entering) for m, v in zip(spread[len(left) :], entries, strict=True)]

    held = [(site.law, _form(site.layout, map), site.node.meta["val"].dtype) for site in sites]
    held += [(None, _form(layout, map), value.meta["val"].dtype) for value, layout in zip([*left, *entries], ends, strict=True)]
    memo = ("map", kind, len(sites), len(entries), *held)  # equal layers are traced once
    new, operands = weight_algebra(gm, algebra, map.value, old, indices, memo=memo)
    end, weights = _end_of_weights(gm), parameter_only(gm)
    for site, before, after in zip(sites, old, new, strict=True):
        for slot, was, now in zip(site.law.weights if site.law else (site.argument,), before, after, strict=True):
            if now is not was:
                _set_argument(site.node, slot, was, now)
    # A site that is among the weights itself, a constant's cast, reads what was written at the end of them now.
    late = {site.node for site in sites} & weights
    for node in list(gm.graph.nodes) if late else ():
        if node in late:
            end.prepend(node)
            late |= set(node.users) & weights
    written = [_explicit(gm, value, kind, operand) for value, operand in zip([*left, *entries], operands, strict=True)]
    undone = dict(zip(left, written, strict=False))
    for site in region.explicit:
        _set_argument(site.node, site.argument, site.value, undone[site.value])
    for entry, op in zip(entries, written[len(left) :], strict=True):
        for reader, argument in region.entries[entry]:
            _set_argument(reader, argument, entry, op)
    return tuple(written)


def _explicit(gm: fx.GraphModule, value: fx.Node, kind: type[Map], operand: fx.Node) -> fx.Node:
    """The op that is left over, right behind ``value``."""
    with gm.graph.inserting_after(operand if value.op == "placeholder" else value):
        node = gm.graph.call_function(kind.explicit, (value, operand))
    with fake_mode_of(gm):
        node.meta["val"] = kind.explicit(value.meta["val"], operand.meta["val"])
    node.meta[WRITTEN] = True
    return node


def _operand(m: Any, value: fx.Node, of: Callable[[Any], Any]) -> Any:
    operand = of(m)
    return _cast(operand.dense() if isinstance(operand, Blocks) else operand, value.meta["val"].dtype)


def _form(layout: Layout, map: Map) -> Any:
    """What of a layout is written into the algebra; the rest of it is a constant of the graph."""
    return layout.blocks(map.value.meta["val"].shape[-1]) if isinstance(map, Matrix) else layout.index.shape


def _weights(site: Site) -> list[Any]:
    if site.law is None:
        return [site.value]
    return [site.node.args[n] if n < len(site.node.args) else None for n in site.law.weights]


def _new_weights(site: Site, m: Tensor, weights: list[Any], index: Any, kind: type[Map]) -> list[Any]:
    """The law's rewrite on (fake) tensors. Computed in the wider of the dtypes, kept in that of the weight.

    An operand of an elementwise op (a mask of bool, a table of integers, a number in a tensor) is kept in that of the result.
    """
    dtype = site.node.meta["val"].dtype
    elementwise = site.law is None or not site.law.whole_axis
    old = weights
    m = _laid_out(m, site.layout, index, kind)
    weights = [w if w is None else _cast(w, torch.promote_types(w.dtype, m.dtype)) for w in weights]
    rewrite = site.law.rewrite if site.law else None
    new = rewrite(*weights, m) if rewrite else (kind.apply(weights[0], m),)
    return [_cast(now, dtype if was is None or elementwise else was.dtype) for was, now in zip(old, new, strict=True)]


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x if x is None or x.dtype == dtype else x.to(dtype)


def _laid_out(m: Tensor, layout: Layout, index: Any, kind: type[Map]) -> Any:
    """The map's vector, one number per entry of the layout, without leading axes of size 1; or its matrix, block by block."""
    if issubclass(kind, Matrix):
        runs = layout.blocks(len(m))
        return m if runs is None or runs == (True,) else Blocks(m, runs)
    sizes = list(layout.index.shape)
    while len(sizes) > 1 and sizes[0] == 1:
        sizes.pop(0)
    if index is not None:
        m = torch.cat([m, m.new_full((1,), kind.neutral)])[index]
    return m if list(m.shape) == sizes else m.reshape(sizes)


def _index(gm: fx.GraphModule, layout: Layout, region: Region, map: Map) -> fx.Node | None:
    """The layout as a constant of the graph, unless it is the channels in their order."""
    if isinstance(map, Matrix) or layout.is_plain(region.channels):
        return None
    return _layout_constant(gm, layout, region, map.value.meta["val"].device)


def _layout_constant(gm: fx.GraphModule, layout: Layout, region: Region, device: torch.device) -> fx.Node:
    entries = torch.from_numpy(layout.index.reshape(-1) % (region.channels + 1))  # -1 is the entry after the last channel
    return constant(gm, entries.to(device), "layout")


def _set_argument(node: fx.Node, slot: int | str | None, was: Any, now: Any) -> None:
    """Put ``now`` in an argument that may be absent, or be a list with ``was`` in it."""
    if isinstance(slot, str):
        node.update_kwarg(slot, fx.map_arg(node.kwargs[slot], lambda n: now if n is was else n))
        return
    assert slot is not None  # None stands for an op's output, which is not set
    args = [*node.args, *[None] * (slot + 1 - len(node.args))]
    args[slot] = now if args[slot] is None else fx.map_arg(args[slot], lambda n: now if n is was else n)
    node.args = tuple(args)
