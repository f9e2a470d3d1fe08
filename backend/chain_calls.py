"""Neighbouring calls of our CPU ops become one op (cpu/chain.py): of an encoder, nearly all of it.

A run of calls goes on until something else reads a result of it, or an op writes to its arguments. What stands between and does
neither comes before the run. So no result waits in memory for a reader, and nothing else changes its order.
"""

from collections.abc import Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from fxquant.graph.fuel import Fuel
from fxquant.graph.tidy import is_impure, value

from .cpu.chain import OPS, Value, chain, sentence

CALLS = {op: name for name, op in OPS.items()}


def chain_calls(gm: fx.GraphModule, fuel: Fuel) -> int:
    """Chain every run of two calls or more, in place, in a graph whose weights are inputs. Returns how many calls that were."""
    count, run, inside = 0, list[fx.Node](), set[fx.Node]()
    for node in list(gm.graph.nodes):
        joins = _can_be_chained(node)
        reads = any(n in inside for n in node.all_input_nodes)
        takes = reads and node.target is getitem
        if is_impure(node) or (reads and not joins and not takes):
            count += _write(gm, run, fuel)
            run, inside = [], set()
        elif joins:
            run.append(node)
            inside.add(node)
        elif takes:
            inside.add(node)
    gm.recompile()
    return count


def _can_be_chained(node: fx.Node) -> bool:
    """A call of such an op, all of whose arguments a program can hold."""
    if node.target not in CALLS or node.kwargs or len(node.args) != len(node.target._schema.arguments):  # type: ignore[union-attr]  # an op
        return False
    leaves = tree_leaves(list(node.args))
    return all(
        isinstance(value(x), Tensor) if isinstance(x, fx.Node) else isinstance(x, torch.dtype | bool | int | float | str | None)
        for x in leaves
    )


def _write(gm: fx.GraphModule, calls: Sequence[fx.Node], fuel: Fuel) -> int:
    """One op in the place of ``calls``, if they are two at least; returns how many they were then."""
    if len(calls) < 2 or not fuel.take(f"chain {calls[0].name} to {calls[-1].name}"):
        return 0
    outputs = {call: _outputs(call) for call in calls}
    inside = {*calls, *(node for named in outputs.values() for _, node in named)}
    given = dict.fromkeys(n for call in calls for n in call.all_input_nodes if n not in inside)
    numbers = {node: Value(i) for i, node in enumerate(given)}
    program, results, count = list[str](), dict[Value, list[fx.Node]](), len(given)
    for call in calls:
        program.append(sentence(CALLS[call.target], fx.map_arg(_arguments(call), numbers.__getitem__)))
        for i, node in outputs[call]:
            numbers[node] = Value(count + i)
            if any(user not in inside for user in node.users):
                results.setdefault(numbers[node], []).append(node)
        count += 1 if isinstance(value(call), Tensor) else len(value(call))
    program.append(sentence("return", list(results)))
    with gm.graph.inserting_after(calls[-1]):
        made = last = gm.graph.call_function(chain, (list(given), "; ".join(program)))
    made.meta["val"] = [value(nodes[0]) for nodes in results.values()]
    for i, nodes in enumerate(results.values()):
        with gm.graph.inserting_after(last):
            last = gm.graph.call_function(getitem, (made, i))
        last.meta["val"] = value(nodes[0])
        for node in nodes:
            node.replace_all_uses_with(last, lambda user: user not in inside)
    for dead in sorted(inside, reverse=True):
        gm.graph.erase_node(dead)
    return len(calls)


def _arguments(call: fx.Node) -> list[Any]:
    """As the op declares them: a graph may have 1 where it wants 1.0."""
    declared = call.target._schema.arguments  # type: ignore[union-attr]  # an op
    return [float(x) if str(a.type) == "float" else x for a, x in zip(declared, call.args, strict=True)]  # type: ignore[arg-type]


def _outputs(call: fx.Node) -> list[tuple[Any, fx.Node]]:
    """The number of each output that is taken, and the node that holds it."""
    if isinstance(value(call), Tensor):
        return [(0, call)]
    return [(user.args[1], user) for user in call.users]
