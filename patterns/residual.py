"""Residual adds: ``x + f(x)``, a stream and a branch that leaves it and comes back."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import fx

from fxquant.graph.match import Miss
from fxquant.graph.spelling import Sum, spell
from fxquant.graph.tidy import value

from .linear import same_sizes

aten = torch.ops.aten


class Residual(NamedTuple):
    """``node = stream + branch``; ``branch`` is computed from ``stream`` through at least one matrix product or norm."""

    node: fx.Node
    stream: fx.Node
    branch: fx.Node


# A branch does real work: one of these lies on the way from the stream to it.
_WORK = {
    getattr(aten, name).default
    for name in ("linear", "layer_norm", "rms_norm", "matmul", "mm", "bmm", "addmm", "conv1d", "conv2d")
}


def residual(node: fx.Node) -> Residual | Miss:
    """The residual add that ``node`` is, or why it is none."""
    read = spell(node)
    if not isinstance(read, Sum) or len(read.operands) != 2 or read.literals or any(factor != 1 for _, factor in read.operands):
        return Miss("'{}' is {}, a sum of two is needed", node, 0, (node, node.target))
    (a, _), (b, _) = read.operands
    x, y = value(a), value(b)
    if not all(isinstance(v, torch.Tensor) and v.dtype.is_floating_point for v in (x, y)) or not same_sizes(x.shape, y.shape):
        return Miss("'{}' and '{}' have not one floating shape", node, 1, (a, b))
    if x.dim() < 2:
        return Miss("'{}' has no channel axis", node, 1, (node,))
    for stream, branch in ((a, b), (b, a)):
        if _comes_from(branch, stream):
            return Residual(node, stream, branch)
    return Miss("neither '{}' nor '{}' is computed from the other", node, 2, (a, b))


def residuals(gm: fx.GraphModule) -> Iterator[Residual]:
    """Every residual add in ``gm``, in the order of the graph."""
    for node in gm.graph.nodes:
        if isinstance(found := residual(node), Residual):
            yield found


def _comes_from(branch: fx.Node, stream: fx.Node) -> bool:
    """``branch`` is computed from ``stream``, with real work on the way."""
    seen: set[tuple[fx.Node, bool]] = set()
    queue = [(branch, False)]
    while queue:
        here, worked = queue.pop()
        if here is stream:
            if worked:
                return True
            continue
        # Nodes before the stream cannot depend on it.
        if (here, worked) in seen or here < stream:
            continue
        seen.add((here, worked))
        worked = worked or here.target in _WORK
        queue += [(source, worked) for source in here.all_input_nodes]
    return False

