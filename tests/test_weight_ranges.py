"""Ranges of weights by the outputs of their product: better than the extremes, just what is rounded, kept in the plan."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import fxquant
from fxquant import (
    IntAffine,
    OutputMSE,
    Override,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Plan,
    Recipe,
    RecipeError,
    Spec,
    TokenWise,
    calibrate,
)
from fxquant.numerics import of_outputs
from fxquant.numerics.granularity import Granularity
from fxquant.numerics.of_outputs import clipped, clips_of
from fxquant.patterns.measured import standing_for_all

EAGER: dict[str, Any] = {"inductor": False}
forms = st.sampled_from([IntAffine(4), IntAffine(4, symmetric=False), IntAffine(3), IntAffine(2, symmetric=False)])
granularities = st.sampled_from([PerGroup(8), PerChannel(0), PerToken(), PerTensor()])
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> None:
    torch._dynamo.reset()


def weight_and_inputs(seed: int, rows: int = 6, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 24, generator=g) + shift, torch.randn(40, 24, generator=g) * torch.rand(24, generator=g).pow(4)


def error(w: Tensor, seen: Tensor, inputs: Tensor) -> float:
    return float(((seen - w) @ inputs.T).double().square().sum())


def within(w: Tensor, clips: tuple[Tensor, Tensor], spec: Spec) -> Tensor:
    assert isinstance(spec.format, IntAffine)
    return clipped(w, *clips, spec.granularity, spec.format.symmetric)


@given(seeds, forms, granularities, st.sampled_from([0.0, 3.0, -3.0]))
def test_what_is_clipped_is_rounded_within_the_range_found_and_no_worse_than_between_extremes(seed, form, granularity, shift):
    w, inputs = weight_and_inputs(seed, shift=shift)
    low, high = clips_of(w, inputs, form, granularity)
    blocks = granularity.split(w)
    lo, hi = (granularity.reduce(op, blocks) for op in (torch.amin, torch.amax))
    assert low.shape == high.shape == lo.shape and 0.39 < float(torch.stack([low, high]).min()) <= float(high.max()) <= 1
    rounded = form.fake_quantize(clipped(w, low, high, granularity, form.symmetric), granularity)
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    extent = torch.maximum(-lo, hi)
    ends = (-extent * low, extent * high) if form.symmetric else (lo * low, hi * high)
    range = form.from_range(*ends)  # what kernels fit to the clipped weight is this
    assert torch.equal(rounded, form.decode(form.encode(w, range, granularity), range, granularity, w.dtype))
    if not isinstance(granularity, PerGroup):  # of groups the first are chosen without the others
        assert error(w, rounded, inputs) <= error(w, form.fake_quantize(w, granularity), inputs) * (1 + 1e-5)


@pytest.mark.parametrize("form", [IntAffine(4), IntAffine(2, symmetric=False)], ids=str)
def test_groups_make_up_for_each_other(form):
    """Less error than if each group had its own least; as means over some weights, for a single one may be unlucky."""
    together, alone = [], []
    for seed in range(20):
        w, inputs = weight_and_inputs(seed)
        own = [clips_of(w[:, g : g + 8], inputs[:, g : g + 8], form, PerToken()) for g in (0, 8, 16)]
        stacked = torch.stack([low for low, _ in own], 1), torch.stack([high for _, high in own], 1)
        for found, clips in ((together, clips_of(w, inputs, form, PerGroup(8))), (alone, stacked)):
            rounded = form.fake_quantize(clipped(w, *clips, PerGroup(8), form.symmetric), PerGroup(8))
            found.append(error(w, rounded, inputs) / error(w, form.fake_quantize(w, PerGroup(8)), inputs))
    assert sum(together) < 0.95 * sum(alone) < 0.5 * 20


@given(seeds, forms, granularities, st.integers(1, 200))
def test_a_range_does_not_depend_on_how_much_is_looked_at_at_once(seed, form, granularity, at_once):
    w, inputs = weight_and_inputs(seed)
    whole = clips_of(w, inputs, form, granularity)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of_outputs, "AT_ONCE", at_once)
        torch.testing.assert_close(clips_of(w, inputs, form, granularity), whole)


@given(seeds, forms, granularities, st.integers(-4, 4))
def test_shares_do_not_know_the_scale_of_a_weight(seed, form, granularity, power):
    w, inputs = weight_and_inputs(seed)
    found = clips_of(w * 2.0**power, inputs, form, granularity)
    assert all(map(torch.equal, found, clips_of(w, inputs, form, granularity)))


@given(seeds, forms, granularities)
def test_inputs_of_nothing_leave_the_extremes(seed, form, granularity):
    w, inputs = weight_and_inputs(seed)
    low, high = clips_of(w, 0 * inputs, form, granularity)
    assert torch.equal(clipped(w, low, high, granularity, form.symmetric), w)


@pytest.mark.parametrize("granularity", [PerGroup(8), PerChannel(0), PerTensor()], ids=str)
def test_an_outlier_that_nothing_multiplies_is_cut_and_one_that_much_multiplies_is_not(granularity: Granularity) -> None:
    w, _ = weight_and_inputs(3)
    w[2, 5] = 12.0
    inputs = torch.randn(64, 24, generator=torch.Generator().manual_seed(0))
    ignored, heard = (inputs.index_fill(1, torch.tensor(5), value) for value in (0.0, 1e2))
    form = IntAffine(4, symmetric=False)
    highs = [clipped(w, *clips_of(w, x, form, granularity), granularity, False).max() for x in (ignored, heard)]
    assert highs[0] < 8 < highs[1]


def test_an_infinity_is_not_clipped_away() -> None:
    w, half = torch.tensor([[1.0, float("inf"), -2.0]]), torch.tensor([[0.5]])
    assert clipped(w, half, half, PerChannel(0), False).tolist() == [[1.0, float("inf"), -1.0]]


def test_a_sample_stands_for_all_tokens_and_what_reaches_far_for_itself() -> None:
    few, massive = torch.full((4, 3), 2.0), torch.full((2, 3), 9.0)
    for sample in (few, torch.cat([few, torch.full((1, 3), 10.0)])):  # of the far ones, one that chance drew, too
        rows = standing_for_all(sample, massive, tokens=100)
        assert float(rows.square().sum()) == pytest.approx(98 * 3 * 4 + 2 * 3 * 81)
    assert torch.equal(standing_for_all(massive, massive, tokens=2), massive)
    assert torch.equal(standing_for_all(few, few[:1], tokens=100), few)  # none is farther than others


# ---- in a recipe


def test_it_is_for_weights_and_goes_through_json() -> None:
    recipe = Recipe.preset("AWQ-W4A16")
    assert recipe.weights is not None and recipe.weights.range == OutputMSE()
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    spec = Spec(IntAffine(8), PerToken(), OutputMSE())
    with pytest.raises(RecipeError, match=r"has OutputMSE\(\) for its activations"):
        Recipe(activations=spec)
    with pytest.raises(RecipeError, match=r"'head' has OutputMSE\(\) for its embeddings"):
        Override("head", "embeddings", spec)
    with pytest.raises(RecipeError, match=r"PerChannel\(axis=1\); ranges of rows"):
        Recipe(weights=Spec(IntAffine(8), PerChannel(1), OutputMSE()))
    with pytest.raises(RecipeError, match=r"fxquant\.calibrate"):
        spec.fake_quantize(torch.ones(2, 4))


# ---- in a model


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(x)))
        return y


GROUPS = Spec(IntAffine(4, symmetric=False), PerGroup(16), OutputMSE())
PLAIN = replace(GROUPS, range=fxquant.Dynamic())
RECIPE = Recipe(weights=GROUPS)


def clips_in(plan: Plan, path: str) -> tuple[Tensor, Tensor]:
    maps = plan.maps("clip")
    return maps["low"][path], maps["high"][path]


def mlp() -> Mlp:
    torch.manual_seed(0)
    return Mlp().eval()


def inputs(seed: int = 1) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randn(32, generator=g).exp()
    return [torch.randn(5, 32, generator=g) * sizes for _ in range(3)]


def compiled(model: nn.Module, plan: Plan, **options: Any) -> Any:
    return torch.compile(model, backend="outlierq", options={"plan": plan, **EAGER, **options})


def test_the_compiled_model_rounds_by_what_came_by() -> None:
    model, data = mlp(), inputs()
    plan = calibrate(model, data, RECIPE)
    x = torch.cat(data)
    hidden = torch.relu(model.up(x))
    weights = {}
    for name, seen in (("up", x), ("down", hidden)):
        w = model.get_submodule(name).weight.detach()
        found = clips_in(plan, f"{name}.weight")
        torch.testing.assert_close(found, clips_of(w, seen.detach(), GROUPS.format, GROUPS.granularity))
        weights[name] = PLAIN.fake_quantize(within(w, found, GROUPS))
    expected = torch.relu(nn.functional.linear(x, weights["up"], model.up.bias)) @ weights["down"].T
    fast = compiled(model, plan)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-4)
    report = fxquant.explain(model)
    assert [site.reason for site in report.sites] == ["", ""]
    rounded = [nn.functional.mse_loss(weights[n], model.get_submodule(n).weight.detach()) for n in ("up", "down")]
    signal = [model.get_submodule(n).weight.detach().square().mean() for n in ("up", "down")]
    noise = [10 * float((s / e).log10()) for s, e in zip(signal, rounded, strict=True)]
    assert [site.sqnr for site in report.sites] == pytest.approx(noise, abs=0.01)


def test_linears_that_read_one_value_have_ranges_by_it_and_all_stand_for_more_tokens_than_are_kept() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(32, 16), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = torch.sigmoid(self.gate(x)) * self.up(x)
            return y

    torch.manual_seed(0)
    model = Pair().eval()
    x = torch.ones(4096, 32) * torch.linspace(0.1, 1, 32)  # all alike, and a few that reach far in other channels
    x[:32] = torch.randn(32, 32) * 3
    plan = calibrate(model, [x], RECIPE)
    for name in ("gate", "up"):
        wanted = clips_of(model.get_submodule(name).weight.detach(), x, GROUPS.format, GROUPS.granularity)
        torch.testing.assert_close(clips_in(plan, f"{name}.weight"), wanted)
    assert "left alone" not in plan.notes


def test_a_weight_that_is_no_number_stops_calibration_by_name() -> None:
    model = mlp()
    with torch.no_grad():
        model.down.weight[0, 0] = float("nan")
    with pytest.raises(fxquant.FxquantError, match=r"'down\.weight' holds NaN or infinity"):
        calibrate(model, inputs(), RECIPE)


def test_a_plan_keeps_them_in_its_file_and_says_so(tmp_path: Path) -> None:
    plan = calibrate(mlp(), inputs(), RECIPE)
    assert plan.tensors["low/clip/up.weight"].shape == (64, 2, 1)
    plan.save(tmp_path / "plan.safetensors")
    assert Plan.load(tmp_path / "plan.safetensors") == plan


def test_without_a_plan_the_sites_stay_in_floating_point_and_say_why() -> None:
    model, x = mlp(), inputs()[0]
    fast = torch.compile(model, backend="outlierq", options={"recipe": RECIPE, **EAGER})
    with torch.no_grad(), pytest.warns(UserWarning, match="left 2 of 2 products in floating point.*calibrate"):
        assert torch.equal(fast(x), model(x))


def test_the_first_calls_find_them_too() -> None:
    model, data = mlp(), inputs()
    fast = torch.compile(model, backend="outlierq", options={"recipe": RECIPE, "calibration_steps": 3, **EAGER})
    with torch.no_grad():
        for x in data:
            assert torch.equal(fast(x), model(x))
        found = fast(data[0])
        torch._dynamo.reset()
        torch.testing.assert_close(found, compiled(model, calibrate(model, data, RECIPE))(data[0]))


def test_ranges_of_another_shape_are_refused_with_both_shapes() -> None:
    model, plan = mlp(), calibrate(mlp(), inputs(), RECIPE)
    other = replace(plan.recipe, weights=replace(GROUPS, granularity=PerGroup(8)))
    sentence = r"PlanError: the plan has ranges for the weight of 'up.weight' of shape \[64, 2, 1\], \[64, 4, 1\] is needed"
    with pytest.raises(BackendCompilerFailed, match=sentence):
        compiled(model, replace(plan, recipe=other))(inputs()[0])


def test_new_weights_are_clipped_to_the_same_shares_and_an_infinity_is_found() -> None:
    model, data = mlp(), inputs()
    plan = calibrate(model, data, RECIPE)
    fast = compiled(model, plan)
    with torch.no_grad():
        fast(data[0])
        model.down.weight.mul_(3)
        down = PLAIN.fake_quantize(within(model.down.weight, clips_in(plan, "down.weight"), GROUPS))
        up = PLAIN.fake_quantize(within(model.up.weight, clips_in(plan, "up.weight"), GROUPS))
        expected = torch.relu(nn.functional.linear(data[0], up, model.up.bias)) @ down.T
        torch.testing.assert_close(fast(data[0]), expected, rtol=1e-4, atol=1e-4)
        assert float((expected - model(data[0])).norm() / expected.norm()) < 0.15
        model.down.weight[0, 0] = float("inf")
        with pytest.raises(fxquant.FxquantError, match=r"'.*down.weight' holds NaN or infinity"):
            fast(data[0])


def test_an_input_that_is_no_number_stops_calibration_by_name() -> None:
    data = inputs()
    data[1][0, 3] = float("inf")
    with pytest.raises(fxquant.CalibrationError, match=r"'up\.weight': its input holds NaN or infinity"):
        calibrate(mlp(), data, RECIPE)


class Twice(nn.Module):
    """One layer that runs twice, on inputs of other channels; ``parted``: in two graphs."""

    parted = False

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.layer(x)) * torch.arange(16)
        if self.parted:
            torch._dynamo.graph_break()
        y = self.layer(y)
        return y


@pytest.mark.parametrize("parted", [False, True])
def test_a_layer_that_runs_twice_has_the_ranges_of_its_first_run(parted: bool) -> None:
    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(64, 16)
    rows = replace(GROUPS, granularity=PerChannel(0))
    plan = calibrate(model, [x], Recipe(weights=rows))
    found = clips_in(plan, "layer.weight")
    w = model.layer.weight.detach()
    assert "left alone" not in plan.notes
    rounded = replace(PLAIN, granularity=PerChannel(0)).fake_quantize(within(w, found, rows))
    model.parted = parted
    with torch.no_grad():
        hidden = torch.relu(nn.functional.linear(x, rounded, model.layer.bias)) * torch.arange(16)
        expected = nn.functional.linear(hidden, rounded, model.layer.bias)
        torch.testing.assert_close(compiled(model, plan)(x), expected, rtol=1e-4, atol=1e-4)


class Experts(nn.Module):
    """A stack of matrices [E, K, N], of which each multiplies its own rows; and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 16, 8))
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(torch.bmm(x, self.stack))
        return y


