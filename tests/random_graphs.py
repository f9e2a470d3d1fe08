"""Random small transformers for tests: Python functions of named parameters, traced as models are, with trained-like gains."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fxquant.graph.capture import Parameter, trace
from fxquant.graph.equivalence import site_name
from fxquant.graph.tidy import tidy

aten = torch.ops.aten
TOLERANCE = 1e-10
GAINS = ("plain", "negative", "near zero", "mostly zero")

Model = Callable[[Callable[..., Tensor], Tensor], Any]  # model(p, x): p("up.weight", 16, 8) is that parameter


@dataclass
class Graph:
    """A traced model, and inputs to run it on: its parameters, then ``x``."""

    gm: fx.GraphModule = field(repr=False)
    inputs: list[Tensor] = field(repr=False)

    def run(self) -> list[Tensor]:
        """The outputs, as a list."""
        self.gm.graph.lint()
        self.gm.recompile()
        result = self.gm(*self.inputs)
        return list(result) if isinstance(result, (tuple, list)) else [result]

    def node(self, op: Any, number: int = 0) -> fx.Node:
        """The ``number``-th node that calls ``op``."""
        return self.gm.graph.find_nodes(op="call_function", target=op)[number]

    def count(self, op: Any) -> int:
        """How many nodes call ``op``."""
        return len(self.gm.graph.find_nodes(op="call_function", target=op))


def graph_of(model: Model, x: Tensor, *, seed: int = 0, gain: str = "plain", symbolic: bool = False) -> Graph:
    """``model`` traced in the dtype of ``x``, with random parameters; with ``symbolic`` the first axis of ``x`` is a SymInt."""
    traced, shapes = _traced(model, x.shape, x.dtype, symbolic)
    copy = fx.Graph()
    copy.output(copy.graph_copy(traced.graph, {}))
    gm = fx.GraphModule(traced, copy)
    gm.meta.update(traced.meta)
    return Graph(gm, [*_parameters(shapes, seed, gain, x.dtype), x])


Sizes = dict[str, tuple[int, ...]]


@lru_cache(200)
def _traced(model: Model, shape: torch.Size, dtype: torch.dtype, symbolic: bool) -> tuple[fx.GraphModule, Sizes]:
    shapes: Sizes = {}

    def asked(name: str, *sizes: int) -> Tensor:
        shapes[name] = sizes
        return torch.zeros(sizes, dtype=dtype)

    model(asked, torch.zeros(shape, dtype=dtype))
    mode = FakeTensorMode(shape_env=ShapeEnv())
    values = [mode.from_tensor(torch.empty(sizes, dtype=dtype), static_shapes=True) for sizes in shapes.values()]
    sizes = [DimDynamic.DYNAMIC if symbolic else DimDynamic.STATIC, *[DimDynamic.STATIC] * (len(shape) - 1)]
    context, source = StatelessSymbolicContext(sizes), ConstantSource("x")
    values.append(mode.from_tensor(torch.empty(shape, dtype=dtype), symbolic_context=context, source=source))

    def function(*args: Tensor) -> Any:
        given = dict(zip(shapes, args, strict=False))
        return model(lambda name, *sizes: given[name], args[-1])

    gm = trace(function, values, mode)
    for name, node in zip(shapes, gm.graph.find_nodes(op="placeholder"), strict=False):
        node.meta["parameter"] = Parameter(name, "parameter")
    gm.meta["fxquant_traces"] = {}  # what splice remembers, shared by the copies
    return tidy(gm), shapes


def _parameters(shapes: Sizes, seed: int, gain: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(sizes, generator=generator, dtype=torch.float64) for name, sizes in shapes.items()}
    return [(_trained(v, gain) if name.endswith("gain") else v).to(dtype) for name, v in values.items()]


def _trained(value: Tensor, how: str) -> Tensor:
    """A gain with one outlier, and signs and zeros as asked."""
    gain = 1 + 0.3 * value.abs()
    gain[-1] *= 30
    if how == "negative":
        gain[::2] *= -1
    if how == "near zero":
        gain[0], gain[1] = 1e-9, -1e-7
    if how == "mostly zero":
        gain[: len(gain) // 2 + 1] = 0
    return gain


def relative_error(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest deviation of any output, relative to that output's largest entry; infinite where shapes or types differ.

    NaN if there is one in either, which is not below any tolerance (``max`` of Python would pass over it).
    """
    if [(a.shape, a.dtype) for a in before] != [(b.shape, b.dtype) for b in after]:
        return float("inf")
    errors = [(a - b).abs().max() / a.abs().max().clamp_min(1e-30) for a, b in zip(before, after, strict=True)]
    return float(torch.stack([error.double() for error in errors]).max())


