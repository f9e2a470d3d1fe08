"""Products of an activation with a parameter: ``x W^T + b`` in all its spellings, and every other matrix product of weights."""

import operator
from collections.abc import Iterator
from string import ascii_uppercase
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxquant.graph.match import Match, Miss, one_of, pattern
from fxquant.graph.spelling import is_float_cast, permutation_of
from fxquant.graph.tidy import value
from fxquant.graph.weights import depends_on_parameters_only, parameter_only

aten = torch.ops.aten


def same_sizes(a: Any, b: Any) -> bool:
    """Two shapes are equal as they are written, symbols included; no guard is added.

    >>> same_sizes([2, 3], (2, 3)), same_sizes([2], [2, 1])
    (True, False)
    """
    return len(a) == len(b) and all(_expression(m) == _expression(n) for m, n in zip(a, b, strict=True))


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def is_fixed(sizes: Any) -> bool:
    """No size is symbolic."""
    return all(isinstance(s, int) for s in sizes)


def _cast(match: Match) -> Miss | None:
    """Nothing is cast between the operands and the result: a product's own type is part of its meaning."""
    cast = next(filter(is_float_cast, match.covered), None)
    if cast is None:
        return None
    return Miss("'{}' is cast at '{}', between the operands and the result", match.root, 0, (match.root, cast))


def _matrix(match: Match) -> Miss | None:
    """``weight`` is a matrix that depends on parameters only, and ``x`` is not such."""
    weight = match.weight
    shape = value(weight).shape
    if len(shape) != 2 or not is_fixed(shape):
        return Miss("the weight '{}' has the shape {}, a fixed matrix is needed", weight, 0, (weight, list(shape)))
    if not depends_on_parameters_only(weight):
        return Miss("'{}' depends on more than parameters", weight, 0, (weight,))
    if (cast := _cast(match)) is not None:
        return cast
    if not value(match.x).dtype.is_floating_point:
        return Miss("'{}' is {}, a floating type is needed", match.x, 0, (match.x, value(match.x).dtype))
    if match.bindings.get("bias") is not None:
        return _addend(match)
    return None


def _addend(match: Match) -> Miss | None:
    """``bias`` is a parameter vector over the outputs, perhaps with leading ones."""
    bias, outputs = match.bias, value(match.root).shape[-1]
    shape = tuple(value(bias).shape)
    leading_ones = all(s == 1 for s in shape[:-1]) and len(shape) <= value(match.root).dim()
    if not isinstance(outputs, int) or shape[-1:] != (outputs,) or not leading_ones:
        return Miss("the bias '{}' has the shape {}, [{}] is needed", bias, 0, (bias, list(shape), outputs))
    if not depends_on_parameters_only(bias):
        return Miss("the bias '{}' depends on more than parameters", bias, 0, (bias,))
    return None


def _addmm(match: Match) -> Miss | None:
    if (match.alpha, match.beta) != (1, 1):
        details = (match.root, match.beta, match.alpha)
        return Miss("'{}' has beta = {} and alpha = {}, 1 and 1 are needed", match.root, 0, details)
    return _matrix(match)


@pattern(_matrix, x=(2, 8), weight=(8, 4))
def product(x: Tensor, weight: Tensor) -> Tensor:
    """``x W`` for a parameter ``W`` of shape ``[inputs, outputs]``: mm, matmul, ``@``."""
    return torch.matmul(x, weight)


@pattern(_addmm, x=(2, 8), weight=(8, 4), bias=(4,))
def product_plus_bias(x: Tensor, weight: Tensor, bias: Tensor, alpha: float, beta: float) -> Tensor:
    """``x W + b`` in one op, as Conv1D spells it."""
    return torch.addmm(bias, x, weight, beta=beta, alpha=alpha)


def _left(match: Match) -> Miss | None:
    if value(match.x).dim() < 2:
        return Miss("'{}' is a vector, a matrix is needed", match.x, 0, (match.x,))
    if depends_on_parameters_only(match.x):
        return Miss("both operands of '{}' are parameters", match.root, 0, (match.root,))
    return _matrix(match)


@pattern(_left, x=(3, 8, 5), weight=(4, 8))
def product_from_the_left(x: Tensor, weight: Tensor) -> Tensor:
    """``W x`` for a parameter ``W`` of shape ``[outputs, inputs]``."""
    return torch.matmul(weight, x)


