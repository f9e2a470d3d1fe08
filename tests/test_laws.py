"""Every transform, on random transformers: the same function, twice is once, and not more than it was allowed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measuring import random_maps
from random_graphs import (
    ARCHITECTURES,
    TOLERANCE,
    Graph,
    Shape,
    Transformer,
    absmax_of_linear_inputs,
    any_transformers,
    graphs,
    graphs_of,
    pre_norm,
    relative_error,
    transformers,
)

from fxquant.errors import RecipeError
from fxquant.graph.equivalence import Note, site_name
from fxquant.graph.fuel import Fuel
from fxquant.graph.rewrite import copy_of
from fxquant.patterns.inputs import linear_inputs
from fxquant.patterns.smooth import FLOOR
from fxquant.patterns.transforms import TRANSFORMS, Transform, equalize, get, read

transforms = st.sampled_from(TRANSFORMS)
variants = st.sampled_from([*((t.name, {}) for t in TRANSFORMS), ("migrate_gain", {"bias": True})])


def run(
    transform: Transform, graph: Graph, fuel: Fuel | None = None, *, seed: int = 0, spread: float = 2.0, **arguments: object
) -> list[Note]:
    if "statistics" in transform.needs:
        arguments["statistics"] = absmax_of_linear_inputs(graph)
    elif transform.choose is not None:
        arguments |= random_maps(transform, graph, seed, spread)
    return transform.run(graph.gm, fuel or Fuel(), **arguments)


def applied(notes: list[Note]) -> list[Note]:
    return [note for note in notes if note.outcome != "refused"]


def rounding_error(graph: Graph) -> float:
    """What the output loses when every linear's input is rounded to 8 bits per tensor, and its weight per row."""

    class Rounded(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):
            if target is torch.ops.aten.linear.default:
                x, W = args[:2]
                args = (to_8_bits(x, x.abs().max()), to_8_bits(W, W.abs().amax(1, keepdim=True)), *args[2:])
            return super().call_function(target, args, kwargs)

    exact, rounded = graph.run()[0], Rounded(graph.gm).run(*graph.inputs)
    return float((rounded - exact).norm() / exact.norm())


