"""Who writes to a tensor in place: through itself, its views, or what it is a view of."""

from collections.abc import Iterator
from functools import lru_cache
from operator import getitem
from typing import Any

import torch
from torch import fx


def writers_of(node: fx.Node) -> Iterator[fx.Node]:
    """The ops that write in place to ``node``, or to anything that shares memory with it."""
    for alias in family(node):
        for user in alias.users:
            if alias in written_by(user):
                yield user


def writers_between(node: fx.Node, first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    """Those of them behind ``first`` and before ``last``."""
    return (writer for writer in writers_of(node) if first < writer < last)


def family(node: fx.Node) -> set[fx.Node]:
    """``node`` and every node that may share its memory: its bases, their views, and so on."""
    found: set[fx.Node] = set()
    queue = [node]
    while queue:
        here = queue.pop()
        if here in found:
            continue
        found.add(here)
        queue += bases(here)
        queue += [user for user in here.users if here in bases(user)]
    return found


def bases(node: fx.Node) -> list[fx.Node]:
    """The arguments whose memory the result may share."""
    if node.target is getitem:
        source = node.args[0]
        return [source] if isinstance(source, fx.Node) else []
    told = [n for argument, given in _arguments(node) if argument.alias_info is not None for n in _nodes(given)]
    return told or [n for n in node.all_input_nodes if _share_memory(n, node)]


def _share_memory(a: fx.Node, b: fx.Node) -> bool:
    """Composite ops such as ``atleast_3d`` return views and do not say so; their fake values do."""
    x, y = a.meta.get("val"), b.meta.get("val")
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor) or b.op != "call_function":
        return False
    return bool(x.untyped_storage()._cdata == y.untyped_storage()._cdata)


def written_by(node: fx.Node) -> list[fx.Node]:
    """The arguments that ``node`` writes to."""
    if not isinstance(node.target, torch._ops.OpOverload) or not _is_mutable(node.target):
        return []
    return [n for a, given in _arguments(node) if a.alias_info is not None and a.alias_info.is_write for n in _nodes(given)]


@lru_cache(None)
def _is_mutable(op: torch._ops.OpOverload) -> bool:
    return bool(op._schema.is_mutable)  # reading it costs more than all else here


def _arguments(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    for i, argument in enumerate(node.target._schema.arguments):
        if i < len(node.args):
            yield argument, node.args[i]
        elif argument.name in node.kwargs:
            yield argument, node.kwargs[argument.name]


def _nodes(given: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(given, found.append)
    return found
