"""A CPU's products with a packed weight, as nodes: their arguments by name, and how the weights of several become one."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fxquant.graph.match import Miss
from fxquant.graph.tidy import value
from fxquant.patterns.linear import same_sizes

from .cpu import low_bit, ops

INPUTS = {ops.linear: 3, low_bit.linear_u8: 3, low_bit.linear_float: 1}
"""The ops, and how many of their arguments are the input: codes, scale and zero point, or floats."""


class Arguments(NamedTuple):
    """In the order of the op's schema, flat.

    ``weight`` is packed codes, scale, sums, and a bias or None; ``kind`` the bits and the group size of a low-bit weight.
    """

    input: tuple[Any, ...]
    weight: tuple[Any, ...]
    kind: tuple[Any, ...]
    out_features: int
    activation: str
    dtype: torch.dtype

    @classmethod
    def of(cls, product: fx.Node) -> "Arguments":
        first = INPUTS[product.target]
        *kind, out_features, activation, dtype = product.args[first + 4 :]
        return cls(product.args[:first], product.args[first : first + 4], tuple(kind), out_features, activation, dtype)  # type: ignore[arg-type]  # what the schema says

    @property
    def bias_dtype(self) -> torch.dtype | None:
        """Of the bias, if there is one."""
        return None if self.weight[3] is None else value(self.weight[3]).dtype


def joined(weights: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """One weight, with its bias, of several that are whole panels: their outputs one after another."""
    parts: Iterator[tuple[Any, ...]] = zip(*weights, strict=True)
    return [None if part[0] is None else torch.cat(part) for part in parts]


def gate_and_up(product: fx.Node, targets: Collection[Any]) -> tuple[fx.Node, fx.Node] | Miss:
    """The two linears of ``act(linear(x)) * linear(x)``, which ``product`` is; of ``targets``, and nobody else reads either."""
    gate, up = product.args
    for node in (gate, up):
        if not isinstance(node, fx.Node) or node.target not in targets or len(node.users) > 1:
            return Miss("'{}' is no product with a packed weight that only '{}' reads", product, 0, (node, product))
        if value(node).dtype is not value(product).dtype or not same_sizes(value(node).shape, value(product).shape):
            return Miss("'{}' is broadcast, or of another dtype than '{}'", node, 1, (node, product))
    assert isinstance(gate, fx.Node) and isinstance(up, fx.Node)
    if Arguments.of(up).activation != "none":
        gate, up = up, gate
    g, u = Arguments.of(gate), Arguments.of(up)
    if gate is up or u.activation != "none" or gate.target is not up.target or g.input != u.input:
        return Miss("'{}' and '{}' are no gate and what it lets through, of the same input", gate, 1, (gate, up))
    if g.kind != u.kind:
        return Miss("the weights of '{}' and '{}' have other bits and groups: {} and {}", gate, 2, (gate, up, g.kind, u.kind))
    if g.bias_dtype is not u.bias_dtype:
        return Miss("the biases of '{}' and '{}' are {} and {}", gate, 2, (gate, up, g.bias_dtype, u.bias_dtype))
    if g.out_features % ops.PANEL:
        return Miss("'{}' has {} outputs, no multiple of {}", gate, 2, (gate, g.out_features, ops.PANEL))
    return gate, up
