"""The door: what a user may say, what comes back, and what is refused."""

import copy
import inspect
import re
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import fxquant
from fxquant.backend.settings import Settings

EAGER = {"inductor": False}  # the lowered graph op by op: these tests are about us, not about Inductor


class Block(nn.Module):
    """A pre-norm MLP with a residual: small, and with all that a transformer has of interest here."""

    def __init__(self, width: int = 32, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        nn.init.normal_(self.norm.weight, 1, 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def compiled(model: nn.Module, **options: object) -> nn.Module:
    torch._dynamo.reset()
    model.eval().compile(backend="outlierq", options={**EAGER, **options})
    return model


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def cause(info: pytest.ExceptionInfo[BaseException]) -> BaseException:
    """The error that we raised, below what Dynamo wrapped around it."""
    found: BaseException = info.value
    return getattr(found, "inner_exception", found)


x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_the_compiled_model_is_the_model_up_to_rounding() -> None:
    block = Block()
    expected = block(x)
    assert 0 < error(compiled(block)(x), expected) < 0.01


def test_a_model_that_was_not_run_is_not_explained() -> None:
    assert "nothing of this model has run compiled" in str(fxquant.explain(Block()))


@torch.no_grad()
@pytest.mark.parametrize("recipe", fxquant.Recipe.presets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_preset_runs_in_every_dtype(recipe: str, dtype: torch.dtype) -> None:
    block = Block(width=128).to(dtype).eval()
    data = torch.randn(2, 5, 128, dtype=dtype)
    expected = block(data)
    y = compiled(block, plan=fxquant.calibrate(block, [data], recipe))(data)
    assert y.dtype == dtype
    assert error(y.float(), expected.float()) < (0.12 if "W4" in recipe else 0.06 if "W6" in recipe else 0.02)
    assert fxquant.explain(block).coverage == 1


@torch.no_grad()
@pytest.mark.parametrize("rows", [0, 1, 2, 7])
def test_any_number_of_rows(rows: int) -> None:
    block = Block()
    data = torch.randn(rows, 32)
    expected = block(data)
    y = compiled(block)(data)
    assert y.shape == expected.shape
    assert not rows or error(y, expected) < 0.01


@torch.no_grad()
def test_a_second_shape_compiles_once_for_all_that_follow() -> None:
    block = compiled(Block())
    reference = Block()
    with torch._dynamo.config.patch(error_on_recompile=False):
        for rows in (3, 4):
            block(torch.randn(rows, 32))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 9):
            data = torch.randn(rows, 32)
            assert error(block(data), reference(data)) < 0.01


def test_ignored_sites_are_skipped_with_the_rule_that_named_them() -> None:
    block = compiled(Block(), ignore=["down"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what the user asked for is no surprise
        block(x)
    report = fxquant.explain(block)
    status = {site.name: (site.status, site.reason) for site in report.sites}
    assert status["down.weight"] == ("skipped", "ignored by 'down'")
    assert status["up.weight"] == ("quantized", "")
    assert report.coverage == 0.5


def test_what_was_not_done_is_one_warning_that_says_what() -> None:
    block = compiled(Block(width=131), recipe="W4A16")  # no group of 32 to 128 divides 131 or 262
    with pytest.warns(UserWarning, match=r"left 2 of 2 products in floating point: up.weight \(linear\): .*128"):
        block(torch.randn(2, 131))


def test_options_are_read_early_and_refused_by_name() -> None:
    with pytest.raises(fxquant.RecipeError, match="option 'recipi' is not known; did you mean 'recipe'"):
        Settings.read(None, {"recipi": "W8A8"})
    with pytest.raises(fxquant.RecipeError, match=r"no recipe 'W8A9'.*did you mean 'W8A8'"):
        Settings.read(None, {"recipe": "W8A9"})
    with pytest.raises(fxquant.RecipeError, match="option 'recipe' is 8; a preset name"):
        Settings.read(None, {"recipe": 8})
    with pytest.raises(fxquant.RecipeError, match="is a tensor"):
        Settings.read(None, {"ranges": [["up", torch.tensor(0.0), 1.0]]})
    with pytest.raises(fxquant.RecipeError, match="option 'fuel' is '3'; an int is needed"):
        Settings.read(None, {"fuel": "3"})


def test_an_unknown_option_reaches_the_user_through_dynamo() -> None:
    with pytest.raises(Exception, match="did you mean 'recipe'") as info:
        compiled(Block(), recipies="W8A8")(x)
    assert isinstance(cause(info), fxquant.RecipeError)


def test_an_unknown_mode_is_a_warning_and_default() -> None:
    with pytest.warns(UserWarning, match="mode 'fastest' is not known"):
        assert Settings.read("fastest", None).inductor == {}


def test_the_reserved_options_of_torch_compile_pass() -> None:
    block = Block()
    block.compile(backend="outlierq", options={**EAGER, "guard_filter_fn": lambda guards: [True for _ in guards]})
    block.eval()(x)


def test_a_gradient_is_an_error_that_says_what_to_do() -> None:
    y = compiled(Block())(x)
    with pytest.raises(fxquant.GradientError, match=r"torch.no_grad\(\).*prepare_qat_"):
        y.sum().backward()


def test_training_mode_is_refused_while_compiling() -> None:
    class Dropping(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(super().forward(x), 0.1, self.training)

    torch._dynamo.reset()
    model = Dropping().train()
    model.compile(backend="outlierq", options=EAGER)
    with pytest.raises(Exception, match=r"training mode.*model.eval\(\)") as info:
        model(x)
    assert isinstance(cause(info), fxquant.CaptureError)


def test_a_model_without_data_is_refused() -> None:
    with torch.device("meta"):
        block = Block()
    with pytest.raises(Exception, match="meta device") as info:
        compiled(block)(x.to("meta"))
    assert isinstance(cause(info), fxquant.CaptureError)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(bad: float) -> None:
    block = Block()
    with torch.no_grad():
        block.up.weight[3, 4] = bad
    with pytest.raises(fxquant.FxquantError, match=r"up.weight.*NaN or infinity"):
        compiled(block)(x)


@torch.no_grad()
def test_weights_of_any_layout_and_constant_rows() -> None:
    block = Block()
    block.up.weight[3] = 0
    block.up.weight[4] = 0.5
    block.down.weight = nn.Parameter(torch.randn(64, 32).t())
    block.up.bias = nn.Parameter(torch.randn(1).expand(64))
    plain = Block()
    plain.load_state_dict(block.state_dict())  # the same numbers, all contiguous
    assert not block.down.weight.is_contiguous() and plain.down.weight.is_contiguous()
    expected, wanted = block(x), compiled(plain)(x)
    got = compiled(block)(x)
    torch.testing.assert_close(got, wanted)
    assert error(got, expected) < 0.02  # rows of zeros and of one number are rounded among the others


@torch.no_grad()
def test_a_module_that_is_used_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(self.block(x))

    model = Twice()
    expected = model(x)
    assert error(compiled(model)(x), expected) < 0.02
    assert {s.name for s in fxquant.explain(model).sites} == {"block.up.weight", "block.down.weight"}


@torch.no_grad()
def test_compiling_twice_and_resetting() -> None:
    block = Block()
    expected = block(x)
    compiled(compiled(block))(x)
    torch._dynamo.reset()
    assert error(block(x), expected) < 0.01


@torch.no_grad()
def test_two_models_and_two_threads() -> None:
    blocks = [Block(seed=i) for i in range(2)]
    expected = [copy.deepcopy(b)(x) for b in blocks]
    torch._dynamo.reset()
    for block in blocks:
        block.eval().compile(backend="outlierq", options=EAGER)
    results: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def run(i: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                results[i].append(blocks[i](x))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert len(results[i]) == 5
        assert all(error(y, expected[i]) < 0.01 for y in results[i])


@torch.no_grad()
def test_every_stage_is_written_and_runs(tmp_path: object) -> None:
    compiled(Block(), trace=str(tmp_path))(x)
    stages = sorted(p.name for p in tmp_path.glob("graph*/*.py"))
    assert [name[3:-3] for name in stages] == [
        "captured", "canonical", "equalized", "annotated", "quantized", "lowered", "folded", "chained",
    ]  # fmt: skip
    block, results = Block(), []
    for path in sorted(tmp_path.glob("graph*/*.py"))[:5]:  # those that take what Dynamo's graph takes
        space: dict[str, object] = {}
        exec(compile(path.read_text(), str(path), "exec"), space)
        names = re.findall(r"^# (\w+): (\S+)$", path.read_text(), re.M)
        given = dict(names)
        inputs = inspect.signature(space["forward"]).parameters
        known = {name: dict(block.named_parameters())[path] for name, path in given.items()} | {"self": None}
        results.append(space["forward"](*(known.get(name, x) for name in inputs))[0])
    for result in results[1:4]:  # canonical, equalized and annotated compute what was captured
        torch.testing.assert_close(result, results[0])
    assert 0 < error(results[4], results[0]) < 0.01  # quantized
    rewrites = next(tmp_path.glob("graph*/rewrites.txt")).read_text().splitlines()
    assert rewrites[0].startswith("1 ") and any("quantize up.weight" in line for line in rewrites)


@torch.no_grad()
def test_fuel_lets_only_the_first_rewrites_happen(tmp_path: Path) -> None:
    block = Block()
    expected = block(x)
    rewrites, errors = [], []
    for fuel in range(9):
        errors.append(error(compiled(block, fuel=fuel, trace=str(tmp_path / str(fuel)))(x), expected))
        rewrites.append(next((tmp_path / str(fuel)).glob("graph*/rewrites.txt")).read_text().splitlines())
    whole = rewrites[-1]
    assert rewrites == [whole[:fuel] for fuel in range(9)]
    assert 4 < len(whole) < 9
    assert errors[0] < 1e-6 < errors[-1]


class Written(nn.Module):
    """Writes to the input of two products between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x * 2
        p = self.a(h)
        h[:, 0] = 30.0
        return nn.functional.gelu(p) + self.b(h)


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["W8A8", "W8A16"])
def test_an_input_that_is_written_to_between_two_products_is_rounded_for_each(recipe: str) -> None:
    model, data = Written().eval(), torch.randn(4, 16)
    expected = model(data)
    assert error(compiled(model, recipe=recipe)(data), expected) < 0.03


class Heads(nn.Module):
    """Returns what attention gives, of heads that lie in tokens or of heads that lie by themselves."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.project, self.apart = nn.Linear(32, 32), apart

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.project(x).view(2, 16, 4, 8).transpose(1, 2)
        q = q.contiguous() if self.apart else q
        return nn.functional.scaled_dot_product_attention(q, q, q)


@torch.no_grad()
@pytest.mark.parametrize("apart", [False, True])
def test_attention_that_is_returned_lies_as_without_us(apart: bool) -> None:
    model, data = Heads(apart).eval(), torch.randn(2, 16, 32)
    strides = model(data).stride()
    assert strides == ((512, 128, 8, 1) if apart else (512, 8, 32, 1))
    assert compiled(model)(data).stride() == strides


def test_ranges_of_a_recipe_that_takes_none_and_of_sites_that_are_none_are_told() -> None:
    with pytest.raises(Exception, match="lists ranges and its activations are Dynamic"):
        compiled(Block(), ranges={"up": (-1.0, 1.0)})(x)
    block = Block()
    with pytest.warns(UserWarning, match="no range is known"), torch.no_grad():
        compiled(block, recipe="W8A8-static", ranges={"up": (-4.0, 4.0), "typo": (0.0, 1.0)})(x)
    assert fxquant.explain(block).unused == ("typo",)


@torch.no_grad()
def test_a_later_compilation_is_the_one_explained() -> None:
    block = Block(width=128)
    data = torch.randn(2, 5, 128)
    compiled(block)(data)
    block.compile(backend="outlierq", options={**EAGER, "recipe": "W4A16"})
    block(data)
    report = fxquant.explain(block)
    assert report.recipe == "W4A16"
    assert {site.spec for site in report.sites} == {"W uint4 per group of 128"}


@torch.no_grad()
def test_what_no_graph_has_met_and_rules_that_name_nothing_are_told() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Block(), Block()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    torch._dynamo.reset()
    model = Two().eval()
    model.first.compile(backend="outlierq", options={**EAGER, "ignore": ["nosuch"]})
    model(x)
    report = fxquant.explain(model)
    assert report.unmet == ("second.up.weight", "second.down.weight")
    assert report.unused == ("nosuch",)
    assert "2 weights were met by no compiled graph" in str(report)
    assert "rules that name no site: 'nosuch'" in str(report)
