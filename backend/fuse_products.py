"""``quantize_rows`` of ``linear(x)``, ``norm(linear(x) + residual)`` or ``act(linear(x)) * linear(x)``: one op, on a CPU.

The result of the product is finished, row by row, while it is in the cache: it is never written to memory.
"""

from typing import Any

import torch
from torch import Tensor, fx

from fxquant.graph.fuel import Fuel
from fxquant.graph.match import Miss
from fxquant.graph.rewrite import erase, replace_outputs, splice
from fxquant.graph.tidy import operand, value
from fxquant.patterns.linear import same_sizes

from .cpu import ops
from .packed_products import Arguments, gate_and_up, joined

aten = torch.ops.aten


def fuse_products(gm: fx.GraphModule, fuel: Fuel) -> list[Miss]:
    """Fuse every op that quantizes rows with the product whose rows they are; in place. Returns why some were not."""
    misses: list[Miss] = []
    for rows in gm.graph.find_nodes(op="call_function", target=ops.normalize_rows):
        shortcut = _scaled_shortcut(rows)
        if shortcut is not None and fuel.take(f"fuse {rows.name} with the scale of its residual"):
            other = rows.args[1] if shortcut is rows.args[0] else rows.args[0]
            rows.args = (other, *shortcut.args, *rows.args[3:])
            erase(gm, shortcut)
    for rows in list(gm.graph.find_nodes(op="call_function", target=ops.quantize_rows)):
        pair = _gate_and_up(rows)
        if isinstance(pair, Miss):
            misses.append(pair)
        elif fuel.take(f"fuse {rows.name} with the gated product it reads"):
            _write_gated(gm, rows, *pair)
    for target in (ops.quantize_rows, ops.normalize_rows):
        for rows in list(gm.graph.find_nodes(op="call_function", target=target)):
            product = _product(rows)
            if isinstance(product, Miss):
                misses.append(product)
            elif fuel.take(f"fuse {rows.name} with the product it reads"):
                _write(gm, rows, product)
    return misses


def _product(rows: fx.Node) -> fx.Node | Miss:
    """The product that ``rows`` reads and nobody else does."""
    misses: list[Miss] = []
    for x in _operands(rows):
        if x.target is not ops.linear:
            misses.append(Miss("'{}' is no integer product", x, 0, (x,)))
        elif len(x.users) > 1:
            misses.append(Miss("'{}' is read by {} others too", x, 1, (x, len(x.users) - 1)))
        elif not all(same_sizes(value(x).shape, value(other).shape) for other in _operands(rows)):
            misses.append(Miss("'{}' is broadcast as it is added", x, 1, (x,)))
        else:
            return x
    return max(misses, key=lambda miss: miss.depth)


def _gate_and_up(rows: fx.Node) -> tuple[fx.Node, fx.Node] | Miss:
    """The two products of the same codes whose product ``rows`` quantizes; nobody else reads either."""
    product = operand(rows, 0)
    if product.target is not aten.mul.Tensor or len(product.users) > 1:
        return Miss("'{}' is no product of two that only '{}' reads", product, 0, (product, rows))
    return gate_and_up(product, {ops.linear})


def _operands(rows: fx.Node) -> list[fx.Node]:
    """What is added, a residual with a scale left out; or the one thing that is quantized."""
    both = rows.target is ops.normalize_rows and rows.args[2] is None
    return [n for n in rows.args[: 1 + both] if isinstance(n, fx.Node)]


def _scaled_shortcut(rows: fx.Node) -> fx.Node | None:
    """What is added, if it is a product with one number per channel that nobody else reads: all that is left of a transform."""
    if rows.args[1] is None or rows.args[2] is not None:
        return None
    for node in rows.args[1::-1]:
        if not isinstance(node, fx.Node) or node.target is not aten.mul.Tensor or len(node.users) > 1:
            continue
        x, s = node.args
        if not (isinstance(x, fx.Node) and isinstance(s, fx.Node)):
            continue
        types, shape = {value(n).dtype for n in (x, s, node)}, value(node).shape
        if len(types) == 1 and same_sizes(value(x).shape, shape) and same_sizes(value(s).shape, shape[-1:]):
            return node
    return None


def _write(gm: fx.GraphModule, rows: fx.Node, product: fx.Node) -> None:
    residual: Any = None
    way: Any = (None, "none", None, None, 0.0, *rows.args[1:], False, False)
    if rows.target is ops.normalize_rows:
        residual = rows.args[1] if product is rows.args[0] else rows.args[0]
        way = rows.args[2:]
    scale, norm, weight, bias, eps, *flags = way

    def fused(product: Any, *rest: Tensor | None) -> list[Tensor]:
        residual, scale, weight, bias = rest
        return list(ops.linear_rows(*product, residual, scale, norm, weight, bias, eps, *flags))

    memo = ("fuse_products", norm, eps, *flags)
    new = splice(gm, rows, fused, list(product.args), residual, scale, weight, bias, memo=memo)
    replace_outputs(gm, rows, new)


def _write_gated(gm: fx.GraphModule, rows: fx.Node, gate: fx.Node, up: fx.Node) -> None:
    parts = [Arguments.of(node) for node in (gate, up)]
    how = (parts[0].out_features, parts[0].activation, parts[0].dtype, *rows.args[1:])  # and bits and symmetry of the rows

    def fused(codes: Any, *weights: Any) -> list[Tensor]:
        return list(ops.linear_gated(*codes, *joined(weights), *how))

    weights = [list(part.weight) for part in parts]
    new = splice(gm, rows, fused, list(parts[0].input), *weights, memo=("fuse_products", "gated", *how))
    replace_outputs(gm, rows, new)
