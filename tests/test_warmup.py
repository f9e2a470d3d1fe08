"""``fxquant.warmup``: what is compiled before the first call, what is said of it, and what is refused."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_triton_tiles import FORMS
from test_written import calls_of, reported
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxquant
from fxquant import WarmupError
from fxquant.backend.triton import launch, tables
from fxquant.backend.triton.gpus import H200
from fxquant.backend.triton.recording import launches
from fxquant.backend.triton.tile import Problem
from fxquant.backend.triton.tune import SHORTLIST, call, operands, tune
from fxquant.backend.tuning import problems_of, tune_model


class Block(nn.Module):
    def __init__(self, d: int = 16) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x: torch.Tensor, scale: float = 1.0, mask: torch.Tensor | None = None) -> torch.Tensor:
        y = self.down(F.gelu(self.up(x))) * scale
        return y if mask is None else y * mask[..., None]


@pytest.fixture
def model():
    torch.compiler.reset()
    made = Block().eval()
    made.compile(backend="outlierq")
    with torch.no_grad():
        yield made


def compiled_by(call) -> int:
    """How many graphs Dynamo compiles in ``call``."""
    torch._dynamo.utils.counters.clear()
    call()
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_what_was_warmed_up_compiles_nothing_afterwards(model):
    x, mask = torch.randn(2, 5, 16), torch.ones(2, 5)
    done = fxquant.warmup(model, {"x": x, "mask": mask}, shapes=[(1, 1), (2, 5), (3, 9), (1, 40)])
    assert [call.inputs for call in done.calls][:2] == ["x [1, 1, 16], mask [1, 1]", "x [2, 5, 16], mask [2, 5]"]
    assert done.graphs > 0 and sum(call.graphs for call in done.calls) == done.graphs

    def calls():
        for rows, tokens in ((1, 1), (2, 5), (3, 9), (1, 40)):
            model(x=torch.randn(rows, tokens, 16), mask=torch.ones(rows, tokens))

    assert compiled_by(calls) == 0
    assert {site.name for site in done.report.sites} == {"up.weight", "down.weight"}


@pytest.mark.parametrize(
    "data",
    [
        torch.randn(2, 5, 16),
        {"x": torch.randn(2, 5, 16)},
        (torch.randn(2, 5, 16), 2.0),
        [torch.randn(2, 5, 16), {"x": torch.randn(2, 5, 16)}],
        (batch for batch in [torch.randn(2, 5, 16)]),
        lambda model: model(torch.randn(2, 5, 16)),
    ],
    ids=["tensor", "dict", "tuple", "list", "generator", "callable"],
)
def test_data_may_be_a_batch_batches_or_a_callable(model, data):
    done = fxquant.warmup(model, data)
    assert done.calls[0].graphs == 1 and done.graphs == 1
    assert done.calls[0].first > done.calls[0].then > 0
    assert f"1 graph compiled for {len(done.calls)} batch" in str(done)


def test_the_weights_are_folded_and_the_model_computes_what_it_did(model):
    x = torch.randn(2, 5, 16)
    before = Block.forward(model, x)
    fxquant.warmup(model, x)
    assert (model(x) - before).norm() < 0.05 * before.norm()


def test_a_module_that_torch_compile_returned_is_warmed_up_too():
    torch.compiler.reset()
    compiled = torch.compile(Block().eval(), backend="outlierq")
    with torch.no_grad():
        assert fxquant.warmup(compiled, torch.randn(2, 5, 16)).graphs == 1


def test_regions_that_are_compiled_alone_are_warmed_up():
    torch.compiler.reset()
    model = nn.Sequential(Block(), Block()).eval()
    for block in model:
        block.compile(backend="outlierq")
    with torch.no_grad():
        done = fxquant.warmup(model, torch.randn(2, 5, 16))
    assert len(done.report.sites) == 4


def test_a_batch_is_cut_or_repeated_to_a_shape(model):
    seen = []
    model.register_forward_pre_hook(lambda module, args, given: seen.append(given), with_kwargs=True)
    batch = {"x": torch.randn(2, 3, 16), "mask": torch.ones(2, 3), "scale": 2.0}
    fxquant.warmup(model, batch, shapes=[(5, 7)])
    assert seen[0]["x"].shape == (5, 7, 16) and seen[0]["mask"].shape == (5, 7) and seen[0]["scale"] == 2.0
    assert torch.equal(seen[0]["x"][:2, :3], batch["x"]) and torch.equal(seen[0]["x"][2:4, 3:6], batch["x"])


X = torch.randn(2, 5, 16)
REFUSED = {
    "given a str; the compiled model": lambda m: fxquant.warmup("model", X),
    "the model is not compiled: call model.compile": lambda m: fxquant.warmup(Block().eval(), X),
    "in training mode": lambda m: fxquant.warmup(m.train(), X),
    "data is empty": lambda m: fxquant.warmup(m, []),
    "data is a int": lambda m: fxquant.warmup(m, 3),
    "a batch is a float": lambda m: fxquant.warmup(m, [0.5]),
    r"a shape is \(2, 0\); a pair": lambda m: fxquant.warmup(m, X, shapes=[(2, 0)]),
    "a shape is 16; a pair": lambda m: fxquant.warmup(m, X, shapes=[16]),
    "data is a callable": lambda m: fxquant.warmup(m, lambda m: m(X), shapes=[(1, 1)]),
    r"this one is x \[16\]": lambda m: fxquant.warmup(m, {"x": X[0, 0]}, shapes=[(1, 1)]),
    "there is none here|the model is on cpu": lambda m: fxquant.warmup(m, X, tune=True),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_cannot_be_warmed_up_is_refused_in_a_sentence(model, sentence):
    with pytest.raises(WarmupError, match=sentence):
        REFUSED[sentence](model)


def test_a_model_compiled_by_another_backend_is_told_so():
    torch.compiler.reset()
    model = Block().eval()
    model.compile(backend="eager")
    with torch.no_grad(), pytest.raises(WarmupError, match="no graph of this model was compiled with backend='outlierq'"):
        fxquant.warmup(model, X)


# ---- tuning, with a clock that is not one ----------------------------------------------------------------------------
PROBLEM = Problem(16, 4096, 4096, 4, width=128, group_size=128)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FXQUANT_CACHE", str(tmp_path))
    return tmp_path


def test_tuning_keeps_the_fastest_of_a_short_list_and_times_nothing_twice(folder):
    timed = []

    def timer(problem, choice, on):
        timed.append(choice)
        return 10.0 - len(timed)

    found = tune([PROBLEM, PROBLEM], H200, timer)
    assert timed == list(launch.ranked(PROBLEM, H200)[:SHORTLIST])
    assert found == {PROBLEM: (timed[-1], 10.0 - len(timed))}
    assert launch.chosen(PROBLEM, H200) == timed[-1]
    assert tune([PROBLEM], H200, timer) == {} and len(timed) == SHORTLIST


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("products", [1, 2])
def test_what_is_timed_is_the_problem(form, products):
    pytest.importorskip("triton")
    problem = Problem(16, 256, 512, products=products, **{"group_size": 512, **form})
    choices = launch.ranked(problem, H200)
    with FakeTensorMode():
        found = launches(lambda: [call(problem, choice, *operands(problem)) for choice in choices], H200)
    assert len(found) == sum(1 + (choice.parts > 1) for choice in choices)
    assert all(asked.arguments["M"] == 16 and asked.arguments["N"] == 256 for asked in found)


def test_a_tile_that_does_not_run_is_passed_over(folder):
    first, second, *_ = launch.ranked(PROBLEM, H200)

    def timer(problem, choice, on):
        if choice != second:
            raise RuntimeError("out of resource: registers")
        return 1.0

    assert tune([PROBLEM], H200, timer) == {PROBLEM: (second, 1.0)}

    def none_runs(problem, choice, on):
        raise RuntimeError("out of resource: shared memory")

    wide = replace(PROBLEM, N=8192)
    assert tune([wide], H200, none_runs) == {} and launch.chosen(wide, H200) == launch.ranked(wide, H200)[0]
    assert first != second


def test_the_products_of_a_model_are_found_in_its_graphs(folder, monkeypatch):
    pytest.importorskip("triton")
    _, model, _alive = reported(calls_of("pre_rms", "W8A8"), ["WO", "WG", "WU", "WD"])
    found = problems_of(model)
    assert {str(problem) for problem in found} == {
        "W8A8, 16 x 128 x 128", "W8A8 pair, 16 x 256 x 128", "W8A8, 16 x 128 x 256",
    }  # fmt: skip
    assert set(found.values()) == {H200}

    def slow_first(problem, choice, on):
        return 2.0 if choice == launch.ranked(problem, on)[0] else 1.0

    monkeypatch.setattr("fxquant.backend.triton.tune.microseconds", slow_first)
    lines, better = tune_model(model, lambda items, title: items)
    assert better and len(lines) == 3 and all("not what the model had" in line for line in lines)
    assert tables.user_file(H200).exists()
    assert tune_model(model, lambda items, title: items) == ([], False)
