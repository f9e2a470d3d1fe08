"""One spelling per idiom (linear, layer_norm, rms_norm, gelu, silu): an ordered table of rewrites, applied to a fixpoint."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxquant.graph.effects import bases
from fxquant.graph.fuel import Fuel
from fxquant.graph.match import Match, Miss, Pattern
from fxquant.graph.rewrite import erase, splice
from fxquant.graph.tidy import tidy, value
from fxquant.graph.weights import depends_on_parameters_only

from . import linear, mlp, norm, patches

aten = torch.ops.aten


@dataclass(frozen=True)
class Rewrite:
    """Where ``pattern`` matches, put what ``meaning`` computes.

    The parameters of ``meaning`` are variables of the pattern, by name; ``dtype``, the type of the root; and ``inner``, the
    widest type that the pattern computes in.
    """

    pattern: Pattern
    meaning: Callable[..., Tensor]

    @property
    def name(self) -> str:
        """What the fuel log calls it."""
        return self.pattern.name

    @property
    def heads(self) -> frozenset[Any]:
        """The ops at which it may apply."""
        return self.pattern.heads

    def __call__(self, gm: fx.GraphModule, node: fx.Node, fuel: Fuel) -> fx.Node | Miss:
        """Rewrite at ``node``; the new node, or why not."""
        match = self.pattern.match(node)
        if not isinstance(match, Match):
            return match
        if not fuel.take(self.name):
            return Miss("the fuel is spent", node)
        types = {"dtype": value(node).dtype, "inner": functools.reduce(torch.promote_types, map(_dtype, match.covered))}
        given = [types[name] if name in types else match[name] for name in inspect.signature(self.meaning).parameters]
        return substitute(gm, node, self.meaning, *given, memo=self.name)


def _dtype(node: fx.Node) -> torch.dtype:
    x = value(node)  # a tuple for an op of several results, of which the first counts
    dtype: torch.dtype = (x if isinstance(x, Tensor) else x[0]).dtype
    return dtype


@dataclass(frozen=True)
class Rule:
    """A rewrite that no pattern can express: a function that rewrites at a node, or says why not."""

    apply: Callable[[fx.GraphModule, fx.Node, Fuel], fx.Node | Miss]
    heads: frozenset[Any]

    @property
    def name(self) -> str:
        """What the fuel log calls it."""
        return self.apply.__name__

    def __call__(self, gm: fx.GraphModule, node: fx.Node, fuel: Fuel) -> fx.Node | Miss:
        """Rewrite at ``node``; the new node, or why not."""
        return self.apply(gm, node, fuel)


def substitute(gm: fx.GraphModule, node: fx.Node, fn: Callable[..., Tensor], *args: Any, memo: str | None = None) -> fx.Node:
    """Put ``fn(*args)`` in the place of ``node``, in the dtype of ``node``; what nobody reads any more is erased.

    ``memo`` names ``fn`` where it holds nothing of its own, so that equal substitutions are traced once.
    """
    dtype = value(node).dtype

    def in_the_same_dtype(*given: Any) -> Tensor:
        result = fn(*given)
        return result if result.dtype == dtype else result.to(dtype)

    new: fx.Node = splice(gm, node, in_the_same_dtype, *args, memo=None if memo is None else (memo, dtype))
    new.meta.setdefault("nn_module_stack", node.meta.get("nn_module_stack"))  # whose product it is: rules may say so
    node.replace_all_uses_with(new)
    erase(gm, node)
    return new


def _in(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(t if t is None or t.dtype == dtype else t.to(dtype) for t in tensors)


# What each pattern becomes. Linears compute in the type that they gave. Norms and activations compute in the widest of the
# types that they read and gave: ATen's kernels keep float32 inside for half types, which is what the casts in the
# decomposed spellings are for. Only float64 inside is kept as it was.


def to_linear(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``x W`` -> ``linear(x, W^T)``."""
    x, weight = _in(dtype, x, weight)
    return F.linear(x, weight.t())


