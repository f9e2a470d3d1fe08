"""On every architecture, canonical form and transforms compute what was captured: float64, 1e-10."""

from typing import Any

import pytest
import torch
from graphs import distance, in_double
from models import ZOO, Architecture
from torch import fx

from fxquant.graph.capture import capture
from fxquant.graph.equivalence import Note
from fxquant.graph.fuel import Fuel
from fxquant.graph.tidy import tidy
from fxquant.patterns.canonical import canonicalize
from fxquant.patterns.transforms import TRANSFORMS, equalize

FAST = ("bert", "gpt2", "llama", "pegasus-x", "t5", "vit")  # pegasus-x: a norm of parameters alone


def captured(architecture: Architecture) -> list[tuple[fx.GraphModule, list[Any]]]:
    """The graphs of one forward pass, tidied, with the values they ran on. Gains are far from one, two of them outliers."""
    found: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        found.append((tidy(capture(gm)), [t.detach().clone() if isinstance(t, torch.Tensor) else t for t in inputs]))
        return gm.forward

    torch._dynamo.reset()
    model, inputs = architecture.build()
    with torch.no_grad():
        torch.compile(model, backend=backend)(**inputs)
    return found


def copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    copy = fx.GraphModule(gm, graph)
    copy.meta["fake_mode"] = gm.meta["fake_mode"]
    return copy


def transformed(gm: fx.GraphModule, names: tuple[str, ...]) -> tuple[fx.GraphModule, list[Note]]:
    graph = canonicalize(copy_of(gm), Fuel())
    notes = equalize(graph, names, Fuel())
    graph.recompile()
    return graph, notes


def rows() -> list[object]:
    return [pytest.param(a, id=a.name, marks=() if a.name in FAST else pytest.mark.slow) for a in ZOO]


@pytest.mark.parametrize("architecture", rows())
def test_the_equalized_graph_is_the_captured_graph(architecture: Architecture) -> None:
    for gm, values in captured(architecture):
        wanted = in_double(gm, values)
        for names in ((), *((t.name,) for t in TRANSFORMS if not t.needs)):
            graph, _ = transformed(gm, names)
            assert distance(wanted, in_double(graph, values)) < 1e-10, names


def test_gains_do_migrate_where_linears_read_them() -> None:
    (gpt2,) = (a for a in ZOO if a.name == "gpt2")
    ((gm, _),) = captured(gpt2)
    _, notes = transformed(gm, ("migrate_gain",))
    assert [note.outcome for note in notes].count("absorbed") >= 4