def absmax_of_linear_inputs(graph: Graph) -> dict[str, Tensor]:
    """What a calibration would measure: ``max|X_j|`` of every linear's input, by the path of its weight."""
    found: dict[str, Tensor] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n.target is aten.linear.default:
                x = self.env[n.args[0]]
                found.setdefault(site_name(n), x.abs().reshape(-1, x.shape[-1]).amax(0))
            return super().run_node(n)

    Watch(graph.gm).run(*graph.inputs)
    return found


# ---- transformers of one or two blocks


@dataclass(frozen=True)
class Shape:
    """What a random transformer looks like: ``heads`` key-value heads of 4 channels, each shared by ``groups`` query heads."""

    heads: int = 2
    groups: int = 1
    rms: bool = False
    eps: float = 1e-6
    bias: bool = True
    activation: str = "gelu"
    gated: bool = False
    transposed: bool = False  # weights stored [in, out], as Conv1D does
    fused: bool = False  # one projection for queries, keys and values
    eager: bool = False  # attention spelled out

    @property
    def width(self) -> int:
        return 4 * self.heads * self.groups


# Every choice at least once, few enough that a test traces each but once.
SHAPES = (
    Shape(),
    Shape(heads=1, bias=False, activation="relu"),
    Shape(groups=2, rms=True, gated=True, activation="silu", eps=1e-5),
    Shape(groups=2, fused=True, transposed=True, eps=1e-12),
    Shape(groups=2, rms=True, eager=True, activation="relu", eps=1e-3),
    Shape(heads=3, eager=True, bias=False, gated=True, activation="relu"),
    Shape(rms=True, fused=True, eager=True, activation="silu", transposed=True),
)
any_shapes = st.builds(
    Shape,
    heads=st.sampled_from([2, 1, 3]),
    groups=st.sampled_from([1, 2]),
    rms=st.booleans(),
    eps=st.sampled_from([1e-6, 1e-12, 1e-5, 1e-3]),
    bias=st.booleans(),
    activation=st.sampled_from(["gelu", "relu", "silu"]),
    gated=st.booleans(),
    transposed=st.booleans(),
    fused=st.booleans(),
    eager=st.booleans(),
)


