"""What an attention mask says beyond what is always true: "all queries see the keys that are no padding" is the latter."""

from typing import Any

import torch
from torch import fx

from fxquant.graph.spelling import FAMILIES
from fxquant.graph.tidy import operand, value

aten = torch.ops.aten
_AND = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default)
_ONES = (aten.ones.default, aten.new_ones.default, aten.ones_like.default)
_VIEWS = (aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, aten.alias.default, aten.contiguous.default)


def essential_mask(mask: fx.Node) -> fx.Node:
    """The smallest part of a boolean ``mask`` that broadcasts to the same: without factors that are true everywhere.

    Queries are counted from 0, and "not below 0" is how a mask of all of them is spelled; such a mask is [B, 1, L, T], and
    what it says is [B, 1, 1, T].
    """
    while mask.target in _AND and value(mask).dtype is torch.bool:
        left, right = mask.args
        if isinstance(right, fx.Node) and value(right).dtype is torch.bool and _is_true(left):
            mask = right
        elif isinstance(left, fx.Node) and value(left).dtype is torch.bool and _is_true(right):
            mask = left
        else:
            break
    return mask


def _is_true(node: Any) -> bool:
    """True everywhere, whatever the inputs are."""
    if not isinstance(node, fx.Node):
        return node is True
    if node.target in _ONES:
        return True
    if node.target in _AND:
        return all(map(_is_true, node.args))
    if node.target is aten.ge.Scalar:
        return isinstance(node.args[1], int) and node.args[1] <= 0 and _is_not_negative(operand(node, 0))
    return _is_view(node) and _is_true(node.args[0])


def _is_not_negative(node: Any) -> bool:
    if not isinstance(node, fx.Node):
        return isinstance(node, int) and 0 <= node < 1 << 31
    if node.target is aten.arange.default:
        return True
    if node.target in (aten.arange.start, aten.arange.start_step):
        step = node.args[2] if len(node.args) > 2 else 1
        return _is_not_negative(node.args[0]) and isinstance(step, int) and step > 0
    if node.target is aten.add.Tensor:
        # 64 bits do not overflow here: counts of tokens, and small constants.
        return not node.kwargs and value(node).dtype is torch.int64 and all(map(_is_not_negative, node.args))
    return _is_view(node) and _is_not_negative(node.args[0])


def _is_view(node: fx.Node) -> bool:
    return node.target in _VIEWS or FAMILIES.get(node.target) == "view"