def _flat(match: Match) -> Miss | None:
    """Both views change the leading axes only, and together they change nothing."""
    if (cast := _cast(match)) is not None:
        return cast
    x, flat, result = value(match.x), value(match.root.args[0]), value(match.root)
    inputs = x.shape[-1:]
    if value(match.weight).dim() != 2 or not same_sizes(inputs, value(match.weight).shape[1:]):
        return Miss("the view before the linear at '{}' changes the last axis of '{}'", match.root, 0, (match.root, match.x))
    if not same_sizes(result.shape, [*x.shape[:-1], *flat.shape[-1:]]):
        details = (match.root, list(result.shape), match.x)
        return Miss("the view '{}' gives {}, not the leading axes of '{}'", match.root, 0, details)
    return None


@pattern(_flat, x=(2, 3, 8), weight=(4, 8), bias=(4,))
def linear_between_views(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``view(linear(view(x)))`` where the views flatten the leading axes and restore them."""
    return F.linear(x.view(-1, 8), weight, bias).view(2, 3, 4)


def _separate_bias(match: Match) -> Miss | None:
    first = match.first
    if first is not None and (value(first).dim() != 1 or not depends_on_parameters_only(first)):
        return Miss("the first bias '{}' is no parameter vector", first, 0, (first,))
    if value(match.root).dtype != value(match.root.all_input_nodes[0]).dtype:
        return Miss("the bias '{}' changes the type of the linear to {}", match.bias, 0, (match.bias, value(match.root).dtype))
    return _matrix(match)


@pattern(_separate_bias, x=(2, 3, 8), weight=(4, 8), first=(4,), bias=(4,))
def linear_then_bias(x: Tensor, weight: Tensor, first: Tensor, bias: Tensor) -> Tensor:
    """``linear(x, W) + b``."""
    return F.linear(x, weight, first) + bias


def _batched(match: Match) -> Miss | None:
    shape = value(match.weight).shape
    if (cast := _cast(match)) is not None:
        return cast
    if value(match.x).dim() != 3:
        return Miss("'{}' has {} axes, 3 are needed", match.x, 0, (match.x, value(match.x).dim()))
    if len(shape) != 3 or shape[0] != 1 or not is_fixed(shape):
        return Miss("the weight '{}' has the shape {}, one matrix is needed", match.weight, 0, (match.weight, list(shape)))
    if not depends_on_parameters_only(match.weight):
        return Miss("'{}' depends on more than parameters", match.weight, 0, (match.weight,))
    return None


@pattern(_batched, x=(2, 3, 8), weight=(1, 8, 4))
def product_with_one_matrix(x: Tensor, weight: Tensor) -> Tensor:
    """``x W[0]`` for a parameter ``W`` of shape ``[1, inputs, outputs]``, repeated over the batch or not."""
    return one_of(torch.matmul(x, weight), torch.bmm(x, weight.expand(2, -1, -1)))


class Einsum(NamedTuple):
    """An einsum of an activation and a parameter, its axes sorted: ``rest`` and ``inputs`` of x, ``outputs`` of the weight."""

    x: fx.Node
    weight: fx.Node
    x_axes: str
    weight_axes: str
    rest: str
    inputs: str
    outputs: str
    result: str


def einsum(node: fx.Node) -> Einsum | Miss:
    """An einsum that is a linear: no axis is shared by all three, none repeated, the weight's sizes are fixed."""
    if node.target is not aten.einsum.default:
        return Miss("'{}' is {}, an einsum is needed", node, 0, (node, node.target))
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    if not isinstance(operands, list | tuple) or len(operands) != 2 or "->" not in equation:
        return Miss("the einsum '{}' has not the form 'a,b->c'", node, 1, (equation,))
    terms, result = _without_ellipsis(equation, operands).split("->")
    pairs = list(zip(terms.split(","), operands, strict=True))
    weights = [depends_on_parameters_only(operand) for _, operand in pairs]
    if sum(weights) != 1:
        return Miss("{} operands of '{}' are parameters, one is needed", node, 1, (sum(weights), node))
    (x_axes, x), (weight_axes, weight) = pairs if weights[1] else reversed(pairs)
    inputs = "".join(a for a in weight_axes if a in x_axes)
    outputs = "".join(a for a in weight_axes if a not in x_axes)
    rest = "".join(a for a in x_axes if a not in weight_axes)
    if "." in x_axes + weight_axes + result:
        return Miss("the einsum '{}' broadcasts", node, 2, (equation,))
    plain = all(len(set(axes)) == len(axes) for axes in (x_axes, weight_axes, result)) and set(rest + outputs) == set(result)
    if not plain or not inputs or not outputs or not rest or not is_fixed(value(weight).shape):
        return Miss("the einsum '{}' is no matrix product: it keeps a shared axis or sums a lone one", node, 2, (equation,))
    return Einsum(x, weight, x_axes, weight_axes, rest, inputs, outputs, result)


def _without_ellipsis(equation: str, operands: Any) -> str:
    """The axes that ``...`` stands for, as capital letters (a weight that has some of them does not become a linear)."""
    free = [letter for letter in ascii_uppercase if letter not in equation]
    terms = equation.split("->")[0].split(",")
    counts = [value(o).dim() - len(t.replace("...", "")) for t, o in zip(terms, operands, strict=True) if "..." in t]
    return equation.replace("...", "".join(free[: max(counts)])) if counts and len(set(counts)) == 1 else equation


class ParameterProduct(NamedTuple):
    """A matrix product with a weight: the node, the operand that depends on parameters only, the kind of op."""

    node: fx.Node
    weight: fx.Node
    kind: str


# The operands that may be a weight, by op, and the fewest axes it has.
PRODUCTS: dict[Any, tuple[str, tuple[int, ...]]] = {
    aten.linear.default: ("linear", (1, 0)),
    aten.addmm.default: ("addmm", (2, 1)),
    aten.mm.default: ("mm", (1, 0)),
    aten.bmm.default: ("bmm", (1, 0)),
    aten.matmul.default: ("matmul", (1, 0)),
    aten.mv.default: ("mv", (0, 1)),
    aten.baddbmm.default: ("baddbmm", (2, 1)),
    aten.bilinear.default: ("bilinear", (2,)),
    aten._grouped_mm.default: ("grouped_mm", (1, 0)),
    **{
        getattr(aten, name).default: ("convolution", (1,))
        for name in ("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d")
    },
    **{getattr(aten, name).padding: ("convolution", (1,)) for name in ("conv1d", "conv2d", "conv3d")},
    aten.conv_transpose2d.input: ("convolution", (1,)),
    aten.conv_transpose3d.input: ("convolution", (1,)),
}

# Namespaces whose ops move, look up or combine elementwise: not listed as unknown products of weights.
_KNOWN = ("aten", "prim", "prims")


def parameter_products(gm: fx.GraphModule) -> Iterator[ParameterProduct]:
    """Every matrix product in which an operand depends on parameters only, in the order of the graph.

    Unknown ops (outside of ATen) that take a parameter of two or more axes are listed as "unknown: <op>".
    """
    weights = parameter_only(gm)
    rooted = {n for n in weights if n.op == "placeholder"}
    for node in gm.graph.nodes:
        if node in weights and any(n in weights for n in node.all_input_nodes):
            rooted |= {node} if any(n in rooted for n in node.all_input_nodes) else set()
    for node in gm.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
            for operand in node.all_input_nodes:
                if operand in rooted and isinstance(value(operand), Tensor) and value(operand).dim() > 1:
                    yield ParameterProduct(node, operand, f"unknown: {node.target}")
            continue
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if (found := _product(node, rooted)) is not None:
            yield found


def _product(node: fx.Node, weights: set[fx.Node]) -> ParameterProduct | None:
    if node.target is aten.einsum.default:
        kind, operands = "einsum", list(node.args[1])  # type: ignore[arg-type]  # a list of tensors by its schema
    elif node.target in PRODUCTS:
        kind, places = PRODUCTS[node.target]
        operands = [node.args[i] for i in places if i < len(node.args)]
    elif node.target.namespace not in _KNOWN:  # type: ignore[union-attr]  # an OpOverload
        kind, operands = f"unknown: {node.target}", list(node.all_input_nodes)
    else:
        return None
    for operand in operands:
        if isinstance(operand, fx.Node) and (weight := _weight(operand, weights)) is not None:
            if kind.startswith("unknown") and value(weight).dim() < 2:
                continue
            return ParameterProduct(node, weight, kind)
    return None


def _weight(operand: fx.Node, weights: set[fx.Node]) -> fx.Node | None:
    """The operand, or what it repeats over a batch of symbolic size."""
    while operand not in weights and operand.target in (aten.expand.default, aten.repeat.default):
        source = operand.args[0]
        if not isinstance(source, fx.Node):
            return None
        operand = source
    return operand if operand in weights and isinstance(value(operand), torch.Tensor) else None


class Split(NamedTuple):
    """Several linears that read one value (split q, k, v; gate and up), in the order of the graph."""

    x: fx.Node
    linears: tuple[fx.Node, ...]


class Fused(NamedTuple):
    """One linear whose output is cut into parts: the linear, and the parts."""

    linear: fx.Node
    parts: tuple[fx.Node, ...]


def split_linears(gm: fx.GraphModule) -> Iterator[Split]:
    """Every value that two or more linears read (as their input)."""
    for node in gm.graph.nodes:
        linears = tuple(user for user in node.users if user.target is aten.linear.default and user.args[0] is node)
        if len(linears) > 1:
            yield Split(node, tuple(sorted(linears)))


_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.split.sizes)


