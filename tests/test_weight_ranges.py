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
from fxquant.numerics.of_outputs import clipped, range_of_weight
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


@given(seeds, forms, granularities, st.sampled_from([0.0, 3.0, -3.0]))
def test_what_is_clipped_is_rounded_within_the_range_found_and_no_worse_than_between_extremes(seed, form, granularity, shift):
    w, inputs = weight_and_inputs(seed, shift=shift)
    lo, hi = range_of_weight(w, inputs, form, granularity)
    assert lo.shape == granularity.reduce(torch.amin, granularity.split(w)).shape and bool((lo <= hi).all())
    rounded = form.fake_quantize(clipped(w, lo, hi, granularity), granularity)
    within = form.from_range(lo, hi)  # what kernels fit to the clipped weight is this
    assert torch.equal(rounded, form.decode(form.encode(w, within, granularity), within, granularity, w.dtype))
    if not isinstance(granularity, PerGroup):  # of groups the first are chosen without the others
        assert error(w, rounded, inputs) <= error(w, form.fake_quantize(w, granularity), inputs) * (1 + 1e-5)


@pytest.mark.parametrize("form", [IntAffine(4), IntAffine(2, symmetric=False)], ids=str)
def test_groups_make_up_for_each_other(form):
    """Less error than if each group had its own least; as means over some weights, for a single one may be unlucky."""
    together, alone = [], []
    for seed in range(20):
        w, inputs = weight_and_inputs(seed)
        own = [range_of_weight(w[:, g : g + 8], inputs[:, g : g + 8], form, PerToken()) for g in (0, 8, 16)]
        stacked = torch.stack([lo for lo, _ in own], 1), torch.stack([hi for _, hi in own], 1)
        for found, (lo, hi) in ((together, range_of_weight(w, inputs, form, PerGroup(8))), (alone, stacked)):
            rounded = form.fake_quantize(clipped(w, lo, hi, PerGroup(8)), PerGroup(8))
            found.append(error(w, rounded, inputs) / error(w, form.fake_quantize(w, PerGroup(8)), inputs))
    assert sum(together) < 0.95 * sum(alone) < 0.5 * 20


@given(seeds, forms, granularities, st.integers(1, 200))
def test_a_range_does_not_depend_on_how_much_is_looked_at_at_once(seed, form, granularity, at_once):
    w, inputs = weight_and_inputs(seed)
    whole = range_of_weight(w, inputs, form, granularity)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of_outputs, "AT_ONCE", at_once)
        torch.testing.assert_close(range_of_weight(w, inputs, form, granularity), whole)


@given(seeds, forms, granularities)
def test_inputs_of_nothing_leave_the_extremes(seed, form, granularity):
    w, inputs = weight_and_inputs(seed)
    lo, hi = range_of_weight(w, 0 * inputs, form, granularity)
    assert torch.equal(clipped(w, lo, hi, granularity), w)


@pytest.mark.parametrize("granularity", [PerGroup(8), PerChannel(0), PerTensor()], ids=str)
def test_an_outlier_that_nothing_multiplies_is_cut_and_one_that_much_multiplies_is_not(granularity: Granularity) -> None:
    w, _ = weight_and_inputs(3)
    w[2, 5] = 12.0
    inputs = torch.randn(64, 24, generator=torch.Generator().manual_seed(0))
    ignored, heard = (inputs.index_fill(1, torch.tensor(5), value) for value in (0.0, 1e2))
    highs = [range_of_weight(w, x, IntAffine(4, symmetric=False), granularity)[1].max() for x in (ignored, heard)]
    assert highs[0] < 8 < highs[1]


def test_an_infinity_is_not_clipped_away() -> None:
    w = torch.tensor([[1.0, float("inf"), -2.0, float("nan")]])
    kept = clipped(w, torch.tensor([[-1.0]]), torch.tensor([[0.5]]), PerChannel(0))
    assert kept[0, :3].tolist() == [0.5, float("inf"), -1.0] and bool(kept[0, 3].isnan())


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
RECIPE = Recipe(weights=GROUPS)


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
        lo, hi = range_of_weight(w, seen.detach(), GROUPS.format, GROUPS.granularity)
        found = plan.range(f"{name}.weight:weight")
        assert found is not None
        torch.testing.assert_close(found, (lo, hi))
        weights[name] = replace(GROUPS, range=fxquant.Dynamic()).fake_quantize(clipped(w, *found, GROUPS.granularity))
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
        wanted = range_of_weight(model.get_submodule(name).weight.detach(), x, GROUPS.format, GROUPS.granularity)
        found = plan.range(f"{name}.weight:weight")
        assert found is not None and "left alone" not in plan.notes
        torch.testing.assert_close(found, wanted)


def test_a_weight_that_is_no_number_stops_calibration_by_name() -> None:
    model = mlp()
    with torch.no_grad():
        model.down.weight[0, 0] = float("nan")
    with pytest.raises(fxquant.FxquantError, match=r"'down\.weight' holds NaN or infinity"):
        calibrate(model, inputs(), RECIPE)


def test_a_plan_keeps_them_in_its_file_and_says_so(tmp_path: Path) -> None:
    plan = calibrate(mlp(), inputs(), RECIPE)
    assert plan.tensors["low/up.weight:weight"].shape == (64, 2, 1)
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
    sentence = r"PlanError: the plan has a range for the weight of 'up.weight' of shape \[64, 2, 1\], \[64, 4, 1\] is needed"
    with pytest.raises(BackendCompilerFailed, match=sentence):
        compiled(model, replace(plan, recipe=other))(inputs()[0])


