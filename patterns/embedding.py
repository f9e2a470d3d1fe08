"""Look-ups in parameter tables, and the tables that also serve as the output head."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import fx

from fxquant.graph.match import Miss
from fxquant.graph.tidy import value
from fxquant.graph.weights import depends_on_parameters_only

aten = torch.ops.aten


class Embedding(NamedTuple):
    """``table[indices]``; ``heads`` are the linears that use the same table as their weight (a tied output head)."""

    node: fx.Node
    table: fx.Node
    indices: fx.Node
    heads: tuple[fx.Node, ...]


def embedding(node: fx.Node) -> Embedding | Miss:
    """The look-up that ``node`` is: ``embedding``, ``index_select`` or ``table[indices]`` on the first axis of a parameter."""
    if node.target is aten.embedding.default:
        table, indices = node.args[:2]
    elif node.target is aten.index_select.default and node.args[1] == 0:
        table, _, indices = node.args
    elif node.target is aten.index.Tensor and len(node.args[1]) == 1:  # type: ignore[arg-type]  # a list by its schema
        table, indices = node.args[0], node.args[1][0]  # type: ignore[index]  # a list by its schema
    else:
        return Miss("'{}' is {}, a look-up is needed", node, 0, (node, node.target))
    if not isinstance(table, fx.Node) or not isinstance(indices, fx.Node):
        return Miss("'{}' looks up nothing", node, 0, (node,))
    if value(table).dim() != 2 or not value(table).dtype.is_floating_point:
        details = (table, list(value(table).shape), value(table).dtype)
        return Miss("the table '{}' is {} of {}, a matrix of floats is needed", table, 1, details)
    if not depends_on_parameters_only(table):
        return Miss("the table '{}' depends on more than parameters", table, 1, (table,))
    heads = [u for u in table.users if u.target is aten.linear.default and u.args[1] is table]
    return Embedding(node, table, indices, tuple(sorted(heads)))


def embeddings(gm: fx.GraphModule) -> Iterator[Embedding]:
    """Every look-up in ``gm``, in the order of the graph."""
    for node in gm.graph.nodes:
        if isinstance(found := embedding(node), Embedding):
            yield found
