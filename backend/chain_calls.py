"""Neighbouring calls of our CPU ops become one op (cpu/chain.py): of an encoder, all its layers.

Runs of calls are found in the order of the graph. What depends on a run goes behind it, if no later call of the run waits for
that; nothing is moved past an op that writes to its arguments.
"""

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
    count, run = 0, _Run()
    for node in list(gm.graph.nodes):
        joins = _can_be_chained(node)
        if is_impure(node) or (joins and run.waits_for_it(node)):
            count += run.close(gm, fuel)
            run = _Run()
        run.take(node, joins)
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


class _Run:
    """Calls that may become one, and what must come behind them."""

    def __init__(self) -> None:
        self.calls: list[fx.Node] = []
        self.inside: set[fx.Node] = set()  # the calls, and their outputs
        self.behind: dict[fx.Node, None] = {}  # in the order of the graph

    def waits_for_it(self, node: fx.Node) -> bool:
        """``node`` reads something that comes behind the run."""
        return any(n in self.behind for n in node.all_input_nodes)

    def take(self, node: fx.Node, joins: bool) -> None:
        if joins:
            self.calls.append(node)
        if joins or (node.target is getitem and node.args[0] in self.inside):
            self.inside.add(node)
        elif any(n in self.inside or n in self.behind for n in node.all_input_nodes):
            self.behind[node] = None

    def close(self, gm: fx.GraphModule, fuel: Fuel) -> int:
        """Write the run as one op, if it has two calls at least; returns how many it had then."""
        if len(self.calls) < 2 or not fuel.take(f"chain {self.calls[0].name} to {self.calls[-1].name}"):
            return 0
        given = dict.fromkeys(n for call in self.calls for n in call.all_input_nodes if n not in self.inside)
        numbers = {node: Value(i) for i, node in enumerate(given)}
        program, results, count = list[str](), list[fx.Node](), len(given)
        for call in self.calls:
            program.append(sentence(CALLS[call.target], fx.map_arg(list(call.args), numbers.__getitem__)))
            outputs: Any = value(call)
            named: list[tuple[Any, fx.Node]] = [(0, call)]  # the number of an output, and its node
            if isinstance(outputs, Tensor):
                outputs = (outputs,)
            else:
                named = [(user.args[1], user) for user in call.users]
            for i, node in named:
                numbers[node] = Value(count + i)
                results += [node] if any(user not in self.inside for user in node.users) else []
            count += len(outputs)
        program.append(sentence("return", [numbers[node] for node in results]))
        with gm.graph.inserting_after(self.calls[-1]):
            node = last = gm.graph.call_function(chain, (list(given), "; ".join(program)))
        node.meta["val"] = [value(result) for result in results]
        for i, result in enumerate(results):
            with gm.graph.inserting_after(last):
                last = gm.graph.call_function(getitem, (node, i))
            last.meta["val"] = value(result)
            result.replace_all_uses_with(last, lambda user: user not in self.inside)
        for moved in self.behind:
            if moved < last:
                last.append(moved)
                last = moved
        for dead in sorted(self.inside, reverse=True):
            gm.graph.erase_node(dead)
        return len(self.calls)
