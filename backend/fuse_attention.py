"""``quantize_rows(attention(linear(x), linear(x), linear(x)))`` becomes one op, on a CPU.

Queries, keys and values are used up while they are in the cache: they are never written to memory.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fxquant.graph.effects import writers_of
from fxquant.graph.fuel import Fuel
from fxquant.graph.match import Miss
from fxquant.graph.rewrite import replace_outputs, splice
from fxquant.graph.spelling import FAMILIES
from fxquant.graph.tidy import operand, value
from fxquant.patterns.linear import cuts_of, part_of, same_sizes

from .cpu import ops

aten = torch.ops.aten


class Heads(NamedTuple):
    """Queries, keys or values as part of a product: outputs ``first`` to ``last`` of ``product``, in ``heads`` heads."""

    product: fx.Node
    first: int
    last: int
    heads: int


def fuse_attention(gm: fx.GraphModule, fuel: Fuel) -> list[Miss]:
    """Fuse every op that quantizes the rows of an attention with it and with what it attends to. Returns why some were not."""
    misses: list[Miss] = []
    for rows in list(gm.graph.find_nodes(op="call_function", target=ops.quantize_rows)):
        attention = _attention(rows)
        operands = attention if isinstance(attention, Miss) else _operands(attention)
        if isinstance(operands, Miss):
            misses.append(operands)
        elif fuel.take(f"fuse {rows.name} with the attention it reads"):
            assert isinstance(attention, fx.Node)
            _write(gm, rows, attention, operands)
    return misses


def _attention(rows: fx.Node) -> fx.Node | Miss:
    """The attention whose heads, side by side, are the rows."""
    joined: Any = rows.args[0]
    node = joined
    while FAMILIES.get(node.target) == "view" and _alone(node):
        node = node.args[0]
    if not _swaps_heads_and_tokens(node) or not _alone(node):
        return Miss("'{}' does not put heads side by side", node, 0, (node,))
    attention = operand(node, 0)
    if attention.target is not ops.attention or not _alone(attention):
        return Miss("'{}' is no attention that only '{}' reads", attention, 1, (attention, rows))
    batch, heads, length, width = value(attention).shape
    if not same_sizes(value(joined).shape, (batch, length, heads * width)):
        return Miss("'{}' is not [B, L, H D] of the heads", joined, 1, (joined,))
    return attention


def _swaps_heads_and_tokens(node: fx.Node) -> bool:
    return node.target is aten.transpose.int and {axis % 4 for axis in node.args[1:]} == {1, 2}  # type: ignore[operator]  # ints


def _alone(node: fx.Node) -> bool:
    return len(node.users) == 1


def _operands(attention: fx.Node) -> tuple[Heads, Heads, Heads] | Miss:
    """Where queries, keys and values come from, if all come from the same codes and nobody else reads them."""
    found = [_heads(attention, node) for node in attention.args[:3]]
    for part in found:
        if isinstance(part, Miss):
            return part
    query, key, val = (part for part in found if isinstance(part, Heads))
    (batch, _, length, _), codes = value(attention).shape, operand(query.product, 0)
    for part in (key, val):
        if part.product.args[:3] != query.product.args[:3]:
            return Miss("'{}' and '{}' are products of different codes", part.product, 2, (part.product, query.product))
        if part.last - part.first != query.last - query.first or part.heads != query.heads:
            return Miss("'{}' makes other heads than '{}'", part.product, 2, (part.product, query.product))
    if not same_sizes(value(codes).shape[:-1], (batch, length)):
        return Miss("the codes '{}' are not [B, L, K]", codes, 2, (codes,))
    mask = attention.args[3]
    for node in (query.product, key.product, val.product, *((mask,) if isinstance(mask, fx.Node) else ())):
        if (writer := next(writers_of(node), None)) is not None:
            return Miss("'{}' is written to by '{}', perhaps before the fused op would read it", node, 2, (node, writer))
    return query, key, val


def _heads(attention: fx.Node, node: Any) -> Heads | Miss:
    """``transpose(view(product))``, or of a part of the product."""
    if not _swaps_heads_and_tokens(node):
        return Miss("'{}' is not the heads of a product: '{}' is no transpose", attention, 1, (node, node.target))
    split = operand(node, 0)
    if FAMILIES.get(split.target) != "view":
        return Miss("'{}' is not the heads of a product: '{}' is no view", attention, 1, (node, split.target))
    (batch, heads, length, width), source, way = value(node).shape, operand(split, 0), [node, split]
    first, size = 0, heads * width
    cut = part_of(source)
    if cut is not None:
        way.append(source)
        source, first = cut.source, cut.first
    if source.target is not ops.linear or source.args[8] != "none":
        return Miss("'{}' is made by '{}', which is no integer product", node, 2, (node, source))
    if not all(map(_alone, way)) or (cut is None and not _alone(source)):
        return Miss("others read what '{}' is made of", node, 2, (node,))
    if cut is not None and any(part_of(user) is None for user in cuts_of(source)):
        return Miss("others than attention read '{}'", source, 2, (source,))
    outputs: Any = source.args[7]
    if first % ops.PANEL or ((first + size) % ops.PANEL and first + size != outputs):
        return Miss("'{}' begins or ends within a panel of {} outputs of '{}'", node, 2, (node, ops.PANEL, source))
    if not same_sizes(value(source).shape[:-1], (batch, length)):
        return Miss("'{}' mixes the tokens of '{}'", node, 2, (node, source))
    return Heads(source, first, first + size, heads)


def _write(gm: fx.GraphModule, rows: fx.Node, attention: fx.Node, operands: tuple[Heads, Heads, Heads]) -> None:
    mask, is_causal, factor = attention.args[3:6]
    bits, symmetric = rows.args[1:3]
    parts, heads, dtype = [(h.first, h.last) for h in operands], operands[0].heads, operands[0].product.args[9]

    def fused(codes: Any, weights: Any, mask: Tensor | None) -> list[Tensor]:
        cut = [_part(weight, *part) for weight, part in zip(weights, parts, strict=True)]
        columns = map(list, zip(*cut, strict=True))
        return list(ops.attend(*codes, *columns, heads, dtype, mask, is_causal, factor, bits, symmetric))

    product = operands[0].product
    memo = ("fuse_attention", tuple(parts), heads, dtype, is_causal, factor, bits, symmetric)
    given = [list(h.product.args[3:7]) for h in operands]
    new = splice(gm, rows, fused, list(product.args[:3]), given, mask, memo=memo)
    replace_outputs(gm, rows, new)


def _part(weight: Any, first: int, last: int) -> list[Tensor | None]:
    """Packed weight, scale, sums and bias of the outputs ``first`` to ``last``."""
    panels, scale, sums, bias = weight
    if (first, last) == (0, scale.shape[0]):
        return [panels, scale, sums, bias]
    cut = (None if t is None else t[first:last] for t in (scale, sums, bias))
    return [panels[first // ops.PANEL : -(last // -ops.PANEL)], *cut]
