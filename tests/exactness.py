"""How exact a transform is on a model of the zoo, and at how many places: for the test that holds it to that, and its table."""

from collections import Counter
from typing import Any, NamedTuple

import torch
from graphs import distance, in_double
from measuring import random_maps
from models import Architecture
from random_graphs import Graph
from torch import Tensor, fx

from fxquant.graph.capture import capture
from fxquant.graph.equivalence import Note
from fxquant.graph.fuel import Fuel
from fxquant.graph.rewrite import copy_of
from fxquant.graph.tidy import tidy
from fxquant.patterns.canonical import canonicalize
from fxquant.patterns.transforms import TRANSFORMS, read

TOLERANCE = 1e-10  # relative, float64
SPREAD = 1.0  # of the logarithms of scales drawn by chance: e^6 between the largest and the least of a thousand

SIDES: dict[str, tuple[str, ...]] = {
    "canonical form": (),
    **{t.name: (t.name,) for t in TRANSFORMS},
    "migrate_gain, shift_scale": ("migrate_gain", "shift_scale"),
    "cross_layer, split_channels, shift_scale": ("cross_layer", "split_channels", "shift_scale"),
    "rotate, awq": ("rotate", "awq"),
}
"""Each transform alone, and some of what recipes put together."""


class Captured(NamedTuple):
    """One graph of a forward pass, tidied, and the values it ran on."""

    gm: fx.GraphModule
    values: list[Any]


class Exactness(NamedTuple):
    """Relative distance of the outputs from those captured, and how many places were "absorbed", "explicit" or "refused"."""

    distance: float
    outcomes: Counter[str]


def captured(architecture: Architecture) -> list[Captured]:
    """The graphs of one forward pass. Gains are far from one, two of them outliers."""
    found: list[Captured] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        values = [t.detach().clone() if isinstance(t, Tensor) else t for t in inputs]
        found.append(Captured(tidy(capture(gm)), values))
        return gm.forward

    torch._dynamo.reset()
    model, inputs = architecture.build()
    with torch.no_grad():
        torch.compile(model, backend=backend)(**inputs)
    return found


def transformed(gm: fx.GraphModule, names: tuple[str, ...]) -> tuple[fx.GraphModule, list[Note]]:
    """A copy of ``gm``, canonical and transformed; what data would have to tell is drawn by chance."""
    graph = canonicalize(copy_of(gm), Fuel())
    notes: list[Note] = []
    for seed, transform in enumerate(read(names)):
        maps = random_maps(transform, Graph(graph, []), seed, SPREAD) if transform.needs else {}
        notes += transform.run(graph, Fuel(), **maps)
    graph.recompile()
    return graph, notes


def exactness(graphs: list[Captured]) -> dict[str, Exactness]:
    """Every side of ``SIDES`` on one architecture, its graphs taken together."""
    found = dict.fromkeys(SIDES, Exactness(0.0, Counter()))
    for gm, values in graphs:
        wanted = in_double(gm, values)
        for side, names in SIDES.items():
            graph, notes = transformed(gm, names)
            far, outcomes = distance(wanted, in_double(graph, values)), Counter(note.outcome for note in notes)
            found[side] = Exactness(max(found[side].distance, far), found[side].outcomes + outcomes)
    return found
