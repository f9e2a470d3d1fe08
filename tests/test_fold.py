"""Folded weights are always those of today: in-place changes, new dtypes, tied tables, many layers in one graph."""

import gc
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import fxquant
from fxquant.graph import fold
from fxquant.graph.fold import CACHE, FoldedWeights

OPTIONS = {"inductor": False}


class Layer(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(self.norm(x))


class Stack(nn.Module):
    def __init__(self, depth: int = 3, width: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        for layer in self.layers:
            nn.init.normal_(layer.norm.weight, 1, 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def whole() -> Stack:
    model = Stack().eval()
    model.compile(backend="outlierq", options=OPTIONS)
    return model


def regional() -> Stack:
    model = Stack().eval()
    for layer in model.layers:
        layer.compile(backend="outlierq", options=OPTIONS)
    return model


def float_output(model: Stack, x: torch.Tensor) -> torch.Tensor:
    """What the model computes in floating point, by a copy that was never compiled."""
    copy = Stack(len(model.layers)).to(x.dtype).eval()
    copy.load_state_dict(model.state_dict())
    return copy(x)


def assert_right(model: Stack, x: torch.Tensor) -> None:
    expected = float_output(model, x)
    assert ((model(x) - expected).norm() / expected.norm()).item() < 0.01


x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
BOTH = pytest.mark.parametrize("build", [whole, regional])


@BOTH
def test_one_graph_serves_many_layers_and_each_has_its_own_weights(build: object) -> None:
    model = build()
    assert_right(model, x)
    assert_right(model, x)
    names = {site.name for site in fxquant.explain(model).sites}
    assert names == {f"layers.{i}.linear.weight" for i in range(3)}


def write_in_place(model: Stack) -> None:
    model.layers[1].linear.weight.mul_(-2)


def change_a_gain(model: Stack) -> None:
    model.layers[0].norm.weight.mul_(3)


def load_a_checkpoint(model: Stack) -> None:
    model.load_state_dict({k: v + 0.2 * torch.randn_like(v) for k, v in model.state_dict().items()})


def replace_the_data(model: Stack) -> None:
    for p in model.parameters():
        p.data = p.data + 0.2 * torch.randn_like(p)


def step_an_optimizer(model: Stack) -> None:
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def replace_the_parameter(model: Stack) -> None:
    model.layers[2].linear.weight = nn.Parameter(torch.randn(32, 32))


def write_behind_the_counter(model: Stack) -> None:
    model.layers[1].linear.weight.data.mul_(-2)
    fxquant.refresh()


@BOTH
@pytest.mark.parametrize(
    "change",
    [
        write_in_place,
        change_a_gain,
        load_a_checkpoint,
        replace_the_data,
        step_an_optimizer,
        replace_the_parameter,
        write_behind_the_counter,
    ],
)
def test_a_change_of_weights_is_seen_by_the_next_call(build: object, change: object) -> None:
    model = build()
    model(x)
    change(model)
    assert_right(model, x)


def test_an_address_that_is_used_again_is_no_proof_of_the_same_weights() -> None:
    model = Stack(depth=1, width=256).eval()
    model.compile(backend="outlierq", options=OPTIONS)
    data, weight = torch.randn(4, 256), model.layers[0].linear.weight
    for _ in range(20):  # twice between two calls, the second may come to lie where the first was
        weight.data = weight.data * 2
        weight.data = weight.data * -0.5
        expected = Stack(depth=1, width=256).eval()
        expected.load_state_dict(model.state_dict())
        wanted = expected(data)
        assert ((model(data) - wanted).norm() / wanted.norm()).item() < 0.02


@BOTH
def test_a_change_of_dtype_is_a_new_graph_with_new_weights(build: object) -> None:
    model = build()
    assert_right(model, x)
    model.to(torch.bfloat16)
    y = model(x.bfloat16())
    expected = float_output(model, x.bfloat16()).float()
    assert ((y.float() - expected).norm() / expected.norm()).item() < 0.02
    for p in model.parameters():
        p.add_(0.125)
    model.to(torch.float32)
    assert_right(model, x)


class WithAdapter(nn.Module):
    """A LoRA layer as its libraries write it: merged through ``weight.data``, which no version counter sees."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(32, 32)
        self.down = nn.Linear(32, 4, bias=False)
        self.up = nn.Linear(4, 32, bias=False)
        self.merged: list[str] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) if self.merged else self.linear(x) + 3 * self.up(self.down(x))

    def merge(self) -> None:
        self.linear.weight.data += 3 * self.up.weight @ self.down.weight
        self.merged.append("default")


def test_a_merged_adapter_is_in_the_product() -> None:
    model = WithAdapter().eval()
    expected = model(x)
    model.compile(backend="outlierq", options=OPTIONS)
    for _ in range(2):
        assert ((model(x) - expected).norm() / expected.norm()).item() < 0.02
    model.merge()
    assert ((model(x) - expected).norm() / expected.norm()).item() < 0.02


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(64, 32)
        self.layer = Layer()
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.embedding(ids)))


def test_a_tied_table_stays_a_table_while_its_head_is_quantized() -> None:
    model, ids = Tied().eval(), torch.arange(8)
    model.compile(backend="outlierq", options=OPTIONS)
    for _ in range(2):
        reference = Tied().eval()
        reference.load_state_dict(model.state_dict())
        expected = reference(ids)
        assert ((model(ids) - expected).norm() / expected.norm()).item() < 0.01
        model.embedding.weight.add_(1)


def test_two_graphs_of_one_model_share_their_folded_weights() -> None:
    model = whole()
    model(x)
    folds = CACHE.folds
    model(torch.randn(2, 3, 32))  # another rank is another graph
    assert CACHE.folds == folds


def test_a_call_without_changes_folds_nothing() -> None:
    model = whole()
    model(x)
    folds = CACHE.folds
    for _ in range(3):
        model(x)
    assert CACHE.folds == folds


def test_folded_weights_die_with_their_parameters() -> None:
    gc.collect()
    before = len(CACHE._entries)
    model = whole()
    model(x)
    assert len(CACHE._entries) > before
    alive = weakref.ref(model.layers[0].linear.weight)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert alive() is None
    assert len(CACHE._entries) == before


def test_folded_weights_die_with_the_graphs_that_use_them() -> None:
    gc.collect()
    before = len(CACHE._entries)
    model = Stack().eval()
    for recipe in ("W8A8", "W8A16"):
        torch._dynamo.reset()
        run = torch.compile(model, backend="outlierq", options={"recipe": recipe, **OPTIONS})
        run(x)
    gc.collect()
    assert len(CACHE._entries) == before + 3  # those of the second recipe
    del run
    torch._dynamo.reset()
    gc.collect()
    assert len(CACHE._entries) == before


def let_go_of_the_data(model: Stack) -> Callable[[], bool]:
    """Whether the memory of the first weight, which the model lets go here, is free."""
    weight = model.layers[0].linear.weight
    reference = weight.untyped_storage()._weak_ref()
    weight.data = torch.empty(0)
    return lambda: bool(torch.UntypedStorage._expired(reference))


@BOTH
@pytest.mark.parametrize("forget", [fxquant.refresh, CACHE.clear])
def test_memory_that_the_model_lets_go_is_free_when_it_says_so(build: object, forget: Callable[[], None]) -> None:
    model = build()
    model(x)
    is_free = let_go_of_the_data(model)
    forget()
    assert is_free()


def test_memory_that_the_model_lets_go_is_free_when_its_graphs_are_gone() -> None:
    model = Stack().eval()
    run = torch.compile(model, backend="outlierq", options=OPTIONS)
    run(x)
    is_free = let_go_of_the_data(model)
    del run
    torch._dynamo.reset()
    gc.collect()
    assert is_free()


def test_memory_that_one_graph_sees_replaced_is_let_go_by_the_others() -> None:
    model = whole()
    model(x)
    model(torch.randn(2, 3, 32))  # another rank is another graph
    weight = model.layers[0].linear.weight
    reference = weight.untyped_storage()._weak_ref()
    weight.data = weight.data + 1
    model(x)
    assert torch.UntypedStorage._expired(reference)


def test_clear_makes_the_next_call_fold_anew() -> None:
    model = whole()
    model(x)
    folds = CACHE.folds
    CACHE.clear()
    model(x)
    assert CACHE.folds == folds + 3


@BOTH
def test_a_second_look_at_the_same_contents_folds_nothing(build: object) -> None:
    model = build()
    model(x)
    folds = CACHE.folds
    fxquant.refresh()
    model(x)
    assert CACHE.folds == folds


def test_layers_that_share_their_largest_weight_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = nn.Linear(32, 32)
    layers = [Layer().eval() for _ in range(3)]
    for layer in layers:
        layer.linear = shared
        nn.init.normal_(layer.norm.weight, 1, 0.5)
        layer.compile(backend="outlierq", options=OPTIONS)
        layer(x)
    folds = CACHE.folds
    monkeypatch.setattr(fold, "fingerprint", None)  # nothing is looked at
    for layer in layers:
        expected = x + shared(layer.norm(x))
        assert ((layer(x) - expected).norm() / expected.norm()).item() < 0.01
    assert CACHE.folds == folds


def test_weights_whose_writes_are_not_counted_are_named_once() -> None:
    with torch.inference_mode():
        model = Stack(depth=1).eval()
    model.compile(backend="outlierq", options=OPTIONS)
    with pytest.warns(UserWarning, match=r"'layers.0.norm.weight' and 2 others: made in inference mode.*refresh\(\)") as seen:
        model(x)
        with torch.inference_mode():
            model.load_state_dict({name: -3 * value for name, value in model.state_dict().items()})
        fxquant.refresh()
        assert_right(model, x)
    assert sum("inference mode" in str(warning.message) for warning in seen) == 1


class Cycle:
    """Garbage that only the collector finds, with a parameter in it."""

    def __init__(self) -> None:
        self.parameter, self.me = nn.Parameter(torch.zeros(1)), self


def test_parameters_may_die_while_others_are_met() -> None:
    """In one thread the collector ends them in the midst of a look at all; in several each thread ends its own."""
    graph, errors = FoldedWeights((), (0, 1), lambda args: None), []
    kept = [nn.Parameter(torch.zeros(1)) for _ in range(400)]

    def meet(parameters: list[nn.Parameter]) -> None:
        try:
            for one in parameters:
                graph((one, kept[0]))
        except RuntimeError as error:
            errors.append(error)

    def churn() -> None:
        while time.monotonic() < end:
            meet([nn.Parameter(torch.zeros(1)) for _ in range(20)])

    meet(kept)
    thresholds, interval = gc.get_threshold(), sys.getswitchinterval()
    try:
        gc.set_threshold(30, 1, 1)
        for _ in range(20):
            meet([Cycle().parameter for _ in range(10)])
            meet(kept[:1])
        gc.set_threshold(*thresholds)
        sys.setswitchinterval(1e-6)
        end = time.monotonic() + 1
        threads = [threading.Thread(target=churn) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        gc.set_threshold(*thresholds)
        sys.setswitchinterval(interval)
    assert errors == []
