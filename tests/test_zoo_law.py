"""On every architecture, canonical form and transforms compute what was captured: float64, 1e-10."""

import pytest
from exactness import TOLERANCE, captured, exactness, transformed
from models import ZOO, Architecture, by_name

# bert-classifier, xlnet, prophetnet and pegasus-x (a norm of parameters alone) are those that found faults.
FAST = ("bert", "bert-classifier", "gpt2", "llama", "pegasus-x", "prophetnet", "t5", "vit", "xlnet")


def rows() -> list[object]:
    return [pytest.param(a, id=a.name, marks=() if a.name in FAST else pytest.mark.slow) for a in ZOO]


@pytest.mark.parametrize("architecture", rows())
def test_the_equalized_graph_is_the_captured_graph(architecture: Architecture) -> None:
    found = exactness(captured(architecture))
    assert {side: e.distance for side, e in found.items() if not e.distance < TOLERANCE} == {}


def test_gains_do_migrate_where_linears_read_them() -> None:
    ((gm, _),) = captured(by_name("gpt2"))
    _, notes = transformed(gm, ("migrate_gain",))
    assert [note.outcome for note in notes].count("absorbed") >= 4
