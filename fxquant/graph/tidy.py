"""Remove what does nothing: aliases, casts to the same dtype, dropout at inference, slices of everything."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..errors import CaptureError
from .effects import family

aten = torch.ops.aten


def tidy(gm: fx.GraphModule) -> fx.GraphModule:
    """Drop every node whose value is its first argument, and every pure node that nobody reads; in place.

    Patterns and models go through this same function, so both are spelled alike.
    Raises CaptureError for a graph in training mode (an active dropout or batch norm).
    """
    writes = any(is_impure(node) for node in gm.graph.nodes if node.op == "call_function")
    for node in list(gm.graph.nodes):
        if node.target is torch._C._set_grad_enabled:
            gm.graph.erase_node(node)
            continue
        _refuse_training(node)
        rule = IDENTITIES.get(node.target)
        if rule is not None and rule(node) and (node.target not in FRESH or not (writes or _tells_apart(node))):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code(is_impure_node=is_impure)
    gm.recompile()
    return gm


def views_that_may_copy(gm: fx.GraphModule) -> fx.GraphModule:
    """``view`` -> ``reshape``, in place: a rewritten value may have other strides than the model's own had."""
    if not any(is_impure(node) for node in gm.graph.nodes if node.op == "call_function"):
        for node in gm.graph.find_nodes(op="call_function", target=aten.view.default):
            node.target = aten.reshape.default
    return gm


def is_impure(node: fx.Node) -> bool:
    """True for a node that must stay even if nobody reads it: inputs, outputs, and ops that write to their arguments."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    return node.is_impure()


def value(node: Any) -> Any:
    """The fake value of a node; anything else is its own value."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def operand(node: fx.Node, i: int) -> fx.Node:
    """The argument ``i`` of ``node``, which is a node by the schema of its op or by what was checked before."""
    argument = node.args[i]
    assert isinstance(argument, fx.Node), f"argument {i} of '{node.name}' is {argument!r}, a node is needed"
    return argument


def _refuse_training(node: fx.Node) -> None:
    if _is_training(node):
        name = str(node.target).removeprefix("aten.")
        raise CaptureError(
            f"{name} at '{node.name}' is in training mode, and an inference recipe has no gradients; call model.eval() first, "
            "or train the model uncompiled (quantization-aware training will be fxquant.prepare_qat_)"
        )


def _is_training(node: fx.Node) -> bool:
    """A dropout that drops something, or a norm that looks at the batch."""
    if node.target in DROPOUTS:
        return bool(node.args[2] and node.args[1] != 0)
    if node.target is aten.batch_norm.default:
        return bool(node.args[5])
    if node.target is aten.scaled_dot_product_attention.default:
        return bool(node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0))
    return False


def _same_type(node: fx.Node) -> bool:
    """The cast changes neither dtype nor device, and does not ask for a copy."""
    x, y = value(node.args[0]), value(node)
    asked_copy = node.kwargs.get("copy", False) or any(a is True for a in node.args[1:])
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return False
    return x.dtype == y.dtype and x.device == y.device and not asked_copy


def _same_shape(node: fx.Node) -> bool:
    x, y = value(node.args[0]), value(node)
    return isinstance(x, torch.Tensor) and _known_equal(list(x.shape), list(y.shape))


def _known_equal(a: list[Any], b: list[Any]) -> bool:
    """Equal without adding a guard on a symbolic size."""
    if len(a) != len(b):
        return False

    def equal(m: Any, n: Any) -> bool:
        return m is n or (isinstance(m, int) and isinstance(n, int) and m == n) or str(m) == str(n)

    return all(map(equal, a, b))


def _adds_zero(node: fx.Node) -> bool:
    return type(node.args[1]) is int and node.args[1] == 0 and not node.kwargs and _same_type(node)


def _multiplies_by_one(node: fx.Node) -> bool:
    return isinstance(node.args[1], int | float | complex) and node.args[1] == 1 and not node.kwargs and _same_type(node)


def _always(node: fx.Node) -> bool:
    return True


DROPOUTS = (
    aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default, aten.feature_alpha_dropout.default,
)  # fmt: skip

# What each op must satisfy to be the identity on its first argument.
IDENTITIES: dict[Any, Callable[[fx.Node], bool]] = {
    aten.alias.default: _always,
    aten.detach.default: _always,
    aten.detach_.default: _always,
    **dict.fromkeys(DROPOUTS, lambda node: not _is_training(node)),
    aten.to.dtype: _same_type,
    aten.to.dtype_layout: _same_type,
    aten.to.device: _same_type,
    aten.to.other: _same_type,
    aten.type_as.default: _same_type,
    aten.slice.Tensor: _same_shape,
    aten.expand.default: _same_shape,
    aten.view.default: _same_shape,
    aten.reshape.default: _same_shape,
    aten.add.Tensor: _adds_zero,
    aten.mul.Tensor: _multiplies_by_one,
}

# Those that make a new tensor all the same: dropped only where nobody can tell it from its source.
FRESH = (aten.add.Tensor, aten.mul.Tensor, *DROPOUTS)


def _tells_apart(node: fx.Node) -> bool:
    """The user gets ``node`` or a view of it, and its source is somebody else's, or returned too: a write to one would show."""
    own, sources = family(node), family(operand(node, 0))
    if not own.isdisjoint(sources) or not any(map(_is_returned, own)):
        return False
    return any(n.op in ("placeholder", "get_attr") or _is_returned(n) for n in sources)


def _is_returned(node: fx.Node) -> bool:
    return any(user.op == "output" for user in node.users)