def test_a_stack_of_matrices_counts_its_values_alike_and_says_so() -> None:
    torch.manual_seed(0)
    model, x = Experts().eval(), torch.randn(3, 5, 16)
    plan = calibrate(model, [x], Recipe(weights=replace(GROUPS, granularity=PerGroup(8))))
    found = clips_in(plan, "stack")
    assert found[0].shape == (3, 8, 2, 1) and "clip: stack" in plan.notes["left alone"]
    with torch.no_grad():
        stack = model.stack.transpose(1, 2)
        eight = replace(PLAIN, granularity=PerGroup(8))
        rounded = eight.fake_quantize(within(stack, found, eight)).transpose(1, 2)
        out = eight.fake_quantize(within(model.out.weight, clips_in(plan, "out.weight"), eight))
        expected = nn.functional.linear(torch.bmm(x, rounded), out, model.out.bias)
        torch.testing.assert_close(compiled(model, plan)(x), expected, rtol=1e-4, atol=1e-4)


LLAMA: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}


@pytest.mark.parametrize("transforms", [("awq",), ("rotate", "awq"), ("shift_scale",)])
def test_they_are_of_the_weights_after_all_transforms(transforms: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, vocab_size=97, initializer_range=0.2, **LLAMA)).eval()
    data = [{"input_ids": torch.randint(0, 97, (2, 12))} for _ in range(3)]
    sqnr = []
    for weight_range in (fxquant.Dynamic(), OutputMSE()):
        spec = Spec(IntAffine(4, symmetric=False), PerGroup(32), weight_range)
        plan = calibrate(model, data, Recipe(weights=spec, transforms=transforms))
        torch._dynamo.reset()
        with torch.no_grad():
            compiled(model, plan)(**data[0])
        rows = [row for row in fxquant.explain(model, data, progress=False).measured if row.op == "linear"]
        assert len(rows) == 15 and not any(row.reason for row in rows)
        sqnr.append([row.sqnr_output for row in rows])
    better = [after - before for before, after in zip(*sqnr, strict=True)]
    assert sum(better) / len(better) > 1 and min(better) > 0.5


