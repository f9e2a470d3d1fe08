"""Products of the same input become one, on a CPU: queries, keys and values, mostly; a gate and what it lets through.

What a call costs beside its weights is no small part of a product of one row.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.graph.effects import family, writers_between, writers_of
from fxquant.graph.fuel import Fuel
from fxquant.graph.match import Miss
from fxquant.graph.rewrite import erase, splice
from fxquant.graph.spelling import FAMILIES
from fxquant.graph.tidy import value
from fxquant.graph.weights import depends_on_parameters_only
from fxquant.patterns.linear import same_sizes

from .cpu import low_bit, ops
from .packed_products import INPUTS, Arguments, gate_and_up, joined

aten = torch.ops.aten


def join_products(gm: fx.GraphModule, fuel: Fuel) -> list[Miss]:
    """Join all products that have the same input and epilogue; in place. Returns why some that could be joined were not."""
    groups: dict[Any, list[fx.Node]] = defaultdict(list)
    for op in INPUTS:
        for node in gm.graph.find_nodes(op="call_function", target=op):
            a = Arguments.of(node)
            groups[op, a.input, a.kind, a.activation, a.dtype, a.bias_dtype].append(node)
    misses: list[Miss] = []
    for group in groups.values():
        fit: list[fx.Node] = []
        for node in sorted(group):
            unfit = _unfit(node)
            if unfit is None and fit:
                unfit = _written_between(fit[0], node)
            if unfit is None:
                fit.append(node)
            elif len(group) > 1:
                misses.append(unfit)
        if len(fit) > 1 and fuel.take(f"join {', '.join(n.name for n in fit)}"):
            _write(gm, fit)
    return misses


def join_gates(gm: fx.GraphModule, fuel: Fuel) -> list[Miss]:
    """``act(linear(x)) * linear(x)`` of low-bit weights as one op; in place. Returns why some products of two are none.

    Behind 8-bit weights the codes of such a product are made in the same pass: fuse_products.py.
    """
    misses: list[Miss] = []
    for product in list(gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor)):
        pair = gate_and_up(product, low_bit.GATED)
        if isinstance(pair, Miss):
            misses.append(pair)
        elif (written := _written_between(*sorted(pair))) is not None:
            misses.append(written)
        elif fuel.take(f"join '{pair[0].name}' and what it lets through"):
            _write_gated(gm, product, *pair)
    return misses


def _write_gated(gm: fx.GraphModule, product: fx.Node, gate: fx.Node, up: fx.Node) -> None:
    parts = [Arguments.of(node) for node in (gate, up)]
    op, how = low_bit.GATED[gate.target], (*parts[0].kind, parts[0].out_features, parts[0].activation, parts[0].dtype)

    def fused(given: Any, *weights: Any) -> Tensor:
        return op(*given, *joined(weights), *how)  # type: ignore[no-any-return]  # an op

    weights = [list(part.weight) for part in parts]
    place = max(gate, up)  # behind which the input may be written to
    new = splice(gm, place, fused, list(parts[0].input), *weights, memo=("join_gates", gate.target, *how))
    product.replace_all_uses_with(new)
    erase(gm, product)


def _unfit(node: fx.Node) -> Miss | None:
    """Why ``node`` cannot be a part of a wider result, whose rows are further apart."""
    outputs = value(node).shape[-1]
    if outputs % ops.PANEL:
        return Miss("'{}' has {} outputs, no multiple of {}", node, 0, (node, outputs, ops.PANEL))
    if (writer := next(writers_of(node), None)) is not None:
        return Miss("'{}' is written to by '{}'", node, 1, (node, writer))
    if family(node) & set(node.graph.output_node().all_input_nodes):
        return Miss("'{}' leaves the graph, where its strides are seen and it would keep the others alive", node, 1, (node,))
    lead = value(node).shape[:-1]
    for reader in node.users:
        views = FAMILIES.get(reader.target) == "view"
        if reader.target is aten.as_strided.default or (views and not _splits_outputs(reader, lead)):
            return Miss("'{}' reads '{}' by where its rows lie", reader, 1, (reader, node))
    if not all(depends_on_parameters_only(n) for n in Arguments.of(node).weight if n is not None):
        return Miss("the weight of '{}' is computed at run time", node, 1, (node,))
    return None


def _written_between(first: fx.Node, last: fx.Node) -> Miss | None:
    """Why two products that have the same nodes as their input do not read the same numbers."""
    for x in Arguments.of(first).input:
        if isinstance(x, fx.Node) and (writer := next(writers_between(x, first, last), None)) is not None:
            return Miss("'{}' is written to by '{}' between '{}' and '{}'", x, 1, (x, writer, first, last))
    return None


def _splits_outputs(view: fx.Node, lead: Sequence[Any]) -> bool:
    return same_sizes(value(view).shape[: len(lead)], lead)


def _write(gm: fx.GraphModule, group: list[fx.Node]) -> None:
    first, op, parts = group[0], group[0].target, [Arguments.of(node) for node in group]
    kind, activation, dtype = parts[0].kind, parts[0].activation, parts[0].dtype
    sizes = [value(node).shape[-1] for node in group]

    def fused(given: Any, *weights: Any) -> list[Tensor]:
        return list(op(*given, *joined(weights), *kind, sum(sizes), activation, dtype).split(sizes, -1))  # type: ignore[operator]  # an op

    for part in parts[1:]:
        _hoist(part.weight, first)
    weights, memo = [list(part.weight) for part in parts], ("join_products", op, *kind, activation, dtype, *sizes)
    for node, result in zip(group, splice(gm, first, fused, list(parts[0].input), *weights, memo=memo), strict=True):
        node.replace_all_uses_with(result)
        erase(gm, node)


def _hoist(nodes: Sequence[Any], place: fx.Node) -> None:
    """Compute ``nodes``, functions of parameters alone, and all that they are made of, before ``place``."""
    late, queue = set[fx.Node](), [n for n in nodes if isinstance(n, fx.Node)]
    while queue:
        node = queue.pop()
        if node not in late and place < node:
            late.add(node)
            queue += node.all_input_nodes
    for node in sorted(late):
        place.prepend(node)
