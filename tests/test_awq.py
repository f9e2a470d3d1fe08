"""AWQ: any scale changes nothing, and the chosen one is never worse than rounding to nearest on the calibration tokens."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from exactness import captured, copy_of
from graphs import distance, in_double
from hypothesis import given
from hypothesis import strategies as st
from measuring import CHANNELS, GROUPS, TOKENS, chosen, measured_of, random_maps, values_of
from models import ZOO
from random_graphs import SHAPES, TOLERANCE, Graph, Shape, Transformer, graph_of, post_norm, pre_norm, relative_error

from fxquant.errors import CalibrationError, RecipeError
from fxquant.graph.fuel import Fuel
from fxquant.numerics.affine import IntAffine
from fxquant.numerics.granularity import PerGroup
from fxquant.numerics.ranges import MinMSE
from fxquant.patterns.awq import all_tokens, awq, choose, importance_scale
from fxquant.patterns.canonical import canonicalize
from fxquant.patterns.measured import Measured
from fxquant.patterns.output_error import OutputError
from fxquant.patterns.transforms import get
from fxquant.recipe import Spec

AWQ = get("awq")
seeds = st.integers(0, 2**16)
SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in ("bert", "gpt2", "vit", "t5", "opt")]


def measured(seed: int, width: int = 32, weight: Spec | None = GROUPS, **changes: object) -> Measured:
    """Channels of sizes from 0.1 to 10 and more, as norms with outliers give them."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(128, width, generator=g) * torch.randn(width, generator=g).exp()
    weights = torch.randn(24, width, generator=g), torch.randn(8, width, generator=g)
    return replace(measured_of(rows, *weights, activation=None, weight=weight), **changes)


def error_of(measured: Measured) -> OutputError:
    return OutputError.of(measured, rows=len(measured.rows), outputs=4096)


# ---- the same function


@pytest.mark.parametrize("transformer", [Transformer(pre_norm, SHAPES[2]), Transformer(post_norm, SHAPES[3])])
def test_one_scale_after_another_is_their_product(transformer):
    twice, once = transformer.graph(), transformer.graph()
    before = once.run()
    a, b = (random_maps(AWQ, once, seed)["scale"] for seed in (1, 2))
    awq(twice.gm, Fuel(), scale=a)
    awq(twice.gm, Fuel(), scale=b)
    awq(once.gm, Fuel(), scale={where: s * b[where] for where, s in a.items()})
    weights = [
        [v.abs().sum() for n, v in values_of(g.gm, g.inputs, lambda n: n.target is torch.ops.aten.linear.default).items()]
        for g in (twice, once)
    ]
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-8, atol=1e-8)
    assert relative_error(before, twice.run()) < TOLERANCE and relative_error(before, once.run()) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", *SLOW])
def test_what_is_chosen_on_real_values_computes_the_same_function(name):
    (architecture,) = (a for a in ZOO if a.name == name)
    for gm, values in captured(architecture):
        graph = Graph(canonicalize(copy_of(gm), Fuel()), values)
        notes = awq(graph.gm, Fuel(), **chosen(AWQ, graph, activation=None, weight=Spec(IntAffine(4), PerGroup(16))))
        assert len([note for note in notes if note.outcome != "refused"]) >= 4
        assert distance(in_double(gm, values), in_double(graph.gm, values)) < 1e-10


def test_norms_values_and_the_branch_without_the_activation_take_the_scale_and_nothing_is_left_over():
    graph = Transformer(pre_norm, Shape(rms=True, gated=True, activation="silu", bias=False)).graph()
    notes = awq(graph.gm, Fuel(), **random_maps(AWQ, graph))
    assert {note.where: note.outcome for note in notes} == {
        "attention.q.weight": "absorbed",
        "attention.o.weight": "absorbed",
        "mlp.up.weight": "absorbed",
        "mlp.down.weight": "absorbed",
        "head.weight": "absorbed",
    }


def test_queries_that_share_their_values_keep_a_scale_of_their_own_as_one_op_unless_it_is_one():
    shape = Shape(groups=2, rms=True)
    for own, outcome in ((torch.arange(1.0, 17.0), "explicit"), (torch.arange(1.0, 5.0).repeat(4), "absorbed")):
        graph = Transformer(pre_norm, shape).graph()
        before = graph.run()
        (note,) = awq(graph.gm, Fuel(), scale={"attention.o.weight": own})
        assert note.outcome == outcome
        assert relative_error(before, graph.run()) < TOLERANCE


def test_without_fuel_or_sites_nothing_changes():
    graph = Transformer(pre_norm).graph()
    code = graph.gm.code
    assert awq(graph.gm, Fuel(limit=0), **random_maps(AWQ, graph)) == [] == awq(graph.gm, Fuel(), scale={})
    assert graph.gm.code == code