class Part(NamedTuple):
    """The channels ``first`` to ``last`` of ``source``, along its last axis."""

    source: fx.Node
    first: int
    last: int


def part_of(node: fx.Node) -> Part | None:
    """What ``node``, a slice or an output of a split, is a part of along the last axis; None if that is not it or not fixed."""
    args: Any = node.args
    if node.target is aten.slice.Tensor:
        given: list[Any] = [*args, *[0, None, None, 1][len(args) - 1 :]]
        source, axis, first, last, step = given
        size = value(source).shape[-1]
        if not _is_last(axis, source) or step != 1 or not is_fixed((size, first or 0, last or 0)):
            return None
        first, last, _ = slice(first, last).indices(size)
        return Part(source, first, max(first, last))
    if node.target is not operator.getitem or args[0].target not in _SPLITS:
        return None
    (source, _, *axes), sizes = args[0].args, [part.shape[-1] for part in value(args[0])]
    if not _is_last(axes[0] if axes else 0, source) or not is_fixed(sizes):
        return None
    first = sum(sizes[: args[1]])
    return Part(source, first, first + sizes[args[1]])


def _is_last(axis: int, node: fx.Node) -> bool:
    return axis in (-1, value(node).dim() - 1)


def readers_of(node: fx.Node) -> list[fx.Node]:
    """The users of ``node`` but for those that ask for a size."""
    return [user for user in node.users if user.target is not aten.sym_size.int]


