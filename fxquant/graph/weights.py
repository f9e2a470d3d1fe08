"""Which part of a graph depends on parameters only: it is the same on every call until a parameter changes."""

from functools import lru_cache
from typing import Any

import torch
from torch import fx

from .capture import Parameter
from .effects import family, written_by


def parameter_only(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes that depend on nothing but parameters, buffers and constants; purely: nothing random, nothing written in place.

    A linear's weight is one; so is ``1 + weight``, a mask made of an ``arange`` alone, or ``W1 @ W2``.
    """
    written: set[fx.Node] = set()
    for node in gm.graph.nodes:
        for target in written_by(node):
            written |= family(target)
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node not in written and _is_weight(node) and all(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def depends_on_parameters_only(node: Any) -> bool:
    """The same question about one node, answered by walking up from it; constants alone do not count as a weight."""
    if not isinstance(node, fx.Node):
        return False
    seen: set[fx.Node] = set()
    queue = [node]
    parameters = 0
    while queue:
        here = queue.pop()
        if here in seen:
            continue
        seen.add(here)
        if not _is_weight(here):
            return False
        parameters += here.op == "placeholder"
        queue += here.all_input_nodes
    return parameters > 0 and not any(written_by(user) for n in seen for alias in family(n) for user in alias.users)


def cone_of(node: fx.Node) -> set[fx.Node]:
    """Everything that ``node`` depends on, itself and the placeholders included."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        n = stack.pop()
        if n not in seen:
            seen.add(n)
            stack.extend(n.all_input_nodes)
    return seen


def parameters_of(node: fx.Node) -> tuple[str, ...]:
    """The paths of the parameters that ``node`` depends on, in the order of the graph's inputs."""
    cone = cone_of(node)
    return tuple(p.path for n in node.graph.find_nodes(op="placeholder") if n in cone and (p := Parameter.of(n)) is not None)


def _is_weight(node: fx.Node) -> bool:
    if node.op == "placeholder":
        return Parameter.of(node) is not None
    if node.op == "get_attr":
        return True
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return _is_pure(node.target)
    return not isinstance(node.target, torch._ops.HigherOrderOperator) and not node.is_impure()


@lru_cache(None)
def _is_pure(op: torch._ops.OpOverload) -> bool:
    """Kept by op: reading a schema is what the walks over whole graphs would spend their time on."""
    return not op._schema.is_mutable and torch.Tag.nondeterministic_seeded not in op.tags
