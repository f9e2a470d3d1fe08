"""What a calibration would measure at the linear inputs of a small graph, and what a transform chooses by it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from random_graphs import Graph
from torch import Tensor, fx

from fxquant.graph.equivalence import site_name
from fxquant.numerics.affine import IntAffine
from fxquant.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from fxquant.patterns.inputs import absorbs, linear_inputs
from fxquant.patterns.measured import Measured
from fxquant.patterns.transforms import Transform
from fxquant.recipe import Spec

STATIC = Spec(IntAffine(8, symmetric=False), PerTensor())
STATIC6 = Spec(IntAffine(6, symmetric=False), PerTensor())
TOKENS = Spec(IntAffine(8, symmetric=False), PerToken())
CHANNELS = Spec(IntAffine(8), PerChannel(0))
CHANNELS6 = Spec(IntAffine(6), PerChannel(0))
GROUPS = Spec(IntAffine(4, symmetric=False), PerGroup(4))


def measured_of(
    rows: Tensor, *weights: Tensor, activation: Spec | None = STATIC, weight: Spec | None = CHANNELS, where: str = "up.weight"
) -> Measured:
    """``rows`` [R, K], which are all there was, read by linears with these ``weights``."""
    statistics = (rows.amin(0), rows.amax(0), rows.abs().mean(0))
    return Measured(where, *statistics, rows, weights, (None,) * len(weights), activation, weight, True)


def values_of(gm: fx.GraphModule, inputs: list[Any], wanted: Callable[[fx.Node], bool]) -> dict[fx.Node, Any]:
    """What the nodes that are ``wanted`` hold when ``gm`` runs on ``inputs``."""
    found: dict[fx.Node, Any] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if wanted(n):
                found[n] = result
            return result

    with torch.no_grad():
        Watch(gm).run(*inputs)
    return found


def measure(
    gm: fx.GraphModule, inputs: list[Any], activation: Spec | None = STATIC, weight: Spec | None = CHANNELS
) -> dict[str, Measured]:
    """Every linear input of ``gm``, by site; of inputs that share a name the first."""
    groups = linear_inputs(gm)
    read = {n for linears in groups.values() for linear in linears for n in linear.args[:3] if isinstance(n, fx.Node)}
    values = values_of(gm, inputs, read.__contains__)
    found: dict[str, Measured] = {}
    for x, linears in groups.items():
        where = site_name(linears[0])
        weights = [values[linear.args[1]] for linear in linears]
        rows = values[x].reshape(-1, values[x].shape[-1])
        one = measured_of(rows, *weights, activation=activation, weight=weight, where=where)
        found.setdefault(where, replace(one, absorbed=absorbs(gm, linears[0])))
    return found


_KINDS = {"shift": lambda numbers: numbers, "copies": lambda numbers: numbers.abs().ceil().clamp(1, 4)}


def random_maps(transform: Transform, graph: Graph, seed: int = 0, spread: float = 2.0) -> dict[str, dict[str, Tensor]]:
    """Numbers for each need of ``transform`` at every linear input: scales and statistics are positive, copies are counted.

    ``spread``: the standard deviation of a shift, and of the logarithm of a scale.
    """
    generator = torch.Generator().manual_seed(seed)
    arguments: dict[str, dict[str, Tensor]] = {need: {} for need in transform.needs}
    for x, linears in linear_inputs(graph.gm).items():
        for need, given in arguments.items():
            numbers = spread * torch.randn(x.meta["val"].shape[-1], generator=generator, dtype=torch.float64)
            given[site_name(linears[0])] = _KINDS.get(need, torch.exp)(numbers)
    return arguments


def chosen(transform: Transform, graph: Graph, **specs: Spec | None) -> dict[str, dict[str, Tensor]]:
    """The arguments of ``transform`` for ``graph`` as its data has it: for each need a tensor per site."""
    assert transform.choose is not None
    arguments: dict[str, dict[str, Tensor]] = {need: {} for need in transform.needs}
    for where, measured in measure(graph.gm, graph.inputs, **specs).items():
        choice = transform.choose(measured)
        for need in transform.needs if isinstance(choice, dict) else ():
            arguments[need][where] = choice[need]  # type: ignore[index]  # it is a dict
    return arguments
