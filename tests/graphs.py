"""Small graphs for tests: a Python function traced as a model is, its capital-letter arguments standing for parameters."""

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from fxquant.graph.capture import Parameter, trace
from fxquant.graph.precision import double, in_float64
from fxquant.graph.tidy import tidy

aten = torch.ops.aten


def graph_of(fn: Callable[..., Any], *shapes: Any, dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    """``fn`` traced on fake tensors; ``W``, ``B``, ... are parameters, ``x``, ``y``, ... inputs; a Tensor may be a shape."""
    mode = FakeTensorMode()
    values = [s if isinstance(s, Tensor) else torch.empty(s, dtype=dtype) for s in shapes]
    gm = trace(fn, [mode.from_tensor(v) for v in values], mode)
    for name, node in zip(inspect.signature(fn).parameters, gm.graph.find_nodes(op="placeholder"), strict=True):
        if name[0].isupper():
            node.meta["parameter"] = Parameter(name, "parameter")
    return tidy(gm)


def values_of(gm: fx.GraphModule, seed: int = 0) -> list[Tensor]:
    """Random inputs for ``gm``, as its fake values are shaped; integers below 4."""
    generator = torch.Generator().manual_seed(seed)
    fakes = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    return [
        torch.randn(f.shape, generator=generator).to(f.dtype)
        if f.dtype.is_floating_point
        else torch.randint(0, 2 if f.dtype is torch.bool else 4, f.shape, generator=generator).to(f.dtype)
        for f in fakes
    ]


def run(gm: fx.GraphModule, values: list[Any]) -> list[Tensor]:
    """The tensors that ``gm`` returns on copies of ``values``; a symbolic size stands for the number it was traced with."""
    copies = [v.clone() if isinstance(v, Tensor) else v.node.hint if isinstance(v, torch.SymInt) else v for v in values]
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(gm(*copies)) if isinstance(leaf, Tensor)]


def in_double(gm: fx.GraphModule, values: list[Any]) -> list[Tensor]:
    """The same in float64 throughout."""
    return run(in_float64(gm), double(values))


def distance(wanted: list[Tensor], got: list[Tensor]) -> float:
    """The largest relative error (2-norm) over pairs of tensors; infinite where shapes or types differ, NaN where one is."""
    if [(w.shape, w.dtype) for w in wanted] != [(g.shape, g.dtype) for g in got]:
        return float("inf")
    pairs = [(w.double(), g.double()) for w, g in zip(wanted, got, strict=True)]
    return float(torch.stack([(w - g).norm() / w.norm().clamp_min(1e-300) for w, g in pairs]).max())


def ops(gm: fx.GraphModule) -> Counter[str]:
    """How often each op occurs, by its short name."""
    names = [getattr(n.target, "overloadpacket", n.target) for n in gm.graph.nodes if n.op == "call_function"]
    return Counter(getattr(n, "__name__", str(n)) for n in names)


def result(gm: fx.GraphModule) -> fx.Node:
    """The node that ``gm`` returns."""
    (node,) = gm.graph.output_node().all_input_nodes
    return node
