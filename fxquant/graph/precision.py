"""The same graph in float64: explicit casts to lower floats become casts to float64, so that equality can be exact."""

import copy
from typing import Any

import torch
from torch import fx

LOWER = (torch.float32, torch.float16, torch.bfloat16)


def in_float64(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of ``gm`` that computes in float64 when its inputs are float64 (``double``).

    Every dtype argument that names a lower float is replaced, and every float constant is widened. Numbers stay as they are
    (a mask of ``-3.4e38`` is still that number). Fake values in the copy are stale: it is there to be run.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    wide = fx.GraphModule(gm, graph)
    for node in wide.graph.nodes:
        if node.op == "call_function":
            node.args = _widen(node.args)
            node.kwargs = _widen(node.kwargs)
            if node.target in DEFAULT_FLOAT and node.kwargs.get("dtype") is None and _was_float(node):
                node.kwargs = {**node.kwargs, "dtype": torch.float64}
        elif node.op == "get_attr":
            _widen_constant(wide, node.target)
    wide.recompile()
    return wide


def double(values: Any) -> Any:
    """Floating tensors of a list of inputs as float64 (real or not); everything else as it is."""
    return [v.detach().double() if isinstance(v, torch.Tensor) and v.dtype in LOWER else v for v in values]


# Factories whose dtype is torch's default when they name none.
DEFAULT_FLOAT = tuple(
    getattr(torch.ops.aten, name).default for name in ("zeros", "ones", "full", "empty", "rand", "randn", "linspace", "arange")
    if hasattr(getattr(torch.ops.aten, name), "default")
)


def _was_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype in LOWER


def _widen(arguments: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda a: torch.float64 if isinstance(a, torch.dtype) and a in LOWER else a, arguments)


def _widen_constant(gm: fx.GraphModule, target: Any) -> None:
    tensor = getattr(gm, target, None)
    if isinstance(tensor, torch.Tensor) and tensor.dtype in LOWER:
        delattr(gm, target)
        gm.register_buffer(target, copy.deepcopy(tensor).double(), persistent=False)