@pytest.mark.parametrize("transform", ["awq", "smooth", "rotate"])
def test_a_cache_that_takes_the_values_out_of_the_graph_leaves_their_weight_what_it_is(transform: str) -> None:
    """Calibrated without a cache, a scale on values goes into their weight; with one it cannot, and the weight is another."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=4, vocab_size=97, initializer_range=0.2, **LLAMA)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(torch.linspace(-2, 2, 64).exp()[:, None])
    ids = torch.randint(0, 97, (2, 12))
    spec = Spec(IntAffine(4, symmetric=False), PerGroup(32), OutputMSE())
    plan = calibrate(model, [{"input_ids": ids, "use_cache": False}], Recipe(weights=spec, transforms=(transform,)))
    with torch.no_grad():
        compiled(model, plan)(input_ids=ids, use_cache=True)
    values = [site.sqnr for site in fxquant.explain(model).sites if "v_proj" in site.name]
    assert len(values) == 2 and min(values) > 17  # decibel; at most 14 where the ranges are those of the other weight


def test_the_search_for_activations_sees_weights_as_they_will_be_rounded() -> None:
    """GPT-2, whose weights are stored the other way round and whose head is the table, in bfloat16."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 97, "initializer_range": 0.3}
    model = GPT2LMHeadModel(GPT2Config(**sizes)).eval().bfloat16()
    data = [{"input_ids": torch.randint(0, 97, (2, 12)), "use_cache": False} for _ in range(3)]
    activations = Spec(IntAffine(8, symmetric=False), PerTensor(), TokenWise())
    plan = calibrate(model, data, Recipe(weights=GROUPS, activations=activations))
    assert clips_in(plan, "transformer.wte.weight")[0].shape == (97, 2, 1)
    fast = compiled(model, plan)
    with torch.no_grad():
        off = [fast(**batch).logits.float() - model(**batch).logits.float() for batch in data]
    assert not [s for s in fxquant.explain(model).sites if s.counted and s.reason]
    searched = plan.notes["losses by ratio"][f"{plan.notes['token ratio']:.4g}"]
    assert float(torch.cat(off).square().mean()) == pytest.approx(searched, rel=0.1)