def to_linear_with_bias(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """``x W + b`` -> ``linear(x, W^T, b)``."""
    x, weight, bias = _in(dtype, x, weight, bias)
    return F.linear(x, weight.t(), bias if bias.dim() == 1 else bias.reshape(-1))


def to_linear_of_the_transpose(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``W x`` -> ``linear(x^T, W)^T``."""
    x, weight = _in(dtype, x, weight)
    return F.linear(x.transpose(-1, -2), weight).transpose(-1, -2)


def to_linear_of_one_matrix(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``x W[0]`` -> ``linear(x, W[0]^T)``."""
    x, weight = _in(dtype, x, weight)
    return F.linear(x, weight[0].t())


def to_linear_unflattened(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``view(linear(view(x), W, b))`` -> ``linear(x, W, b)``."""
    return F.linear(*_in(dtype, x, weight, bias))


def to_linear_with_merged_bias(x: Tensor, weight: Tensor, first: Tensor | None, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """``linear(x, W, b1) + b2`` -> ``linear(x, W, b1 + b2)``."""
    x, weight, first, bias = _in(dtype, x, weight, first, bias if bias.dim() == 1 else bias.reshape(-1))
    return F.linear(x, weight, bias if first is None else first + bias)


def to_rms_norm(x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype, inner: torch.dtype) -> Tensor:
    """``rms_norm(x, [D], weight, eps)``."""
    x, weight = _in(_widest(dtype, inner, x, weight), x, weight)
    return torch.rms_norm(x, x.shape[-1:], weight, eps)


def to_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype, inner: torch.dtype
) -> Tensor:
    """``layer_norm(x, [D], weight, bias, eps)``."""
    x, weight, bias = _in(_widest(dtype, inner, x, weight, bias), x, weight, bias)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def to_gelu(x: Tensor, dtype: torch.dtype, inner: torch.dtype) -> Tensor:
    """``gelu(x)``."""
    return F.gelu(x.to(_widest(dtype, inner, x)))


def to_gelu_tanh(x: Tensor, dtype: torch.dtype, inner: torch.dtype) -> Tensor:
    """``gelu(x, approximate="tanh")``."""
    return F.gelu(x.to(_widest(dtype, inner, x)), approximate="tanh")


def to_silu(x: Tensor, dtype: torch.dtype, inner: torch.dtype) -> Tensor:
    """``silu(x)``."""
    return F.silu(x.to(_widest(dtype, inner, x)))


def _widest(dtype: torch.dtype, inner: torch.dtype, *tensors: Tensor | None) -> torch.dtype:
    for tensor in tensors:
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    return inner if inner is torch.float64 else dtype


def einsum_to_linear(gm: fx.GraphModule, node: fx.Node, fuel: Fuel) -> fx.Node | Miss:
    """``einsum("bsd,dhk->bshk", x, W)`` -> ``unflatten(linear(x, W as [h k, d]))``, whatever the order of the axes."""
    found = linear.einsum(node)
    if not isinstance(found, linear.Einsum):
        return found
    if not fuel.take("einsum_to_linear"):
        return Miss("the fuel is spent", node)

    def meaning(x: Tensor, weight: Tensor) -> Tensor:
        x = _permute(x, found.x_axes, found.rest + found.inputs)
        weight = _permute(weight, found.weight_axes, found.outputs + found.inputs)
        outputs = weight.shape[: len(found.outputs)]
        x = x.flatten(-len(found.inputs)) if len(found.inputs) > 1 else x
        y = F.linear(x, weight if weight.dim() == 2 else weight.reshape(outputs.numel(), -1))
        y = y.view(*y.shape[:-1], *outputs) if len(outputs) > 1 else y
        return _permute(y, found.rest + found.outputs, found.result)

    return substitute(gm, node, meaning, found.x, found.weight)


def _permute(x: Tensor, axes: str, wanted: str) -> Tensor:
    return x if axes == wanted else x.permute([axes.index(a) for a in wanted])


def patches_to_linear(gm: fx.GraphModule, node: fx.Node, fuel: Fuel) -> fx.Node | Miss:
    """A convolution whose windows do not overlap -> a linear on patches."""
    found = patches.patches(node)
    if isinstance(found, Miss):
        return found
    if not depends_on_parameters_only(found.weight):
        return Miss("'{}' depends on more than parameters", found.weight, 1, (found.weight,))
    if not fuel.take("patches_to_linear"):
        return Miss("the fuel is spent", node)
    meaning = lambda x, weight, bias: patches.patches_to_linear(x, weight, bias, found.window)  # noqa: E731
    return substitute(gm, node, meaning, found.x, found.weight, found.bias)


def twice_transposed(gm: fx.GraphModule, node: fx.Node, fuel: Fuel) -> fx.Node | Miss:
    """``W^T^T`` -> ``W`` for a parameter."""
    once = linear.untransposed(node)
    source = linear.untransposed(once) if once is not None else None
    if source is None or not depends_on_parameters_only(source):
        return Miss("'{}' is not a parameter transposed twice", node, 0, (node,))
    if not fuel.take("twice_transposed"):
        return Miss("the fuel is spent", node)
    node.replace_all_uses_with(source)
    erase(gm, node)
    return source


def out_of_place(gm: fx.GraphModule, node: fx.Node, fuel: Fuel) -> fx.Node | Miss:
    """``x.add_(y)`` -> ``x + y`` when nobody can see the difference: ``x`` is a fresh value that nobody reads afterwards."""
    x = node.args[0]
    if not isinstance(x, fx.Node) or x.op != "call_function" or bases(x):
        return Miss("'{}', which '{}' writes to, is not a fresh value", node, 0, (x, node))
    for reader in x.users:
        if reader is not node and (reader > node or x in bases(reader)):
            return Miss("'{}', which '{}' writes to, is also read by '{}'", x, 1, (x, node, reader))
    if not fuel.take("out_of_place"):
        return Miss("the fuel is spent", node)
    plain = OUT_OF_PLACE[node.target]
    return substitute(gm, node, lambda args, kwargs: plain(*args, **kwargs), list(node.args), dict(node.kwargs))


OUT_OF_PLACE: dict[Any, Any] = {
    getattr(getattr(aten, f"{name}_"), overload): getattr(getattr(aten, name), overload)
    for name in ("add", "sub", "mul", "div", "relu", "silu", "gelu", "sigmoid", "tanh", "clamp", "masked_fill", "neg", "exp")
    for overload in getattr(aten, f"{name}_").overloads()
    if overload in getattr(aten, name).overloads()
}

# The order is the policy: at each node, readers before what they read, the first that applies.
CANONICAL: tuple[Rewrite | Rule, ...] = (
    Rule(out_of_place, frozenset(OUT_OF_PLACE)),
    Rule(twice_transposed, frozenset(linear.TRANSPOSES)),
    Rule(einsum_to_linear, frozenset({aten.einsum.default})),
    Rule(patches_to_linear, frozenset(patches.CONVOLUTIONS)),
    Rewrite(linear.product_plus_bias, to_linear_with_bias),
    Rewrite(linear.product, to_linear),
    Rewrite(linear.product_from_the_left, to_linear_of_the_transpose),
    Rewrite(linear.product_with_one_matrix, to_linear_of_one_matrix),
    Rewrite(linear.linear_between_views, to_linear_unflattened),
    Rewrite(linear.linear_then_bias, to_linear_with_merged_bias),
    Rewrite(norm.layer_norm, to_layer_norm),
    Rewrite(norm.native_layer_norm, to_layer_norm),
    Rewrite(norm.layer_norm_then_gain, to_layer_norm),
    Rewrite(norm.rms_norm, to_rms_norm),
    Rewrite(norm.rms_norm_then_gain, to_rms_norm),
    Rewrite(mlp.gelu_tanh, to_gelu_tanh),
    Rewrite(mlp.gelu_erf, to_gelu),
    Rewrite(mlp.silu, to_silu),
)


def canonicalize(gm: fx.GraphModule, fuel: Fuel | None = None) -> fx.GraphModule:
    """Rewrite ``gm`` in place until no rewrite of CANONICAL applies, or the fuel is spent: the same function in one spelling.

    ``y = addmm(b, x.view(-1, 8), W).view(2, 3, 4)`` becomes ``linear(x, W.t(), b)``. Ends with ``tidy``.
    """
    fuel = Fuel() if fuel is None else fuel
    tidy(gm)
    changed = True
    while changed:
        changed = False
        for node in reversed(list(gm.graph.nodes)):
            for rewrite in _by_head().get(node.target, ()):
                if node._erased:
                    break
                if rewrite(gm, node, fuel):
                    changed = True
                    break
    return tidy(gm)


@functools.cache
def _by_head() -> dict[Any, tuple[Rewrite | Rule, ...]]:
    heads = {op for rewrite in CANONICAL for op in rewrite.heads}
    return {op: tuple(r for r in CANONICAL if op in r.heads) for op in heads}