def test_new_weights_are_clipped_as_the_old_ones_were_and_an_infinity_is_found() -> None:
    model, data = mlp(), inputs()
    plan = calibrate(model, data, RECIPE)
    fast = compiled(model, plan)
    with torch.no_grad():
        fast(data[0])
        model.down.weight.mul_(0.5)
        halved = clipped(model.down.weight, *plan.range("down.weight:weight"), GROUPS.granularity)  # type: ignore[misc]  # there is one
        up = clipped(model.up.weight, *plan.range("up.weight:weight"), GROUPS.granularity)  # type: ignore[misc]  # as above
        plain = replace(GROUPS, range=fxquant.Dynamic()).fake_quantize
        expected = torch.relu(nn.functional.linear(data[0], plain(up), model.up.bias)) @ plain(halved).T
        torch.testing.assert_close(fast(data[0]), expected, rtol=1e-4, atol=1e-4)
        model.down.weight[0, 0] = float("inf")
        with pytest.raises(fxquant.FxquantError, match=r"'.*down.weight' holds NaN or infinity"):
            fast(data[0])


class Twice(nn.Module):
    """One layer that runs twice, on inputs of other channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(torch.relu(self.layer(x)) * torch.arange(16))
        return y


def test_a_layer_that_runs_twice_has_two_ranges() -> None:
    torch.manual_seed(0)
    model, data = Twice().eval(), [torch.randn(64, 16)]
    plan = calibrate(model, data, Recipe(weights=replace(GROUPS, granularity=PerChannel(0))))
    first, second = (plan.range(f"layer.weight:weight{n}") for n in ("", "#2"))
    assert first is not None and second is not None and not torch.equal(first[1], second[1])
    plain = replace(GROUPS, granularity=PerChannel(0), range=fxquant.Dynamic()).fake_quantize
    with torch.no_grad():
        weights = [plain(clipped(model.layer.weight, *ends, PerChannel(0))) for ends in (first, second)]
        hidden = torch.relu(nn.functional.linear(data[0], weights[0], model.layer.bias)) * torch.arange(16)
        expected = nn.functional.linear(hidden, weights[1], model.layer.bias)
        torch.testing.assert_close(compiled(model, plan)(data[0]), expected, rtol=1e-4, atol=1e-4)


def test_ignoring_one_of_them_leaves_the_other_its_range() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            x = x + 0 * self.first.weight.sum()  # read here first, so the weight goes by this name
            y: Tensor = self.first(torch.relu(self.second(x)) * torch.arange(16))
            return y

    torch.manual_seed(0)
    model, x = Tied().eval(), torch.randn(64, 16)
    plan = calibrate(model, [x], Recipe(weights=replace(GROUPS, granularity=PerChannel(0))))
    (key,) = (key.removeprefix("low/") for key in plan.tensors if key.startswith("low/") and key.endswith("#2"))
    ends = plan.range(key)
    assert ends is not None
    plain = replace(GROUPS, granularity=PerChannel(0), range=fxquant.Dynamic()).fake_quantize
    with torch.no_grad():
        hidden = torch.relu(model.first(x)) * torch.arange(16)
        expected = hidden @ plain(clipped(model.first.weight, *ends, PerChannel(0))).T
        fast = compiled(model, plan, ignore=["second"])
        torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-4)


class Experts(nn.Module):
    """A stack of matrices [E, K, N], of which each multiplies its own rows; and a linear that never runs."""

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
    found = plan.range("stack:weight")
    assert found is not None and found[0].shape == (3, 8, 2, 1)
    assert any("stack:weight" in note for note in plan.notes["left alone"])
    with torch.no_grad():
        stack = model.stack.transpose(1, 2)
        plain = replace(GROUPS, granularity=PerGroup(8), range=fxquant.Dynamic())
        rounded = plain.fake_quantize(clipped(stack, *found, PerGroup(8))).transpose(1, 2)
        ends = plan.range("out.weight:weight")
        assert ends is not None
        out = plain.fake_quantize(clipped(model.out.weight, *ends, PerGroup(8)))
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
    assert sum(better) / len(better) > 0.1 and min(better) > -0.1


def test_the_search_for_activations_sees_weights_as_they_will_be_rounded() -> None:
    """GPT-2, whose weights are stored the other way round and whose head is the table, in bfloat16."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 97, "initializer_range": 0.3}
    model = GPT2LMHeadModel(GPT2Config(**sizes)).eval().bfloat16()
    data = [{"input_ids": torch.randint(0, 97, (2, 12)), "use_cache": False} for _ in range(3)]
    activations = Spec(IntAffine(8, symmetric=False), PerTensor(), TokenWise())
    plan = calibrate(model, data, Recipe(weights=GROUPS, activations=activations))
    assert plan.range("transformer.wte.weight:weight") is not None
    fast = compiled(model, plan)
    with torch.no_grad():
        off = [fast(**batch).logits.float() - model(**batch).logits.float() for batch in data]
    assert not [s for s in fxquant.explain(model).sites if s.counted and s.reason]
    searched = plan.notes["losses by ratio"][f"{plan.notes['token ratio']:.4g}"]
    assert float(torch.cat(off).square().mean()) == pytest.approx(searched, rel=0.1)