def to_8_bits(x: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    return (x * 127 / largest).round() * largest / 127


@pytest.mark.parametrize("name", ["smooth", "balance"])
def test_a_transform_makes_less_of_the_rounding_where_a_gain_stretches_one_channel(name):
    graph = Transformer(pre_norm, Shape(heads=4)).graph()
    before = rounding_error(graph)
    notes = applied(run(get(name), graph))
    assert {note.where for note in notes} >= (
        {"attention.q.weight", "mlp.up.weight", "mlp.down.weight"} if name == "smooth" else {"norm1.gain", "norm2.gain"}
    )
    assert 0 < rounding_error(graph) < 0.9 * before


@given(variants, graphs)
def test_a_transform_computes_the_same_function(variant, graph):
    before = graph.run()
    run(get(variant[0]), graph, **variant[1])
    assert relative_error(before, graph.run()) < TOLERANCE


@pytest.mark.slow
@given(variants, graphs_of(any_transformers))
def test_a_transform_computes_the_same_function_on_any_transformer(variant, graph):
    before = graph.run()
    run(get(variant[0]), graph, **variant[1])
    assert relative_error(before, graph.run()) < TOLERANCE


@pytest.mark.slow
@given(graphs)
def test_all_transforms_after_one_another_compute_the_same_function(graph):
    """Scales of one seed would multiply, e^24 from least to largest, and a rotation of such channels keeps no 10 digits."""
    before, names = graph.run(), names_of(graph)
    for seed, transform in enumerate(TRANSFORMS):
        run(transform, graph, seed=seed, spread=1.0)
    assert relative_error(before, graph.run()) < TOLERANCE
    assert names_of(graph) == names


def names_of(graph: Graph) -> list[str]:
    return [site_name(n) for linears in linear_inputs(graph.gm).values() for n in linears]


@given(variants, graphs)
def test_a_transform_leaves_every_linear_its_name(variant, graph):
    names = names_of(graph)
    run(get("smooth"), graph)  # its statistics put other weights behind each of them
    run(get(variant[0]), graph, **variant[1])
    assert names_of(graph) == names


@given(st.sampled_from(["migrate_gain", "balance"]), graphs)
def test_a_second_run_finds_nothing_to_do(name, graph):
    first = get(name).run(graph.gm, Fuel())
    assert any(note.outcome != "refused" for note in first)  # a norm that a linear reads is in all of them
    code = graph.gm.code
    assert {note.outcome for note in get(name).run(graph.gm, Fuel())} <= {"refused"}
    assert graph.gm.code == code


@given(transforms, graphs, st.integers(0, 3))
def test_fuel_of_n_applies_exactly_n(transform, graph, n):
    before, fuel = graph.run(), Fuel(limit=n)
    all_of_them = applied(run(transform, Graph(copy_of(graph.gm), graph.inputs)))
    notes = run(transform, graph, fuel)
    assert len(applied(notes)) == len(fuel.log) == min(n, len(all_of_them))
    assert relative_error(before, graph.run()) < TOLERANCE


@given(transformers, st.integers(0, 99), st.sampled_from([0.3, 0.5, 1.0]))
def test_smoothing_again_with_measured_statistics_changes_nothing(transformer, seed, alpha):
    """(X W)^(a (1 - a)) cancels: the second scale is one for every alpha."""
    graph = transformer.graph(seed=seed, gain="negative")
    smooth = get("smooth")
    run(smooth, graph, alpha=alpha)
    once = absmax_of_linear_inputs(graph)
    run(smooth, graph, alpha=alpha)
    for site, twice in absmax_of_linear_inputs(graph).items():
        torch.testing.assert_close(twice, once[site], rtol=1e-8, atol=0)


@given(transformers, st.integers(0, 99))
def test_full_smoothing_makes_every_channel_reach_one(transformer, seed):
    graph = transformer.graph(seed=seed)
    before = absmax_of_linear_inputs(graph)
    notes = run(get("smooth"), graph, alpha=1.0)
    after = absmax_of_linear_inputs(graph)
    for note in notes:
        was, reached = before[note.where], after[note.where]
        if note.where.endswith(("attention.o.weight", "cross.o.weight")):  # query heads of one group share their channels
            was, reached = (x.view(transformer.shape.heads, -1, 4).amax(1).flatten() for x in (was, reached))
        assert reached[was > FLOOR].tolist() == pytest.approx([1.0] * int((was > FLOOR).sum()))


@pytest.mark.parametrize("build", ARCHITECTURES)
def test_every_norm_with_a_gain_gets_one_note(build):
    graph = Transformer(build).graph()
    gains = [n for n in graph.gm.graph.nodes if "norm" in str(n.target)]
    assert len(run(get("migrate_gain"), graph)) == len(gains)


def test_an_unknown_transform_is_refused_with_the_nearest_name():
    with pytest.raises(RecipeError, match="did you mean 'migrate_gain'"):
        get("migrate_gains")


def test_a_statistic_of_the_wrong_length_is_refused():
    with pytest.raises(RecipeError, match=r"'head.weight' has shape \(3,\); its linear reads 8 channels"):
        get("smooth").run(Transformer(pre_norm).graph().gm, Fuel(), statistics={"head.weight": torch.ones(3)})


def test_smoothing_without_statistics_is_refused_before_anything_changes():
    with pytest.raises(RecipeError, match="needs statistics"):
        equalize(None, ("migrate_gain", "smooth"), Fuel())  # no graph was touched: there is none


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("smoth(alpha=1.0)", "did you mean 'smooth'"),
        ("smooth(alfa=1.0)", "did you mean 'alpha'"),
        ("smooth(alpha='x')", "something like its default, 0.5"),
        ("smooth(alpha=True)", "to True"),
        ("smooth(statistics=1.0)", "sets 'statistics'"),
        ("migrate_gain(bias=[])", r"to \[\]"),
        ("awq(steps=0)", "something like its default, 20"),
        ("awq(steps=1.5)", "to 1.5"),
        ("cross_layer(alpha=1.0)", "it has no arguments"),
        ("smooth(0.5)", "cannot be read; a name is needed"),
        ("smooth(**{'alpha': 1.0})", "cannot be read"),
        ("smooth(alpha=1.0)(2)", "cannot be read"),
        ("smooth(alpha=print())", "cannot be read"),
        ("smooth(alpha={[]: 1})", "cannot be read"),
        ("smooth(alpha=1e400)", "something like its default, 0.5"),
        ("", "cannot be read"),
    ],
)
def test_an_entry_of_a_recipe_that_cannot_be_is_refused(written, said):
    with pytest.raises(RecipeError, match=said):
        read([written])


def test_what_data_is_measured_for_is_listed_once():
    assert [t.name for t in read(("cross_layer", "smooth", "cross_layer"))] == ["cross_layer", "smooth", "cross_layer"]
    with pytest.raises(RecipeError, match="'smooth' is listed 2 times"):
        read(("smooth", "cross_layer", "smooth(alpha=1.0)"))


@given(transformers, st.integers(0, 99), st.floats(0, 1), st.floats(0, 4))
def test_an_argument_in_a_recipe_is_that_of_the_transform(transformer, seed, alpha, reach):
    """The transforms of a recipe and those called by hand leave the same numbers in the weights."""
    named, called = (transformer.graph(seed=seed) for _ in range(2))
    equalize(named.gm, (f"balance({alpha=}, {reach=})",), Fuel())
    get("balance").run(called.gm, Fuel(), alpha=alpha, reach=reach)
    before, after = (absmax_of_linear_inputs(graph) for graph in (called, named))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[site], after[site]) for site in before)


def test_an_alpha_beyond_one_is_refused():
    graph = Transformer(pre_norm).graph()
    with pytest.raises(RecipeError, match=r"alpha is 1\.5; 0 "):
        equalize(graph.gm, ("balance(alpha=1.5)",), Fuel())