@pytest.mark.parametrize("s", [torch.zeros(8), -torch.ones(8), torch.ones(5)])
def test_what_is_no_scale_is_refused(s):
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    with pytest.raises(RecipeError, match=r"the scale of 'up.weight'"):
        awq(graph_of(lambda p, x: F.linear(x, p("up.weight", 5, 8)), x).gm, Fuel(), scale={"up.weight": s})


# ---- the choice


def test_the_farthest_token_counts_though_the_sample_misses_it():
    """Without it the channel that it alone carries looks like any other; with it that channel is enlarged above all."""
    m = measured(0)
    massive = torch.zeros(1, 32)
    massive[0, 3] = 1e4
    far = replace(m, far=massive, tokens=128 * len(m.rows), mean=m.mean + massive[0] / (128 * len(m.rows)))
    seen = all_tokens(far, len(m.rows))
    others = (far.tokens - 1) / len(m.rows)
    torch.testing.assert_close(seen.rows.square().sum(0), others * m.rows.square().sum(0) + massive[0].square())
    choice, error = choose(far), error_of(seen)
    assert isinstance(choice, dict) and int(choice["scale"].argmax()) == 3
    assert error(choice["scale"]) < error(torch.ones(32))
    assert all_tokens(replace(far, activation=TOKENS), 8).rows.shape == (8, 32)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("weight", [GROUPS, CHANNELS, Spec(IntAffine(4), PerGroup(8), MinMSE())])
def test_the_choice_is_the_best_of_the_grid_and_better_than_rounding_to_nearest(seed, weight):
    m = measured(seed, weight=weight)
    error, choice = error_of(m), choose(m)
    plain = error(torch.ones(32))
    sizes = m.mean, m.rows.square().mean(0).sqrt()
    errors = [error(importance_scale(size, step / 20)) for step in range(20) for size in sizes]
    if isinstance(choice, str):
        assert "does better than none" in choice
        assert min(errors) >= 0.98 * plain or weight.range != CHANNELS.range  # a search on a sample of outputs sees less
    else:
        assert error(choice["scale"]) < plain
        assert (choice["scale"] > 0).all()
        assert error(choice["scale"]) == pytest.approx(min(errors), rel=1e-5) or weight.range != CHANNELS.range


def test_no_power_is_no_scale():
    assert torch.equal(importance_scale(torch.tensor([3.0, 0.0, 0.01]), 0.0), torch.ones(3))


@given(seeds, st.floats(0, 1))
def test_a_scale_lies_around_one(seed, power):
    s = importance_scale(measured(seed).mean, power)
    assert float(s.max() * s.min()) == pytest.approx(1, rel=1e-5)


def test_a_dead_channel_keeps_its_size():
    m = measured(0)
    rows = m.rows.clone()
    rows[:, 7] = 0
    choice = choose(measured_of(rows, *m.weights, activation=None, weight=GROUPS))
    assert isinstance(choice, dict) and choice["scale"][7] == 1


def test_an_input_of_zeros_is_left_alone():
    zeros = measured_of(torch.zeros(3, 8), torch.ones(2, 8), activation=None, weight=GROUPS)
    assert "does better than none" in choose(zeros)


@pytest.mark.parametrize("seed", range(5))
def test_on_tokens_that_were_not_seen_the_error_of_outlier_channels_is_cut_to_a_quarter(seed):
    """Four of 128 channels forty times as large, groups of 32: measured 0.13 to 0.18 of the error of rounding to nearest."""
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(512, 128, generator=g), torch.randn(64, 128, generator=g)
    x[:, ::32] *= 40
    m = measured_of(x[::2], w, activation=None, weight=Spec(IntAffine(4, symmetric=False), PerGroup(32)))
    choice = choose(m)
    assert isinstance(choice, dict)
    unseen = replace(error_of(m), x=x[1::2])
    before, after = unseen(torch.ones(128)), unseen(choice["scale"])
    assert after < 0.25 * before


def test_rounded_activations_count_where_the_recipe_has_them():
    m = measured(1, activation=TOKENS)
    choice = choose(m)
    assert isinstance(choice, dict) and error_of(m)(choice["scale"]) < error_of(m)(torch.ones(32))


# ---- what is left alone, and what is refused


def test_where_weights_stay_in_floating_point_nothing_is_chosen():
    assert "does not quantize the weight of 'up.weight'" in choose(measured(0, weight=None))


def test_a_width_that_the_group_does_not_divide_is_left_alone():
    reason = choose(measured(0, width=30, weight=Spec(IntAffine(4), PerGroup(128))))
    assert "'up.weight' will not be quantized" in reason and "group size is 128" in reason


def test_numbers_that_are_none_are_refused_with_the_name_of_the_site():
    with pytest.raises(CalibrationError, match=r"'up.weight': the mean of its input holds NaN"):
        choose(measured(0, mean=torch.full((32,), torch.nan)))
