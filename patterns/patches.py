"""Patch embedding: a convolution whose windows do not overlap is a linear layer on patches."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxquant.graph.match import Miss
from fxquant.graph.tidy import value

aten = torch.ops.aten
CONVOLUTIONS = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3} | {
    aten.conv1d.padding: 1, aten.conv2d.padding: 2, aten.conv3d.padding: 3
}  # fmt: skip


@dataclass(frozen=True)
class Patches:
    """A convolution over patches.

    ``x`` [B, C, n1 p1, ...], ``weight`` [N, C, p1, ...], ``bias`` [N] or None, ``window`` (p1, ...).
    """

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    window: tuple[int, ...]


def patches(node: fx.Node) -> Patches | Miss:
    """Read ``node`` as a convolution over patches, or say why it is none."""
    if node.target not in CONVOLUTIONS:
        return Miss("'{}' is no convolution", node, 0, (node,))
    axes = CONVOLUTIONS[node.target]
    x, weight, bias, stride, padding, dilation, groups = _arguments(node, axes)
    window = tuple(value(weight).shape[2:])
    sizes = value(x).shape[2:]
    if tuple(stride) != window:
        return Miss("the stride of '{}' is {} and its window {}, equal ones are needed", node, 1, (node, stride, window))
    if padding not in ("valid", (0,) * axes) or any(d != 1 for d in dilation) or groups != 1:
        return Miss("'{}' is padded, dilated or grouped", node, 1, (node,))
    if value(x).ndim != axes + 2 or not all(isinstance(s, int) and s % p == 0 for s, p in zip(sizes, window, strict=True)):
        return Miss("the sizes {} of '{}' are not fixed multiples of the window {}", node, 1, (list(sizes), x, window))
    return Patches(x, weight, bias, window)


def patches_to_linear(x: Tensor, weight: Tensor, bias: Tensor | None, window: tuple[int, ...]) -> Tensor:
    """``conv(x, W, b, stride=window)`` -> ``linear(patches of x, W as [N, C p1 ...], b)``, the channels back in place."""
    axes = len(window)
    counts = [x.shape[2 + i] // window[i] for i in range(axes)]
    x = x.reshape(x.shape[0], x.shape[1], *(size for pair in zip(counts, window, strict=True) for size in pair))
    x = x.permute(0, *range(2, 2 * axes + 2, 2), 1, *range(3, 2 * axes + 3, 2))  # [B, n1, ..., C, p1, ...]
    y = F.linear(x.flatten(axes + 1), weight.flatten(1), bias)
    return y.permute(0, axes + 1, *range(1, axes + 1))


def _arguments(node: fx.Node, axes: int) -> tuple[Any, ...]:
    default: list[Any] = [None, None, None, [1] * axes, [0] * axes, [1] * axes, 1]
    if isinstance(node.target, torch._ops.OpOverload) and node.target._overloadname == "padding":
        default[4] = "valid"
    given: list[Any] = [*node.args, *default[len(node.args) :]]
    x, weight, bias, stride, padding, dilation, groups = given

    def each(sizes: Any) -> Any:
        return sizes if isinstance(sizes, str) else tuple(sizes) * (axes if len(sizes) == 1 else 1)

    return x, weight, bias, each(stride), each(padding), each(dilation), groups
