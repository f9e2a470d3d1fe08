"""Dynamo's graph becomes one pre-dispatch ATen graph with named parameters, under Dynamo's own fake values."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._functorch.predispatch import _vmap_increment_nesting
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ..errors import CaptureError

_STEP = re.compile(r"\.(\w+)|\['?([^'\]]+)'?\]")
_OF_A_MODULE = ("_modules", "_parameters", "_buffers")


@dataclass(frozen=True)
class Parameter:
    """What a placeholder stands for when it is a parameter or a buffer of the user's module.

    ``path`` is the dotted name below the module that was compiled (under regional compile that is the layer, not the model);
    it begins with the name of a module that a plain function holds.
    """

    path: str
    kind: str  # "parameter" or "buffer"

    @staticmethod
    def of(node: fx.Node) -> "Parameter | None":
        """The parameter that a placeholder stands for, or None (an input, a size, any other node)."""
        return node.meta.get("parameter")


def read_source(source: str) -> Parameter | None:
    """Dynamo's source text of a placeholder, read as a parameter name.

    >>> read_source("L['self']._modules['encoder']._modules['0']._parameters['weight']")
    Parameter(path='encoder.0.weight', kind='parameter')
    """
    kind = "parameter" if "._parameters[" in source else "buffer"
    if kind == "buffer" and "._buffers[" not in source:
        return None
    steps = [attribute or key for attribute, key in _STEP.findall(source)]
    below = steps[1:] if steps[:1] == ["self"] else steps
    return Parameter(".".join(step for step in below if step not in _OF_A_MODULE), kind)


def fake_mode_of(gm: fx.GraphModule) -> FakeTensorMode:
    """The fake mode under which ``gm`` was captured; new nodes must get their values under it."""
    mode = gm.meta.get("fake_mode")
    if not isinstance(mode, FakeTensorMode):
        raise CaptureError(
            "this graph was not made by capture(): it carries no fake mode; capture it, or set gm.meta['fake_mode'] to that of "
            "its fake values"
        )
    return mode


def trace(fn: Callable[..., Any], values: Sequence[Any], mode: FakeTensorMode, *, pre_dispatch: bool = True) -> fx.GraphModule:
    """Trace ``fn`` on fake ``values`` into pre-dispatch ATen: the one tracer of the house (models, patterns and rewrites)."""
    with mode, torch.no_grad(), torch.fx.traceback.preserve_node_meta():
        gm = make_fx(fn, pre_dispatch=pre_dispatch, _allow_non_fake_inputs=True)(*values)
    gm.meta["fake_mode"] = mode
    return gm


def capture(gm: fx.GraphModule) -> fx.GraphModule:
    """Dynamo's ``gm`` (as handed to a backend) as a pre-dispatch ATen graph with the same inputs in the same order.

    Every node has ``meta["val"]`` (a fake value); a placeholder that is a parameter or a buffer has ``Parameter.of(node)``.
    """
    given = [node for node in gm.graph.nodes if node.op == "placeholder"]
    values = [node.meta["example_value"] for node in given]
    for node, fake in zip(given, values, strict=True):
        if isinstance(fake, torch.Tensor) and fake.device.type == "meta":
            raise CaptureError(
                f"input '{node.name}' is on the meta device and holds no data; load the weights before the first call"
            )
    # Under vmap (associative scans are made of it) tensors are unwrapped below the pre-dispatch mode, which then loses them.
    has_vmap = any(node.target is _vmap_increment_nesting for node in gm.graph.nodes)
    captured = trace(lambda *args: _Inlining(gm).run(*args), values, _mode_of(values, gm), pre_dispatch=not has_vmap)
    for old, new in zip(given, captured.graph.find_nodes(op="placeholder"), strict=True):
        argument = old.meta.get("grapharg")
        source = getattr(argument, "source", None)
        new.meta["dynamo_name"] = old.name
        if source is not None and (parameter := read_source(source.name)):
            new.meta["parameter"] = parameter
    return captured


class _Inlining(fx.Interpreter):
    """Runs a graph; what gradients alone need (checkpoints) is called through, what needs gradients is refused."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.higher_order.tag_activation_checkpoint:
            return args[0](*args[1:])
        if getattr(target, "__name__", "") == "_grad_increment_nesting":
            raise CaptureError("the model takes gradients in its forward pass; rounded weights have none: leave it uncompiled")
        return super().call_function(target, args, kwargs)


def has_tensors(gm: fx.GraphModule) -> bool:
    """False for Dynamo's graph of sizes alone, as may lie between two graph breaks: there is nothing in it to capture."""
    return any(isinstance(value, FakeTensor) for value in _values(gm))


def _values(gm: fx.GraphModule) -> Iterator[Any]:
    return (node.meta.get("example_value") for node in gm.graph.nodes)


def _mode_of(values: Sequence[Any], gm: fx.GraphModule) -> FakeTensorMode:
    for value in (*values, *_values(gm)):
        if isinstance(value, FakeTensor):
            return value.fake_mode
    raise CaptureError("the graph holds no tensor, so there is nothing to capture; ask has_tensors(gm) first")
