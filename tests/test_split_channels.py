"""Channel splitting: parts of a channel add up to it, and what is chosen spreads an outlier that a scale only moves."""

import pytest
import torch
import torch.nn.functional as F
from exactness import captured, copy_of
from graphs import distance, in_double
from hypothesis import given
from hypothesis import strategies as st
from measuring import STATIC, chosen, measured_of, random_maps
from models import ZOO
from random_graphs import TOLERANCE, Graph, Shape, Transformer, graph_of, graphs, pre_norm, relative_error

from fxquant.errors import CalibrationError, RecipeError
from fxquant.graph.fuel import Fuel
from fxquant.patterns.canonical import canonicalize
from fxquant.patterns.inputs import linear_inputs
from fxquant.patterns.output_error import OutputError
from fxquant.patterns.split_channels import choose, greedy, index_of, split, split_channels
from fxquant.patterns.transforms import equalize, get

SPLIT = get("split_channels")


# ---- the same function


@given(graphs, st.integers(0, 99))
def test_a_scale_after_the_copies_computes_the_same_function(graph, seed):
    """Behind the copies a site has its old name and more channels, and may be shifted and scaled channel by channel."""
    before = graph.run()
    equalize(graph.gm, ("split_channels",), Fuel(), split_channels=random_maps(SPLIT, graph, seed))
    equalize(graph.gm, ("shift_scale",), Fuel(), shift_scale=random_maps(get("shift_scale"), graph, seed))
    assert relative_error(before, graph.run()) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", pytest.param("bert", marks=pytest.mark.slow)])
def test_it_computes_the_same_function_on_an_architecture(name):
    (architecture,) = (a for a in ZOO if a.name == name)
    for gm, values in captured(architecture):
        graph = Graph(canonicalize(copy_of(gm), Fuel()), values)
        notes = split_channels(graph.gm, Fuel(), **random_maps(SPLIT, graph))
        assert len([note for note in notes if note.outcome == "explicit"]) >= 4
        assert distance(in_double(gm, values), in_double(graph.gm, values)) < 1e-10


def test_all_linears_that_read_a_value_read_one_set_of_copies():
    graph = Transformer(pre_norm, Shape(gated=True, activation="silu")).graph()
    before = {len(linears) for linears in linear_inputs(graph.gm).values()}
    split_channels(graph.gm, Fuel(), **random_maps(SPLIT, graph))
    inputs = linear_inputs(graph.gm)
    assert {len(linears) for linears in inputs.values()} == before == {1, 2, 3}
    assert all(x.target is torch.ops.aten.index_select.default for x in inputs)


def test_the_parts_cost_nothing_where_a_scale_is_absorbed_and_the_copies_are_one_op():
    graph = Transformer(pre_norm, Shape(rms=True, gated=True, activation="silu", bias=False)).graph()
    notes = split_channels(graph.gm, Fuel(), **random_maps(SPLIT, graph))
    (down,) = (note for note in notes if note.where == "mlp.down.weight")
    assert down.outcome == "explicit" and down.reason.endswith("costs one op at run time")


@pytest.mark.parametrize("c", [torch.zeros(8), torch.full((8,), 1.5), torch.full((8,), torch.inf), torch.ones(5)])
def test_what_counts_no_copies_is_refused(c):
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    gm = graph_of(lambda p, x: F.linear(x, p("up.weight", 5, 8)), x).gm
    with pytest.raises(RecipeError, match=r"cop(y|ies) of '?(up.weight|channels)?"):
        split_channels(gm, Fuel(), copies={"up.weight": c})


def test_one_copy_of_each_changes_nothing():
    graph = Transformer(pre_norm).graph()
    code = graph.gm.code
    ones = {where: torch.ones_like(c) for where, c in random_maps(SPLIT, graph)["copies"].items()}
    assert {note.outcome for note in split_channels(graph.gm, Fuel(), copies=ones)} == {"refused"}
    assert graph.gm.code == code


# ---- the choice


def massive(factor: float = 1000.0) -> "torch.Tensor":
    """Tokens of which one reaches far, in one channel."""
    rows = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    rows[0, 5] = factor
    return rows


def test_a_massive_channel_is_split_and_an_even_input_is_left_alone():
    weight = torch.randn(48, 512, generator=torch.Generator().manual_seed(1))
    choice = choose(measured_of(massive(), weight))
    assert isinstance(choice, dict) and int(choice["copies"].argmax()) == 5
    assert choice["copies"].sum() == 512 + 16
    assert isinstance(choose(measured_of(massive(1.0), weight)), str)
    assert isinstance(choose(measured_of(massive(), weight, activation=None)), str)


def test_what_is_measured_behind_the_copies_has_the_outputs_of_before_and_less_error():
    measured = measured_of(massive(), torch.randn(48, 512, generator=torch.Generator().manual_seed(1)))
    parts = split(measured, greedy(measured.high, 16))
    torch.testing.assert_close(parts.rows @ parts.weights[0].T, measured.rows @ measured.weights[0].T, rtol=1e-4, atol=1e-3)
    errors = [OutputError.of(m, rows=256, outputs=48)(torch.ones(m.rows.shape[1])) for m in (measured, parts)]
    assert errors[1] < 0.1 * errors[0]


@given(st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=12), st.integers(0, 40))
def test_greedy_copies_make_the_farthest_part_as_near_as_any_do(reach, extra):
    """With T the farthest part, channels need ceil(reach / t) copies for any t < T: more than there are."""
    reach = torch.tensor(reach, dtype=torch.float64)
    copies = greedy(reach, extra)
    assert copies.sum() == len(reach) + extra and bool((copies >= 1).all())
    t = (reach / copies).max() * (1 - 1e-9)
    assert (reach / t).ceil().sum() > copies.sum()
    assert torch.equal(index_of(copies).bincount().double(), copies)


def test_numbers_that_are_none_are_refused():
    rows = massive()
    rows[3, 3] = torch.nan
    with pytest.raises(CalibrationError):
        choose(measured_of(rows, torch.randn(8, 512), activation=STATIC))


def test_what_is_chosen_on_a_graph_can_be_written():
    graph = Transformer(pre_norm).graph()
    before = graph.run()
    split_channels(graph.gm, Fuel(), **chosen(SPLIT, graph))
    assert relative_error(before, graph.run()) < TOLERANCE
