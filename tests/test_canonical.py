"""Each idiom in many spellings becomes one op that computes the same function; what is not that idiom stays, with a reason."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from graphs import distance, graph_of, in_double, ops, result, run, values_of
from hypothesis import given
from hypothesis import strategies as st
from models import ZOO, Architecture
from torch import Tensor, fx

from fxquant.graph.capture import capture
from fxquant.graph.fuel import Fuel
from fxquant.graph.match import Miss
from fxquant.graph.tidy import tidy
from fxquant.graph.weights import parameter_only
from fxquant.patterns import attention, embedding, linear, mlp, norm, residual
from fxquant.patterns.canonical import CANONICAL, canonicalize

Fn = Callable[..., Any]
ROOT = math.sqrt(2 / math.pi)


def becomes(gm: fx.GraphModule, *wanted: str, tolerance: float = 1e-12) -> fx.GraphModule:
    """``gm`` in canonical form computes the same function in float64, through the ops ``wanted`` and weight algebra alone."""
    values = values_of(gm)
    before = in_double(gm, values)
    canonicalize(gm).graph.lint()
    assert distance(before, in_double(gm, values)) < tolerance
    weights = parameter_only(gm)
    names = [n.target.overloadpacket.__name__ for n in gm.graph.nodes if n.op == "call_function" and n not in weights]
    assert names == list(wanted)
    return gm


def stays(gm: fx.GraphModule) -> fx.GraphModule:
    before = ops(gm)
    assert ops(canonicalize(gm)) == before
    return gm


# ---- norms ----------------------------------------------------------------------------------------------------------
def mean_square(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True)


RMS: dict[str, Fn] = {
    "pow, rsqrt": lambda x, W: W * (x * torch.rsqrt(mean_square(x) + 1e-6)),
    "x * x": lambda x, W: W * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)),
    "square": lambda x, W: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * W,
    "1 / sqrt": lambda x, W: x * (1 / torch.sqrt(mean_square(x) + 1e-6)) * W,
    "x / sqrt": lambda x, W: W * (x / torch.sqrt(1e-6 + mean_square(x))),
    "pow(-0.5)": lambda x, W: (x * W) * (mean_square(x) + 1e-6).pow(-0.5),
    "pow(0.5)": lambda x, W: W * x / (mean_square(x) + 1e-6) ** 0.5,
    "sum / size": lambda x, W: W * x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / 8 + 1e-6),
    "1 + weight": lambda x, W: x * torch.rsqrt(mean_square(x) + 1e-6) * (1 + W),
    "weight ** 2": lambda x, W: x * torch.rsqrt(mean_square(x) + 1e-6) * W.pow(2),
    "up and down": lambda x, W: W * (x.float() * torch.rsqrt(mean_square(x.float()) + 1e-6)).to(x.dtype),
    "type_as": lambda x, W: (x.float() * torch.rsqrt(mean_square(x.float()) + 1e-6) * (1.0 + W.float())).type_as(x),
    "another axis name": lambda x, W: W * x * torch.rsqrt(x.pow(2).mean(2, True) + 1e-6),
    "no gain": lambda x, W: x * torch.rsqrt(mean_square(x) + 1e-6),
    "the op, then a gain": lambda x, W: torch.rms_norm(x, [8], None, 1e-6) * W,
    "no eps": lambda x, W: W * x * torch.rsqrt(mean_square(x)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spelling", RMS)
def test_an_rms_norm_becomes_one_op(spelling: str, dtype: torch.dtype) -> None:
    if dtype is torch.float32:
        gm = becomes(graph_of(RMS[spelling], (2, 3, 8), (8,)), "rms_norm")
    else:
        gm = graph_of(RMS[spelling], (2, 3, 8), (8,), dtype=dtype)
        values, kind = values_of(gm), result(gm).meta["val"].dtype
        exact = in_double(gm, values)
        canonicalize(gm)
        assert ops(gm)["rms_norm"] == 1 and ops(gm)["rsqrt"] == 0
        assert result(gm).meta["val"].dtype == run(gm, values)[0].dtype == kind == torch.bfloat16
        assert distance([exact[0]], [run(gm, values)[0].double()]) < 2**-8  # one rounding of the result, at most two
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.rms_norm.default)
    assert node.args[3] == (0.0 if spelling == "no eps" else 1e-6)


def mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


LAYER: dict[str, Fn] = {
    "var": lambda x, W, B: W * ((x - mean(x)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5)) + B,
    "correction": lambda x, W, B: B + (x - mean(x)) * torch.rsqrt(x.var(-1, keepdim=True, correction=0) + 1e-5) * W,
    "mean of squares": lambda x, W, B: B + W * (x - mean(x)) / (mean((x - x.mean(2, True)) ** 2) + 1e-5).sqrt(),
    "one difference": lambda x, W, B: (d := x - mean(x)) * torch.rsqrt(mean(d * d) + 1e-5) * W + B,
    "no bias": lambda x, W, B: (d := x - mean(x)) * torch.rsqrt(mean(d.pow(2)) + 1e-5) * W,
    "bare": lambda x, W, B: (d := x - mean(x)) * torch.rsqrt(mean(d.pow(2)) + 1e-5),
    "in float32": lambda x, W, B: W * ((d := x.float() - mean(x.float())) / (mean(d.pow(2)) + 1e-5).sqrt()) + B,
    "native": lambda x, W, B: torch.native_layer_norm(x, [8], W, B, 1e-5)[0],
    "the op, then a gain": lambda x, W, B: F.layer_norm(x, [8]) * W + B,
    "the op": lambda x, W, B: F.layer_norm(x, [8], W, B),
}


@pytest.mark.parametrize("spelling", LAYER)
def test_a_layer_norm_becomes_one_op(spelling: str) -> None:
    becomes(graph_of(LAYER[spelling], (2, 3, 8), (8,), (8,)), "layer_norm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("back", [True, False], ids=["and back", "and left there"])
def test_a_norm_in_float64_is_kept_in_float64(dtype: torch.dtype, back: bool) -> None:
    def fn(x: Tensor, W: Tensor) -> Tensor:
        y = W * (x.double() * torch.rsqrt(mean_square(x.double()) + 1e-6))
        return y.to(x.dtype) if back else y

    gm = graph_of(fn, (2, 3, 8), (8,), dtype=dtype)
    values = values_of(gm)
    before = run(gm, values)
    (node,) = canonicalize(gm).graph.find_nodes(op="call_function", target=torch.ops.aten.rms_norm.default)
    assert node.meta["val"].dtype == torch.float64
    assert distance(before, run(gm, values)) < (1e-7 if back else 1e-15)


NOT_NORMS: dict[str, tuple[Fn, str]] = {
    "over another axis": (lambda x, W: W * x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6), "'dim' of"),
    "no keepdim": (lambda x, W: W * x * torch.rsqrt(x.pow(2).mean(-1) + 1e-6), "'keepdim' of"),
    "the size of another axis": (lambda x, W: W * x * torch.rsqrt(x.pow(2).sum(-1, True) / 3 + 1e-6), "1 / 8 is needed"),
    "cubes": (lambda x, W: W * x * torch.rsqrt(x.pow(3).mean(-1, True) + 1e-6), "would be both"),
}


@pytest.mark.parametrize("kind", NOT_NORMS)
def test_what_is_no_rms_norm_stays_and_says_why(kind: str) -> None:
    fn, why = NOT_NORMS[kind]
    gm = stays(graph_of(fn, (8, 8, 8), (8,)))
    miss = norm.rms_norm.match(result(gm))
    assert isinstance(miss, Miss) and len(miss.reason.split()) > 4
    if kind != "cubes" and kind != "no keepdim":
        assert why in miss.reason


def test_a_gain_that_is_an_activation_stays_outside_of_the_norm() -> None:
    gm = becomes(graph_of(lambda x, y: y * (x * torch.rsqrt(mean_square(x) + 1e-6)), (2, 3, 8), (8,)), "rms_norm", "mul")
    assert "depends on more than parameters" in str(norm.rms_norm_then_gain.match(result(gm)))


def test_a_gain_of_another_shape_stays_outside_of_the_norm() -> None:
    becomes(graph_of(lambda x, W: W * (x * torch.rsqrt(mean_square(x) + 1e-6)), (2, 3, 8), (3, 8)), "rms_norm", "mul")


def test_a_second_reader_inside_keeps_the_norm_as_it_is() -> None:
    gm = stays(graph_of(lambda x, W: ((r := torch.rsqrt(mean_square(x) + 1e-6)), W * x * r), (2, 3, 8), (8,)))
    root = gm.graph.output_node().args[0][1]  # type: ignore[index]  # a pair
    assert "is also read by 'output'" in str(norm.rms_norm.match(root))


def test_a_gain_applied_after_the_input_was_overwritten_stays_outside() -> None:
    def fn(x: Tensor, W: Tensor) -> Tensor:
        y = x + 1
        z = y * torch.rsqrt(mean_square(y) + 1e-6)
        y.view(-1).zero_()
        return W * z

    gm = becomes(graph_of(fn, (2, 3, 8), (8,)), "add", "rms_norm", "view", "zero_", "mul")
    assert "is written in place by 'zero_' meanwhile" in str(norm.rms_norm_then_gain.match(result(gm)))


@given(data=st.data())
def test_any_composition_of_an_rms_norm_becomes_one_op(data: st.DataObject) -> None:
    pick = lambda *options: data.draw(st.sampled_from(options))  # noqa: E731
    cast = pick(lambda t: t, lambda t: t.float(), lambda t: t.double())
    narrow = pick(lambda t, like: t, lambda t, like: t.to(like.dtype))
    square = pick(lambda t: t * t, lambda t: t.pow(2), torch.square, lambda t: t**2.0)
    average = pick(lambda t: t.mean(-1, keepdim=True), lambda t: t.sum(-1, keepdim=True) / 8)
    eps = data.draw(st.floats(1e-12, 1e-1))
    inverse = pick(
        lambda y, m: y * torch.rsqrt(m), lambda y, m: y / torch.sqrt(m), lambda y, m: y * m**-0.5,
        lambda y, m: torch.rsqrt(m) * y, lambda y, m: (1 / m.sqrt()) * y, lambda y, m: y * torch.reciprocal(torch.sqrt(m)),
    )  # fmt: skip
    gain = pick(lambda y, w: y * w, lambda y, w: w * y, lambda y, w: (1 + w) * y, lambda y, w: y * (w + 1.0), lambda y, w: y)
    add = pick(lambda m: m + eps, lambda m: eps + m)

    def fn(x: Tensor, W: Tensor) -> Tensor:
        y = cast(x)
        return gain(narrow(inverse(y, add(average(square(y)))), x), W)

    gm = graph_of(fn, (2, 3, 8), (8,))
    values = values_of(gm)
    before = in_double(gm, values)
    assert ops(canonicalize(gm))["rms_norm"] == 1 and not ops(gm)["rsqrt"] + ops(gm)["sqrt"] + ops(gm)["pow"]
    assert distance(before, in_double(gm, values)) < 1e-12


# ---- activations ----------------------------------------------------------------------------------------------------
ACTIVATIONS: dict[str, tuple[str, Fn]] = {
    "erf": ("gelu", lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))),
    "erf, cdf first": ("gelu", lambda x: x * (0.5 * (torch.erf(x * 0.7071067811865476) + 1.0))),
    "erf, halved last": ("gelu", lambda x: x * (1.0 + torch.erf(x / math.sqrt(2.0))) / 2),
    "tanh": ("gelu_tanh", lambda x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * torch.pow(x, 3.0))))),
    "tanh, x * x * x": ("gelu_tanh", lambda x: x * 0.5 * (torch.tanh((x + x * x * x * 0.044715) * ROOT) + 1)),
    "tanh, x drawn out": ("gelu_tanh", lambda x: 0.5 * x * (1.0 + torch.tanh(x * ROOT * (1.0 + 0.044715 * x * x)))),
    "tanh, multiplied out": ("gelu_tanh", lambda x: 0.5 * x * (1.0 + torch.tanh(ROOT * x + ROOT * 0.044715 * x**3))),
    "x sigmoid(x)": ("silu", lambda x: x * torch.sigmoid(x)),
    "sigmoid(x) x": ("silu", lambda x: torch.sigmoid(x) * x),
    "x / (1 + exp(-x))": ("silu", lambda x: x / (1 + torch.exp(-x))),
}


@pytest.mark.parametrize("spelling", ACTIVATIONS)
def test_an_activation_becomes_one_op(spelling: str) -> None:
    name, fn = ACTIVATIONS[spelling]
    gm = becomes(graph_of(fn, (5, 8)), name.removesuffix("_tanh"))
    assert result(gm).kwargs.get("approximate", "none") == ("tanh" if name == "gelu_tanh" else "none")


@pytest.mark.parametrize("root", [0.7978845608, 0.79788456], ids=str)
def test_a_rounded_constant_is_still_a_gelu(root: float) -> None:
    fn = lambda x: 0.5 * x * (1.0 + torch.tanh(root * x * (1.0 + 0.044715 * x * x)))  # noqa: E731
    becomes(graph_of(fn, (50, 8)), "gelu", tolerance=1e-8)


def test_a_wrong_constant_is_none_and_says_which() -> None:
    gm = stays(graph_of(lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x**3))), (5, 8)))
    assert "0.8" in str(mlp.gelu_tanh.match(result(gm)))


def test_a_quick_gelu_is_recognised_and_stays() -> None:
    gm = stays(graph_of(lambda x: x * torch.sigmoid(1.702 * x), (5, 8)))
    assert mlp.gelu_quick.match(result(gm))
    assert not mlp.silu.match(result(gm))


# ---- linears --------------------------------------------------------------------------------------------------------
LINEARS: dict[str, tuple[Fn, tuple[Any, ...]]] = {
    "linear": (lambda x, W, B: F.linear(x, W, B), ((2, 3, 8), (4, 8), (4,))),
    "mm": (lambda x, W: torch.mm(x, W), ((3, 8), (8, 4))),
    "matmul": (lambda x, W: x @ W, ((2, 3, 8), (8, 4))),
    "vector @": (lambda x, W: x @ W, ((8,), (8, 4))),
    "x @ W.T": (lambda x, W: x @ W.T, ((2, 3, 8), (4, 8))),
    "x @ W.t() + b": (lambda x, W, B: torch.matmul(x, W.t()) + B, ((2, 3, 8), (4, 8), (4,))),
    "b + linear": (lambda x, W, B: B + F.linear(x, W), ((2, 3, 8), (4, 8), (1, 1, 4))),
    "two biases": (lambda x, W, B, C: F.linear(x, W, B) + C, ((2, 3, 8), (4, 8), (4,), (4,))),
    "addmm": (lambda x, W, B: torch.addmm(B, x, W), ((3, 8), (8, 4), (4,))),
    "Conv1D": (lambda x, W, B: torch.addmm(B, x.view(-1, 8), W).view(2, 3, 4), ((2, 3, 8), (8, 4), (4,))),
    "views around mm": (lambda x, W: torch.mm(x.reshape(6, 8), W.t()).reshape(2, 3, 4), ((2, 3, 8), (4, 8))),
    "einsum bsd,dn": (lambda x, W: torch.einsum("bsd,dn->bsn", x, W), ((2, 3, 8), (8, 4))),
    "einsum bsd,nd": (lambda x, W: torch.einsum("bsd,nd->bsn", x, W), ((2, 3, 8), (4, 8))),
    "einsum ...d,dn": (lambda x, W: torch.einsum("...d,dn->...n", x, W), ((2, 3, 8), (8, 4))),
    "einsum of the weight first": (lambda x, W: torch.einsum("nd,bsd->bsn", W, x), ((2, 3, 8), (4, 8))),
    "batch of one": (lambda x, W: torch.bmm(x, W), ((1, 3, 8), (1, 8, 4))),
    "expanded": (lambda x, W: torch.bmm(x, W.unsqueeze(0).expand(2, 8, 4)), ((2, 3, 8), (8, 4))),
    "added in place": (lambda x, W, B: torch.mm(x, W.t()).add_(B), ((3, 8), (4, 8), (4,))),
    "a product of parameters": (lambda x, W, B: x @ (W @ B), ((2, 3, 8), (8, 5), (5, 4))),
}


@pytest.mark.parametrize("spelling", LINEARS)
def test_a_product_with_a_parameter_becomes_a_linear(spelling: str) -> None:
    fn, shapes = LINEARS[spelling]
    gm = becomes(graph_of(fn, *shapes), "linear")
    product = list(linear.parameter_products(gm))[-1]
    assert product.kind == "linear" and product.node is result(gm)


MOVED: dict[str, tuple[Fn, tuple[Any, ...], tuple[str, ...]]] = {
    "W @ x": (lambda x, W: W @ x, ((2, 8, 3), (4, 8)), ("transpose", "linear", "transpose")),
    "heads out": (lambda x, W: torch.einsum("bsd,dhk->bshk", x, W), ((2, 3, 8), (8, 2, 4)), ("linear", "view")),
    "heads in": (lambda x, W: torch.einsum("bshk,hkd->bsd", x, W), ((2, 3, 2, 4), (2, 4, 8)), ("flatten", "linear")),
    "another order": (lambda x, W: torch.einsum("ibh,hnd->bnid", x, W), ((5, 2, 8), (8, 3, 4)), ("linear", "view", "permute")),
}


@pytest.mark.parametrize("spelling", MOVED)
def test_a_product_over_other_axes_becomes_a_linear_between_moves(spelling: str) -> None:
    fn, shapes, wanted = MOVED[spelling]
    becomes(graph_of(fn, *shapes), *wanted)


STAY: dict[str, tuple[Fn, tuple[Any, ...], str]] = {
    "two activations": (lambda x, y: x @ y, ((2, 3, 8), (8, 4)), "matmul"),
    "alpha": (lambda x, W, B: torch.addmm(B, x, W, alpha=2.0), ((3, 8), (8, 4), (4,)), "addmm"),
    "one matrix per batch": (lambda x, W: torch.bmm(x, W), ((2, 3, 8), (2, 8, 4)), "bmm"),
    "an einsum that keeps a shared axis": (lambda x, W: torch.einsum("bsd,sdn->bsn", x, W), ((2, 3, 8), (3, 8, 4)), "einsum"),
    "a bias that is an activation": (lambda x, W, y: F.linear(x, W) + y, ((2, 3, 8), (4, 8), (4,)), "add"),
    "a bias per row": (lambda x, W, B: F.linear(x, W) + B, ((2, 3, 8), (4, 8), (3, 1)), "add"),
    "views that mix the axes": (lambda x, W: F.linear(x.view(4, 12)[:, :8], W), ((2, 3, 8), (4, 8)), "view"),
}


@pytest.mark.parametrize("kind", STAY)
def test_what_is_no_linear_stays(kind: str) -> None:
    fn, shapes, op = STAY[kind]
    assert ops(stays(graph_of(fn, *shapes)))[op] == 1


def test_a_product_cast_up_for_accuracy_is_not_lowered_again() -> None:
    gm = graph_of(lambda x, W: x.float() @ W.float(), (3, 8), (8, 4), dtype=torch.bfloat16)
    (node,) = canonicalize(gm).graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert node.meta["val"].dtype == torch.float32


def test_symbolic_sizes_get_no_guard() -> None:
    class Conv1DLike(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(8, 4))
            self.bias = torch.nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], 4)
            return y * torch.rsqrt(mean_square(y) + 1e-6)

    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, values: list[Any]) -> Any:
        captured = tidy(capture(gm))
        shapes = captured.meta["fake_mode"].shape_env
        guards, values = len(shapes.guards), list(values)
        before = run(captured, values)
        canonicalize(captured)
        assert distance(before, run(captured, values)) < 1e-6
        assert len(shapes.guards) == guards
        graphs.append(captured)
        return gm.forward

    torch._dynamo.reset()
    x = torch.randn(3, 5, 8)
    for i in (0, 1):
        torch._dynamo.mark_dynamic(x, i)
    with torch.no_grad():
        torch.compile(Conv1DLike(), backend=backend)(x)
    (gm,) = graphs
    assert ops(gm)["linear"] == ops(gm)["rms_norm"] == 1 and not ops(gm)["addmm"] + ops(gm)["view"]


def test_every_product_of_a_weight_is_listed_with_its_kind() -> None:
    def fn(x: Tensor, y: Tensor, W: Tensor, V: Tensor, C: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, W), torch.bmm(y, V), F.conv1d(y, C), x @ x.transpose(-1, -2), F.embedding(torch.zeros(2).long(), W)

    gm = graph_of(fn, (2, 3, 8), (4, 3, 8), (5, 8), (4, 8, 6), (7, 3, 2))
    products = list(linear.parameter_products(gm))
    assert [kind for _, _, kind in products] == ["linear", "bmm", "convolution"]
    assert [weight for _, weight, _ in products] == list(gm.graph.find_nodes(op="placeholder"))[2:]


# ---- the other idioms -----------------------------------------------------------------------------------------------
Q, V = (2, 4, 5, 8), (2, 4, 6, 8)
ATTENTIONS: dict[str, tuple[Fn, tuple[Any, ...], float | None, bool]] = {
    "fused": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), (Q, V, V), None, False),
    "fused, scaled": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3), (Q, V, V), 0.3, False),
    "written out": (lambda q, k, v: torch.softmax(q @ k.mT * 0.3, -1) @ v, (Q, V, V), 0.3, False),
    "divided, masked": (lambda q, k, v, m: torch.softmax(q @ k.transpose(2, 3) / 4 + m, 3) @ v, (Q, V, V, (5, 6)), 0.25, True),
    "softmax in float32": (lambda q, k, v: F.softmax(q @ k.mT, -1, dtype=torch.float32).to(q.dtype) @ v, (Q, V, V), 1.0, False),
    "filled": (
        lambda q, k, v, m: torch.softmax((q @ k.mT * 0.5).masked_fill(m, -1e9), -1) @ v,
        (Q, V, V, torch.ones(5, 6, dtype=torch.bool)), 0.5, True,
    ),
    "one axis for batch and heads": (
        lambda q, k, v, m: torch.bmm((torch.baddbmm(m, q, k.mT, alpha=0.25).view(2, 4, 5, 6)).softmax(-1).view(8, 5, 6), v),
        ((8, 5, 8), (8, 6, 8), (8, 6, 8), (8, 5, 6)), 0.25, False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("spelling", ATTENTIONS)
def test_attention_is_recognised_with_its_scale_and_mask(spelling: str) -> None:
    fn, shapes, scale, masked = ATTENTIONS[spelling]
    gm = canonicalize(graph_of(fn, *shapes))
    (found,) = attention.attentions(gm)
    q, k, v = list(gm.graph.find_nodes(op="placeholder"))[:3]
    assert (found.q, found.k, found.v, found.node) == (q, k, v, result(gm))
    assert found.scale == pytest.approx(scale) if scale is not None else found.scale is None
    assert (found.mask is not None) == masked


def test_a_softmax_over_the_queries_is_no_attention() -> None:
    gm = graph_of(lambda q, k, v: torch.softmax(q @ k.mT, -2) @ v, Q, V, V)
    miss = attention.attention(result(gm))
    assert isinstance(miss, Miss) and "'dim' of" in miss.reason


ACTS: dict[str, Fn] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_quick": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "identity": lambda x: x,
}


@pytest.mark.parametrize("label", ACTS)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_a_gated_block_is_recognised_with_its_activation(label: str, bias: bool) -> None:
    def fn(x: Tensor, W: Tensor, V: Tensor, D: Tensor, B: Tensor) -> Tensor:
        return F.linear(ACTS[label](F.linear(x, W, B if bias else None)) * F.linear(x, V), D)

    gm = canonicalize(graph_of(fn, (2, 3, 8), (6, 8), (6, 8), (8, 6), (6,)))
    (match,) = mlp.gated_mlp.find(gm)
    assert match.taken == (label,) and (match.gate_bias is not None) == bias
    assert match.down_weight is list(gm.graph.find_nodes(op="placeholder"))[3]


def test_embeddings_know_the_head_that_is_tied_to_them() -> None:
    fn = lambda i, W, P: F.linear(F.embedding(i, W) + P[i], W)  # noqa: E731
    gm = canonicalize(graph_of(fn, torch.zeros(2, 3, dtype=torch.long), (9, 8), (9, 8)))
    tied, untied = embedding.embeddings(gm)
    assert (tied.heads, untied.heads) == ((result(gm),), ())


def test_a_residual_add_knows_its_stream() -> None:
    def fn(x: Tensor, W: Tensor, B: Tensor) -> Tensor:
        y = F.linear(F.layer_norm(x, [8], B), W) + x
        return y + F.relu(F.linear(y, W)) + 1

    gm = canonicalize(graph_of(fn, (2, 3, 8), (8, 8), (8,)))
    first, second = residual.residuals(gm)
    assert first.stream is next(iter(gm.graph.nodes)) and first.branch.target is torch.ops.aten.linear.default
    assert second.stream is first.node and second.branch.target is torch.ops.aten.relu.default


def test_split_and_fused_projections_are_told_apart() -> None:
    def fn(x: Tensor, W: Tensor, V: Tensor) -> tuple[Tensor, ...]:
        return (*F.linear(x, W).split(8, -1), F.linear(x, V) + 0.5, F.linear(x, V.neg()))

    gm = canonicalize(graph_of(fn, (2, 3, 8), (24, 8), (8, 8)))
    (split,), (fused,) = linear.split_linears(gm), linear.fused_linears(gm)
    assert len(split.linears) == 3 and len(fused.parts) == 3 and fused.linear is split.linears[0]


def parts_of(fn: Callable[..., Any], size: int) -> list[tuple[linear.Part | None, Tensor]]:
    """What is said of each result of ``fn`` that is no input, and the result itself: of numbers [3, size] that all differ."""
    x = torch.arange(3.0 * size).view(3, size)
    gm = graph_of(fn, tuple(x.shape))
    (results,) = gm.graph.output_node().args
    pairs = zip(results, gm(x), strict=True)  # type: ignore[arg-type]  # a tuple of nodes
    return [(linear.part_of(node), y) for node, y in pairs if node.op != "placeholder"]


@given(st.none() | st.integers(-12, 12), st.none() | st.integers(-12, 12), st.integers(1, 4), st.integers(1, 6), st.booleans())
def test_a_part_is_what_it_says_of_its_source(first: int | None, last: int | None, size: int, chunks: int, named: bool) -> None:
    def fn(x: Tensor) -> tuple[Tensor, ...]:
        axis = -1 if named else 1
        return (x[..., first:last], *x.split(size, axis), *x.chunk(chunks, axis), *x.split([2, 7], axis))

    for part, y in parts_of(fn, 9):
        assert part is not None and part.source.op == "placeholder"
        assert torch.equal(torch.arange(27.0).view(3, 9)[:, part.first : part.last], y)


def test_a_part_along_another_axis_or_in_steps_is_none() -> None:
    found = parts_of(lambda x: (x[1:], *x.split(2), *x.unbind(), *x.unbind(1), x[:, ::2], x[:, 1]), 9)
    assert len(found) == 1 + 2 + 3 + 9 + 2 and all(part is None for part, _ in found)


# ---- the pass -------------------------------------------------------------------------------------------------------
def both(x: Tensor, W: Tensor, B: Tensor) -> Tensor:
    return F.linear(torch.sigmoid(h := x @ W + B) * h, W) * torch.rsqrt(mean_square(x) + 1e-6)


def test_fuel_lets_the_first_rewrites_happen_and_no_more() -> None:
    fuel = Fuel()
    canonicalize(graph_of(both, (2, 3, 8), (8, 8), (8,)), fuel)
    assert len(fuel.log) >= 3
    for limit in range(len(fuel.log)):
        gm = graph_of(both, (2, 3, 8), (8, 8), (8,))
        values = values_of(gm)
        before = in_double(gm, values)
        some = Fuel(limit)
        canonicalize(gm, some)
        assert some.log == fuel.log[:limit]
        assert distance(before, in_double(gm, values)) < 1e-12


def test_the_canonical_form_is_a_fixpoint() -> None:
    gm = canonicalize(graph_of(both, (2, 3, 8), (8, 8), (8,)))
    again = Fuel()
    canonicalize(gm, again)
    assert again.log == []


def test_every_rewrite_has_a_name_of_its_own() -> None:
    assert len({rewrite.name for rewrite in CANONICAL}) == len(CANONICAL)


@pytest.mark.parametrize("written", ["twice", "a view", "read later"])
def test_an_op_stays_in_place_where_somebody_could_see_the_difference(written: str) -> None:
    def fn(x: Tensor) -> Any:
        y = torch.sin(x)
        v = y.view(-1)
        (v if written == "a view" else y).add_(1)
        return (y, v) if written != "twice" else (x.add_(1), v)

    gm = graph_of(fn, (3, 4))
    values = values_of(gm)
    before = run(copy.deepcopy(gm), values)
    assert ops(canonicalize(gm))["add_"] >= 1
    assert distance(before, run(gm, values)) == 0


# ---- whole models ---------------------------------------------------------------------------------------------------
def graphs_of(model: torch.nn.Module, inputs: dict[str, Any]) -> list[tuple[fx.GraphModule, list[Any]]]:
    found: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(gm: fx.GraphModule, values: list[Any]) -> Any:
        found.append((tidy(capture(gm)), list(values)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(**inputs)
    return found


TINY = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BODY = {**TINY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
COUNTS: dict[str, tuple[str, Any, str, dict[str, int]]] = {
    "Conv1D": ("GPT2LMHeadModel", {**TINY, "n_embd": 16, "n_layer": 1, "n_head": 2}, "eager",
               {"linear": 5, "layer_norm": 3, "gelu": 1, "addmm": 0, "tanh": 0}),
    "1 + gain, per head": ("Gemma3ForCausalLM", {**BODY, "num_key_value_heads": 1, "head_dim": 8}, "sdpa",
                           {"linear": 8, "rms_norm": 7, "gelu": 1, "rsqrt": 0, "type_as": 0}),
    "own layer norm": ("CohereForCausalLM", BODY, "eager", {"linear": 8, "layer_norm": 2, "var": 0, "rsqrt": 0}),
    "x @ W.T": ("FalconForCausalLM", {k: v for k, v in BODY.items() if k != "intermediate_size"}, "sdpa",
                {"linear": 5, "layer_norm": 2, "matmul": 0, "numpy_T": 0}),
}  # fmt: skip


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if i < 2 else pytest.mark.slow) for i, k in enumerate(COUNTS)])
def test_a_model_computes_the_same_with_the_expected_ops(kind: str) -> None:
    name, fields, how, counts = COUNTS[kind]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**fields)).eval()
    model.set_attn_implementation(how)
    ((gm, values),) = graphs_of(model, {"input_ids": torch.randint(3, 50, (2, 5))})
    before, exact = run(gm, values), in_double(gm, values)
    canonicalize(gm).graph.lint()
    assert {op: ops(gm)[op] for op in counts} == counts
    assert distance(before, run(gm, values)) < 1e-5
    assert distance(exact, in_double(gm, values)) < 1e-10
    assert len(list(attention.attentions(gm))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ZOO, ids=lambda a: a.name)
def test_every_model_of_the_zoo_computes_the_same(architecture: Architecture) -> None:
    for gm, values in graphs_of(*architecture.build()):
        before = run(gm, values)
        exact = in_double(gm, values)
        canonicalize(gm).graph.lint()
        assert distance(before, run(gm, values)) < 1e-5
        assert distance(exact, in_double(gm, values)) < 1e-10