def cuts_of(node: fx.Node) -> list[fx.Node]:
    """All that reads ``node``, with the outputs of a split in the place of the split."""
    return [part for user in readers_of(node) for part in (user.users if user.target in _SPLITS else (user,))]


_CUTS = (*_SPLITS, aten.unbind.int)
_AXES = (aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default)


def fused_linears(gm: fx.GraphModule) -> Iterator[Fused]:
    """Every linear whose output is split, chunked, unbound or sliced: at once into any number of parts.

    Or, after a view or a permutation, into three. Two parts of a head are a rotary embedding's halves, not two linears.
    """
    for node in gm.graph.find_nodes(op="call_function", target=aten.linear.default):
        here = node
        while len(here.users) == 1 and (user := next(iter(here.users))).target in _AXES:
            here = user
        users = tuple(here.users)
        if len(users) == 1 and users[0].target in _CUTS:
            parts = tuple(sorted(users[0].users))
        elif all(u.target in (aten.slice.Tensor, aten.select.int) for u in users):
            parts = tuple(sorted(users))
        else:
            continue
        if len(parts) == 3 or (here is node and len(parts) > 1):
            yield Fused(node, parts)


TRANSPOSES = (aten.t.default, aten.mT.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default)


def untransposed(node: fx.Node) -> fx.Node | None:
    """What ``node`` is the matrix transpose of, or None."""
    permutation = permutation_of(node)
    source = node.args[0] if node.args else None
    return source if permutation == (1, 0) and isinstance(source, fx.Node) else None
