"""Cross-layer equalization: the same function, the same ranges on both sides, and a second run that has nothing to do."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from random_graphs import TOLERANCE, Graph, Shape, Transformer, graph_of, graphs, pre_norm, relative_error

from fxquant.graph.equivalence import Note, site_name
from fxquant.graph.fuel import Fuel
from fxquant.patterns.cross_layer import balancing_scale, cross_layer

aten = torch.ops.aten
X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def linear(p, x, name, outputs):
    return F.linear(x, p(name, outputs, x.shape[-1]), p(f"{name}.b", outputs))


def values(p, x):
    """Four query heads on two value heads."""
    q, k, v = (linear(p, x, name, n).view(2, 3, -1, 4).transpose(1, 2) for name, n in (("q", 16), ("k", 8), ("v", 8)))
    out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return linear(p, out.transpose(1, 2).reshape(2, 3, 16), "o", 8)


PAIRS = {
    "two linears": (lambda p, x: linear(p, linear(p, x, "a", 6), "b", 5), "a", "b"),
    "relu between": (lambda p, x: linear(p, F.relu(linear(p, x, "a", 6)), "b", 5), "a", "b"),
    "a gated product": (lambda p, x: linear(p, F.silu(linear(p, x, "gate", 6)) * linear(p, x, "a", 6), "b", 5), "a", "b"),
    "values": (values, "v", "o"),
}


def weights(graph: Graph) -> dict[str, torch.Tensor]:
    """The weight that every linear works with, by its parameter."""
    found = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n):
            if n.target is aten.linear.default:
                found[site_name(n)] = self.env[n.args[1]]
            return super().run_node(n)

    Watch(graph.gm).run(*graph.inputs)
    return found


def ranges(graph: Graph, first: str, second: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``max|W|`` per channel that they share; query heads of a group share theirs."""
    found = weights(graph)
    made, read = found[first].abs().amax(1), found[second].abs().amax(0)
    if len(read) > len(made):
        read = read.view(2, 2, 4).amax(1).flatten()
    return made, read


@pytest.mark.parametrize("name", PAIRS)
def test_both_sides_of_a_pair_have_the_same_ranges_afterwards(name):
    model, first, second = PAIRS[name]
    graph = graph_of(model, X)
    before = graph.run()
    made, read = ranges(graph, first, second)
    assert not torch.allclose(made, read)
    assert [note.outcome for note in cross_layer(graph.gm, Fuel()) if note.where == second] == ["absorbed"]
    assert relative_error(before, graph.run()) < TOLERANCE
    after = ranges(graph, first, second)
    torch.testing.assert_close(after[0], after[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(after[0], (made * read).sqrt(), rtol=1e-12, atol=0)


@given(graphs)
def test_the_function_stays_the_same(graph):
    before = graph.run()
    cross_layer(graph.gm, Fuel())
    assert relative_error(before, graph.run()) < TOLERANCE


@given(graphs)
def test_a_second_run_scales_by_one(graph):
    cross_layer(graph.gm, Fuel())
    once = weights(graph)
    cross_layer(graph.gm, Fuel())
    for name, weight in weights(graph).items():
        torch.testing.assert_close(weight, once[name], rtol=1e-12, atol=0)


def test_a_chain_of_linears_comes_closer_with_every_run():
    def chain(p, x):
        for name in "abcd":
            x = F.relu(linear(p, x, name, 8))
        return x

    graph = graph_of(chain, X)
    before = graph.run()
    distances = []
    for _ in range(4):
        cross_layer(graph.gm, Fuel())
        made, read = ranges(graph, "a", "b")
        distances.append(float((made / read).log().abs().max()))
    assert distances[3] < distances[1] < distances[0]
    assert relative_error(before, graph.run()) < TOLERANCE


def test_a_transformer_is_balanced_at_its_values_and_its_gate():
    graph = Transformer(pre_norm, Shape(groups=2, rms=True, gated=True, activation="silu")).graph()
    absorbed = [note.where for note in cross_layer(graph.gm, Fuel()) if note.outcome == "absorbed"]
    assert absorbed == ["attention.o.weight", "mlp.down.weight"]


REFUSED = {
    "gelu": lambda p, x: linear(p, F.gelu(linear(p, x, "a", 6)), "b", 5),
    "output of the graph": lambda p, x: (y := linear(p, x, "a", 6), linear(p, y, "b", 5)),
    "not homogeneous": lambda p, x: ((y := linear(p, x, "a", 6)).tanh(), linear(p, y, "b", 5)),
    "no linear": lambda p, x: linear(p, x * p("gate", 8) + x.sum(-1, keepdim=True), "b", 5),
    "a parameter is added": lambda p, x: linear(p, linear(p, x, "a", 6) + p("c", 3, 6), "b", 5),
}


def cross_layer_notes(model) -> tuple[list[Note], bool]:
    graph = graph_of(model, X)
    code = graph.gm.code
    notes = cross_layer(graph.gm, Fuel())
    return notes, graph.gm.code == code


@pytest.mark.parametrize("reason", [r for r in REFUSED if r != "no linear"])
def test_a_pair_is_refused_with_the_reason_and_left_as_it_was(reason):
    notes, unchanged = cross_layer_notes(REFUSED[reason])
    assert [note.outcome for note in notes] == ["refused"] and reason in notes[0].reason, notes
    assert unchanged


def test_what_no_linear_makes_is_left_alone():
    notes, unchanged = cross_layer_notes(REFUSED["no linear"])
    assert unchanged and all(note.outcome == "refused" for note in notes)


@given(st.integers(0, 99))
def test_a_channel_without_weights_keeps_its_scale(seed):
    made, read = torch.rand(2, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    made[0], read[1] = 0, 0
    s = balancing_scale([made], [read])
    assert s[0] == s[1] == 1 and bool((s > 0).all())


@given(graphs, st.integers(0, 2))
def test_fuel_of_n_balances_n_pairs(graph, n):
    before, fuel = graph.run(), Fuel(limit=n)
    absorbed = [note for note in cross_layer(graph.gm, fuel) if note.outcome == "absorbed"]
    assert len(absorbed) == len(fuel.log) <= n
    assert relative_error(before, graph.run()) < TOLERANCE
