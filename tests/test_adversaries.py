"""Models written against us: aliases, in-place writes, odd shapes, things that must leave the graph untouched."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import fxquant
from fxquant.graph import fold
from fxquant.graph.capture import Parameter, capture
from fxquant.graph.fingerprint import fingerprint

D = 32


class Model(nn.Module):
    """Two linears and whatever ``extra`` registers; ``forward`` is given."""

    def __init__(self, forward: Callable[..., Any], **extra: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self._forward = nn.Linear(D, D), nn.Linear(D, D), forward
        for name, value in extra.items():
            setattr(self, name, value)

    def forward(self, *args: Tensor) -> Any:
        return self._forward(self, *args)


def compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model.eval(), backend="outlierq", options={"inductor": False, **options})


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-9))


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def times_one(m: Model, x: Tensor) -> Tensor:
    y = x * 1
    x.mul_(2)
    return m.a(y)


def plus_nothing(m: Model, x: Tensor) -> Tensor:
    y = x + 0
    y.mul_(2)
    return m.a(y)


def silent_view(m: Model, x: Tensor) -> Tensor:
    y = torch.atleast_3d(x)
    m.a(x)
    y.mul_(-2)
    return m.b(x)


def turned_view(m: Model, x: Tensor) -> Tensor:
    y = torch.einsum("ij->ji", x)
    m.a(x)
    y.mul_(-2)
    return m.b(x)


def written_copy(m: Model, x: Tensor) -> Tensor:
    y = x.clone()
    x.mul_(2)
    return m.a(y * torch.sigmoid(y))


def a_vector(m: Model, x: Tensor) -> Tensor:
    y = F.layer_norm(x, (D,), m.gain)
    return m.a(y) + (y @ m.vector)[:, None]


def a_table_of_integers(m: Model, x: Tensor) -> Tensor:
    y = F.layer_norm(x, (D,), m.gain)
    return m.a(y + m.table) + (y * (m.table > 2)).tanh() @ m.b.weight


def attention(m: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v)


CASES: dict[str, tuple[Callable[..., Any], dict[str, Any], tuple[tuple[int, ...], ...]]] = {
    "a product by one is a copy": (times_one, {}, ((4, D),)),
    "a sum with nothing is a copy": (plus_nothing, {}, ((4, D),)),
    "a view that does not say so": (silent_view, {}, ((4, D),)),
    "a view by einsum": (turned_view, {}, ((4, D),)),
    "a copy whose source is written then": (written_copy, {}, ((4, D),)),
    "a vector beside a matrix": (a_vector, {"gain": nn.Parameter(3 + random(D)), "vector": nn.Parameter(random(D))}, ((4, D),)),
    "integers behind a norm": (
        a_table_of_integers, {"gain": nn.Parameter(3 + random(D)), "table": nn.Buffer(torch.arange(D) % 5)}, ((4, D),),
    ),
    "keys of one batch for all": (attention, {}, ((3, 4, 16, 8), (1, 4, 16, 8), (1, 4, 16, 8))),
    "keys of one head": (attention, {}, ((2, 4, 16, 8), (2, 1, 16, 8), (2, 4, 16, 8))),
    "queries of one batch": (attention, {}, ((1, 4, 16, 8), (3, 4, 16, 8), (3, 4, 16, 8))),
    "queries of one head": (attention, {}, ((2, 1, 16, 8), (2, 4, 16, 8), (2, 4, 16, 8))),
    "attention, viewed": (lambda m, q, k, v: sdpa(q, k, v).view(2, 4, -1), {}, ((2, 4, 16, 8),) * 3),
    "a bias of one number": (lambda m, x: F.linear(x, m.a.weight, m.bias), {"bias": nn.Parameter(torch.ones(1))}, ((4, D),)),
    "a bias per row": (lambda m, x: F.linear(x, m.a.weight, m.bias), {"bias": nn.Parameter(random(4, D))}, ((4, D),)),
    "a convolution of 1 x 1, viewed": (lambda m, x: m.conv(x).view(2, -1), {"conv": nn.Conv2d(3, 8, 1)}, ((2, 3, 16, 16),)),
    "a product from the left, viewed": (lambda m, x: (m.a.weight @ x).view(2, -1), {}, ((2, D, 7),)),
    "no inputs at all": (lambda m, x: m.none(x), {"none": nn.Linear(0, 3)}, ((2, 0),)),
    "checkpointed": (lambda m, x: torch.utils.checkpoint.checkpoint(m.a, x, use_reentrant=False), {}, ((4, D),)),
}


@pytest.mark.filterwarnings("ignore:outlierq left")
@pytest.mark.parametrize("name", CASES)
def test_the_answer_and_what_is_written_are_those_of_the_model(name: str) -> None:
    forward, extra, shapes = CASES[name]
    model = Model(forward, **extra)
    mine, theirs = ([random(*shape) for shape in shapes] for _ in range(2))
    with torch.no_grad():
        assert error(compiled(model)(*mine), model(*theirs)) < 0.03
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_sums_that_may_not_fit_32_bits_are_not_made_in_them() -> None:
    model = Model(lambda m, x: m.wide(x), wide=nn.Linear(70000, 3))
    nn.init.ones_(model.wide.weight)
    x = torch.ones(2, 70000)
    assert error(compiled(model)(x), model(x)) < 0.03


@torch.no_grad()
def test_rows_that_change_places_are_seen_by_a_look_at_the_contents() -> None:
    model = nn.Linear(2048, 8, bias=False)
    run, x = compiled(model), random(2, 2048)
    run(x)
    model.weight.data.copy_(model.weight.data.flip(0))
    fxquant.refresh()
    assert error(run(x), model(x)) < 0.03


@pytest.mark.parametrize("size", [1, 7, 2048, 8192, 8200])
def test_a_fingerprint_knows_order_shape_and_type(size: int) -> None:
    x = torch.arange(size, dtype=torch.int32)
    prints = [fingerprint(t) for t in (x, x.roll(1), x.flip(0), x.view(-1, 1), x.view(torch.float32), x + 1)]
    assert len(set(prints)) == (len(prints) if size > 2 else 4)
    assert fingerprint(x.clone()) == prints[0]


@torch.no_grad()
def test_what_the_graph_returns_is_the_users_to_write_to() -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        e = 0.5 * m.pos * (1 + torch.erf(m.pos * 0.7071067811865476))
        torch._dynamo.graph_break()
        e.add_(x)
        return m.a(e)

    model, x = Model(forward, pos=nn.Parameter(random(4, D))), random(4, D)
    run = compiled(model)
    assert all(error(run(x), model(x)) < 0.03 for _ in range(3))
    y = torch.zeros(2, D) + 1
    compiled(Model(lambda m, x: x * 1))(y).zero_()
    assert bool((y == 1).all())


RETURNED: dict[str, Callable[[Model, Tensor], tuple[Tensor, ...]]] = {
    "a product by one": lambda m, x: (x * 1,),
    "of a view": lambda m, x: (x.view(-1) * 1,),
    "a part of one": lambda m, x: ((x * 1).chunk(2)[0],),
    "a part of a sum with nothing": lambda m, x: ((x[1:] + 0)[:2],),
    "a view that does not say so": lambda m, x: (torch.atleast_3d(x * 1),),
    "turned by einsum": lambda m, x: (torch.einsum("ij->ji", x * 1),),
    "of a weight": lambda m, x: (m.a.weight.t() * 1, m.a(x)),
    "beside its source": lambda m, x: ((y := torch.relu(x)), y * 1),
    "viewed beside its source": lambda m, x: ((y := torch.relu(x))[0], (y * 1).view(-1)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", RETURNED)
def test_what_is_returned_shares_no_memory_that_it_did_not_share_in_the_model(name: str) -> None:
    model, x = Model(RETURNED[name]), random(4, D)
    weight, others = model.a.weight.detach().clone(), model(x)[1:]
    first, *rest = compiled(model)(x)
    first.zero_()
    assert torch.equal(x, random(4, D)) and torch.equal(model.a.weight, weight)
    assert all(error(a, b) < 0.03 for a, b in zip(rest, others, strict=True))


@torch.no_grad()
def test_a_graph_of_sizes_alone_is_no_fault() -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        n = x.shape[0] * 2
        torch._dynamo.graph_break()
        times = n * 3 + 1
        torch._dynamo.graph_break()
        return m.a(x) * times

    model = Model(forward)
    torch._dynamo.reset()
    run = torch.compile(model.eval(), backend="outlierq", dynamic=True, options={"inductor": False})
    assert all(error(run(random(n, D)), model(random(n, D))) < 0.03 for n in (3, 5))


def test_modules_that_a_function_or_a_list_holds_have_names_of_their_own() -> None:
    model = Model(lambda m, x: m.b(m.plain[1](m.plain[0](x))))
    model.plain = [nn.Linear(D, D), nn.Linear(D, D)]
    first, second, paths = nn.Linear(D, D), nn.Linear(D, D), []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        placeholders = capture(gm).graph.find_nodes(op="placeholder")
        paths.append([p.path for n in placeholders if (p := Parameter.of(n)) and p.path.endswith("weight")])
        return gm.forward

    for run in (model, lambda x: first(x) + second(x)):
        torch._dynamo.reset()
        torch.compile(run, backend=backend)(random(4, D))
    assert sorted(paths[0]) == ["b.weight", "plain.0.weight", "plain.1.weight"]
    assert paths[1] == ["first.weight", "second.weight"]


TRAINING: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "dropout": lambda m, x: F.dropout(m.a(x), 0.1, True),
    "feature_dropout": lambda m, x: F.dropout2d(m.a(x)[None], 0.1, True),
    "alpha_dropout": lambda m, x: F.alpha_dropout(m.a(x), 0.1, True),
    "feature_alpha_dropout": lambda m, x: F.feature_alpha_dropout(m.a(x), 0.1, True),
    "scaled_dot_product_attention": lambda m, x: sdpa(*[m.a(x)[None]] * 3, dropout_p=0.1),
}


@pytest.mark.parametrize("name", TRAINING)
def test_a_dropout_that_drops_is_refused_by_its_name(name: str) -> None:
    with torch.no_grad(), pytest.raises(Exception, match=rf"{name}.* in training mode.*call model.eval\(\) first"):
        compiled(Model(TRAINING[name]))(random(4, D))


@torch.no_grad()
def test_a_tensor_made_in_inference_mode_does_not_hide_the_others() -> None:
    model, x = Model(lambda m, x: m.a(x) + m.b(x)), random(2, D)
    with torch.inference_mode():
        model.b.weight = nn.Parameter(torch.randn(D, D), requires_grad=False)
    run = compiled(model)
    with pytest.warns(UserWarning, match="'b.weight': made in inference mode"):
        run(x)
    model.a.weight.mul_(-4.0)
    assert error(run(x), model(x)) < 0.03


def test_outputs_are_tensors_as_any_other_until_backward() -> None:
    y = compiled(Model(lambda m, x: m.a(x)))(random(4, D))
    y += 1
    y[:, -1] = 0
    with pytest.raises(fxquant.GradientError):
        y.sum().backward()


def test_what_needs_no_gradient_in_the_model_needs_none_in_ours() -> None:
    class Encoder(Model):
        @torch.no_grad()
        def encode(self, x: Tensor) -> Tensor:
            return self.a(x)

    y = compiled(Encoder(lambda m, x: m.encode(x)))(random(4, D))
    assert not y.requires_grad


@torch.no_grad()
def test_infinity_in_a_mask_is_no_fault() -> None:
    model = Model(lambda m, x: m.a(x) + m.mask)
    model.register_buffer("mask", torch.zeros(D).masked_fill(torch.arange(D) < 3, float("-inf")))
    x = random(4, D)
    y, expected = compiled(model)(x), model(x)
    assert torch.equal(y.isinf(), expected.isinf())
    assert error(y[:, 3:], expected[:, 3:]) < 0.03


def test_gradients_inside_the_model_are_refused_with_a_sentence() -> None:
    model = Model(lambda m, x: torch.func.grad(lambda x: m.a(x).sin().sum())(x))
    with pytest.raises(Exception, match="gradients in its forward pass"):
        compiled(model)(random(4, D))


@torch.no_grad()
def test_products_inside_a_branch_are_listed() -> None:
    model = Model(lambda m, x: torch.cond(x.sum() > 0, lambda x: m.a(x), lambda x: m.b(x), (x,)))
    with pytest.warns(UserWarning, match="left 2 of 2 products"):
        compiled(model)(random(4, D))
    report = fxquant.explain(model)
    assert report.coverage == 0
    assert {site.name for site in report.sites} == {"a.weight", "b.weight"}


@torch.no_grad()
def test_layers_that_share_a_norm_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Layer(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm, self.linear = norm, nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.norm(x))

    torch._dynamo.reset()
    norm, looks = nn.LayerNorm(D), 0
    layers = [Layer(norm).eval() for _ in range(3)]
    for layer in layers:
        layer.compile(backend="outlierq", options={"inductor": False})
        layer(random(2, D))
    def counted(tensor: Tensor) -> int:
        nonlocal looks
        looks += 1
        return fingerprint(tensor)

    monkeypatch.setattr(fold, "fingerprint", counted)
    for layer in layers:
        layer(random(2, D))
    assert looks == 0