@dataclass(frozen=True)
class Blocks:
    """The pieces of a transformer."""

    p: Callable[..., Tensor]
    shape: Shape

    def norm(self, x: Tensor, name: str) -> Tensor:
        d, s = self.shape.width, self.shape
        if s.rms:
            return F.rms_norm(x, (d,), self.p(f"{name}.gain", d), s.eps)
        return F.layer_norm(x, (d,), self.p(f"{name}.gain", d), self.p(f"{name}.bias", d) if s.bias else None, s.eps)

    def linear(self, x: Tensor, name: str, outputs: int) -> Tensor:
        inputs = x.shape[-1]
        bias = self.p(f"{name}.bias", outputs) if self.shape.bias else None
        if self.shape.transposed:
            return F.linear(x, self.p(f"{name}.weight", inputs, outputs).t(), bias)
        return F.linear(x, self.p(f"{name}.weight", outputs, inputs), bias)

    def attention(self, x: Tensor, name: str, memory: Tensor | None = None) -> Tensor:
        s, source = self.shape, x if memory is None else memory
        queries, keys = s.heads * s.groups * 4, s.heads * 4
        if s.fused and memory is None:
            q, k, v = self.linear(x, f"{name}.qkv", queries + 2 * keys).split([queries, keys, keys], -1)
        else:
            q = self.linear(x, f"{name}.q", queries)
            k, v = self.linear(source, f"{name}.k", keys), self.linear(source, f"{name}.v", keys)
        q, k, v = (t.view(t.shape[0], -1, t.shape[-1] // 4, 4).transpose(1, 2) for t in (q, k, v))
        if s.eager:
            k, v = (t[:, :, None].expand(-1, -1, s.groups, -1, -1).reshape(t.shape[0], -1, t.shape[2], 4) for t in (k, v))
            out = (q @ k.transpose(2, 3) * 0.5).softmax(-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, enable_gqa=s.groups > 1)
        return self.linear(out.transpose(1, 2).reshape(x.shape[0], -1, queries), f"{name}.o", s.width)

    def mlp(self, x: Tensor, name: str) -> Tensor:
        s = self.shape
        act = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}[s.activation]
        up = self.linear(x, f"{name}.up", 2 * s.width)
        hidden = act(self.linear(x, f"{name}.gate", 2 * s.width)) * up if s.gated else act(up)
        return self.linear(hidden, f"{name}.down", s.width)


def post_norm(b: Blocks, x: Tensor) -> Any:
    y = b.norm(x, "embeddings")
    y = b.norm(y + b.attention(y, "attention"), "norm1")
    y = b.norm(b.mlp(y, "mlp") + y, "norm2")
    return y, torch.tanh(b.linear(y[:, 0], "pooler", 3))


def pre_norm(b: Blocks, x: Tensor) -> Any:
    x = x + b.attention(b.norm(x, "norm1"), "attention")
    x = x + b.mlp(b.norm(x, "norm2"), "mlp")
    return b.linear(b.norm(x, "norm"), "head", 5)


def parallel(b: Blocks, x: Tensor) -> Any:
    y = b.norm(x, "norm1")
    return x + b.attention(y, "attention") + b.mlp(y, "mlp")


def cross(b: Blocks, x: Tensor) -> Any:
    memory, y = b.norm(x, "memory"), x[:, :2]
    for i in range(2):
        y = y + b.attention(b.norm(y, f"{i}.norm"), f"{i}.cross", memory)
    return y, memory


def second_readers(b: Blocks, x: Tensor) -> Any:
    y = b.norm(x, "norm")
    return b.linear(y, "up", 5), F.gelu(y), y.mean(1), torch.cat([y, x], -1), y[:, 1:].softmax(-1)


def tied(b: Blocks, x: Tensor) -> Any:
    table = b.p("table.weight", 7, b.shape.width)
    x = x + F.embedding((x[..., 0] > 0).long(), table)
    return F.linear(b.norm(x + b.mlp(b.norm(x, "norm1"), "mlp"), "norm"), table)


ARCHITECTURES = (pre_norm, post_norm, parallel, cross, second_readers, tied)


@dataclass(frozen=True)
class Transformer:
    """A model that can be traced once for all seeds: it is equal when it is built alike."""

    build: Callable[[Blocks, Tensor], Any]
    shape: Shape = Shape()

    def __call__(self, p: Callable[..., Tensor], x: Tensor) -> Any:
        return self.build(Blocks(p, self.shape), x)

    def graph(self, *, seed: int = 0, gain: str = "plain", symbolic: bool = False) -> Graph:
        """Traced in float64 on ``[2, 3, width]``."""
        x = torch.randn(2, 3, self.shape.width, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
        return graph_of(self, x, seed=seed, gain=gain, symbolic=symbolic)


transformers = st.builds(Transformer, st.sampled_from(ARCHITECTURES), st.sampled_from(SHAPES))
any_transformers = st.builds(Transformer, st.sampled_from(ARCHITECTURES), any_shapes)


def graphs_of(transformers: st.SearchStrategy[Transformer]) -> st.SearchStrategy[Graph]:
    """Small transformers with random weights, their batch sometimes a SymInt."""
    weights = {"seed": st.integers(0, 99), "gain": st.sampled_from(GAINS)}
    return st.builds(Transformer.graph, transformers, symbolic=st.booleans(), **weights)


graphs = graphs_of(transformers)
