"""Write a Python function into a graph: it is traced on the fake values of its arguments and its nodes are copied in."""

import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from .capture import fake_mode_of, trace
from .tidy import is_impure, value

# Set in the meta of every node that a rewrite wrote, so that folding can tell our weight algebra from the model's own.
WRITTEN = "fxquant_written"


def splice(gm: fx.GraphModule, before: fx.Node, fn: Callable[..., Any], *args: Any, memo: Hashable = None) -> Any:
    """Insert ``fn(*args)`` into ``gm`` before the node ``before``; returns the node(s) that hold its result.

    ``args`` may hold nodes (their fake values are traced) and plain Python values (baked in). Inserted nodes carry ``val``.
    ``memo``: if given, two calls with equal ``memo`` and arguments of the same types trace once; it must say all that ``fn``
    holds.

    >>> y = splice(gm, node, lambda x, s: x / s, x_node, s_node)            # doctest: +SKIP
    """
    flat, spec = pytree.tree_flatten(args)
    nodes = [a for a in flat if isinstance(a, fx.Node)]

    def on_nodes(*values: Any) -> Any:
        given = iter(values)
        return fn(*pytree.tree_unflatten([next(given) if isinstance(a, fx.Node) else a for a in flat], spec))

    def traced() -> fx.GraphModule:
        return trace(on_nodes, _distinct([value(n) for n in nodes]), fake_mode_of(gm))

    if memo is None:
        return _copy_in(gm, before, traced(), nodes)
    traces = gm.meta.setdefault("fxquant_traces", {})
    # 2, 2.0 and True are equal, and make different graphs
    key = (memo, str(spec), *(_type_of(a) if isinstance(a, fx.Node) else (type(a), a) for a in flat))
    if key not in traces:
        traces[key] = traced()
    return _copy_in(gm, before, traces[key], nodes)


def _distinct(values: list[Any]) -> list[Any]:
    """The fake ``values``, no tensor twice.

    The tracer tells its inputs apart by identity, and copies of one trace share values.
    """
    seen: set[int] = set()
    result = []
    for x in values:
        if isinstance(x, torch.Tensor) and id(x) in seen:
            x = x.detach()
        seen.add(id(x))
        result.append(x)
    return result


def _type_of(node: fx.Node) -> Hashable:
    x = value(node)
    return (str(x.shape), str(x.stride()), x.dtype, x.device) if isinstance(x, torch.Tensor) else repr(x)


def _copy_in(gm: fx.GraphModule, before: fx.Node, traced: fx.GraphModule, nodes: list[fx.Node]) -> Any:
    placed: dict[fx.Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), nodes, strict=True))
    with gm.graph.inserting_before(before):
        for node in traced.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if node.op == "get_attr":
                placed[node] = _adopt_constant(gm, traced, node)
                continue
            placed[node] = gm.graph.node_copy(node, lambda n: placed[n])
            placed[node].meta[WRITTEN] = True
    (result,) = traced.graph.output_node().args
    return fx.map_arg(result, lambda n: placed[n])


def copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph that can be rewritten while ``gm`` stays; tensors and submodules are shared, not copied."""
    graph = fx.Graph()
    placed: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, placed))
    copy = fx.GraphModule(gm, graph)
    copy.meta["fake_mode"] = fake_mode_of(gm)
    return copy


def replace(gm: fx.GraphModule, node: fx.Node, fn: Callable[..., Any], *args: Any, memo: Hashable = None) -> fx.Node:
    """Replace ``node`` by ``fn(*args)``; returns the new node. What became unread is left for ``tidy``."""
    new: fx.Node = splice(gm, node, fn, *args, memo=memo)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
    return new


def erase(gm: fx.GraphModule, node: fx.Node) -> None:
    """Erase ``node``, which nobody reads any more, and what only it read."""
    queue = node.all_input_nodes
    gm.graph.erase_node(node)
    while queue:
        here = queue.pop()
        if here.users or is_impure(here) or here._erased:
            continue
        queue += here.all_input_nodes
        gm.graph.erase_node(here)


def replace_outputs(gm: fx.GraphModule, node: fx.Node, new: Sequence[fx.Node]) -> None:
    """Let everybody who takes the output ``i`` of ``node`` read ``new[i]``, and erase it, and what only it read."""
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(new[user.args[1]])  # type: ignore[index]  # the number of an output
        gm.graph.erase_node(user)
    erase(gm, node)


def _adopt_constant(gm: fx.GraphModule, source: fx.GraphModule, node: fx.Node) -> fx.Node:
    """A tensor constant of the traced function becomes an attribute of ``gm`` under a free name."""
    tensor = getattr(source, str(node.target))
    number = 0
    while hasattr(gm, name := f"_fxquant_constant{number}"):
        number += 1
    if isinstance(tensor, torch.nn.Module):
        gm.add_module(name, tensor)
    else:
        gm.register_buffer(name, tensor, persistent=False)
    new = gm.graph.get_attr(name)
    new.meta = dict(node.meta)
    return new
