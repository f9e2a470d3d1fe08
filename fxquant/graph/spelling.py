"""One reading for the many spellings of an ATen op: products, sums, casts, and calls with normalised literals."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .tidy import value

aten = torch.ops.aten
Number = int | float


@dataclass(frozen=True)
class Product:
    """``coefficient-literals * node ** power * ...``; a literal is ``(number, power)``."""

    operands: tuple[tuple[fx.Node, float], ...]
    literals: tuple[tuple[Number, float], ...] = ()


@dataclass(frozen=True)
class Sum:
    """``literals + factor * node + ...``; a literal is ``(number, factor)``."""

    operands: tuple[tuple[fx.Node, float], ...]
    literals: tuple[tuple[Number, float], ...] = ()


@dataclass(frozen=True)
class Through:
    """A cast between floating types, or a change of memory layout: the same values as ``source``, but for rounding."""

    source: fx.Node


@dataclass(frozen=True)
class Call:
    """Any other op: ``key`` names the family of overloads, ``operands`` are its tensors, ``literals`` what else matters."""

    key: Any
    operands: tuple[Any, ...]
    literals: tuple[tuple[str, Any], ...] = ()


Spelling = Product | Sum | Through | Call

CASTS = (
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
)
LAYOUTS = (aten.contiguous.default, aten.clone.default, aten.lift_fresh_copy.default, aten.alias.default, aten.detach.default)

# What a pattern never compares: where and how a value is stored, and shapes, whose meaning the fake values tell.
IGNORED = {"dtype", "device", "layout", "memory_format", "pin_memory", "non_blocking", "copy", "half_to_float"}
IGNORED |= {"size", "shape", "normalized_shape", "scale_grad_by_freq", "sparse", "padding_idx", "implicit"}


def spell(node: fx.Node) -> Spelling:
    """How ``node`` reads.

    >>> spell(node)   # of torch.div(x, 8)                               # doctest: +SKIP
    Product(operands=((x, 1),), literals=((8, -1),))
    """
    rule = RULES.get(node.target)
    read = rule(node) if rule is not None else None
    return read if read is not None else call(node)


def is_float_cast(node: fx.Node) -> bool:
    """The op changes the floating type of its first argument (or nothing at all)."""
    if node.target not in CASTS or not isinstance(node.args[0], fx.Node):
        return False
    x, y = value(node.args[0]), value(node)
    return _is_float(x) and _is_float(y) and x.device == y.device


def widens(node: fx.Node) -> bool:
    """A cast (or a layout change) that loses no bit: reading its source instead reads the same numbers."""
    if node.target in LAYOUTS:
        return isinstance(node.args[0], fx.Node)
    if not is_float_cast(node):
        return False
    source: torch.dtype = value(node.args[0]).dtype
    target: torch.dtype = value(node).dtype
    return torch.promote_types(source, target) == target


def call(node: fx.Node) -> Call:
    """``node`` as a call: arguments by name with their defaults, dims counted from the end, what never matters left out."""
    key = FAMILIES.get(node.target, node.target)
    if not isinstance(node.target, torch._ops.OpOverload):
        operands = tuple(a for a in node.args if isinstance(a, fx.Node))
        literals = tuple((str(i), a) for i, a in enumerate(node.args) if not isinstance(a, fx.Node))
        return Call(key, operands, literals)
    rank = _rank(node.args[0] if node.args else None)
    given: dict[str, Any] = {}
    for i, argument in enumerate(node.target._schema.arguments):
        given[argument.name] = (
            node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        )
    tensors = tuple(
        given[a.name] if not isinstance(given[a.name], list | tuple) else tuple(given[a.name])
        for a in node.target._schema.arguments
        if "Tensor" in str(a.type)
    )
    literals = tuple(
        (a.name, _from_end(given[a.name], rank) if a.name.startswith("dim") else given[a.name])
        for a in node.target._schema.arguments
        if "Tensor" not in str(a.type) and a.name not in IGNORED
    )
    return Call(key, tensors, literals)


def _is_float(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dtype.is_floating_point


def _rank(x: Any) -> int:
    v = value(x)
    return v.dim() if isinstance(v, torch.Tensor) else 0


def _from_end(dims: Any, rank: int) -> Any:
    if isinstance(dims, list | tuple):
        return tuple(_from_end(d, rank) for d in dims)
    if type(dims) is not int:
        return dims
    return dims - rank if dims >= 0 else dims


def _through(node: fx.Node) -> Through | None:
    if node.target in LAYOUTS or is_float_cast(node):
        source = node.args[0]
        return Through(source) if isinstance(source, fx.Node) else None
    return None


def _of(kind: type[Product] | type[Sum], *parts: tuple[Any, float]) -> Product | Sum:
    operands = tuple((p, e) for p, e in parts if isinstance(p, fx.Node))
    return kind(operands, tuple((p, e) for p, e in parts if not isinstance(p, fx.Node)))


def _mul(node: fx.Node) -> Spelling | None:
    return _of(Product, (node.args[0], 1), (node.args[1], 1))


def _div(node: fx.Node) -> Spelling | None:
    if node.kwargs.get("rounding_mode") is not None:
        return None
    return _of(Product, (node.args[0], 1), (node.args[1], -1))


def _pow(node: fx.Node) -> Spelling | None:
    base, exponent = node.args
    if not isinstance(exponent, int | float):
        return None
    if exponent in (2, 3):
        return _of(Product, *[(base, 1)] * int(exponent))
    return _of(Product, (base, exponent)) if exponent in (0.5, -0.5, -1, 1) else None


def _power(exponent: float) -> Callable[[fx.Node], Spelling | None]:
    return lambda node: _of(Product, (node.args[0], exponent))


def _add(sign: int, reverse: bool = False) -> Callable[[fx.Node], Spelling | None]:
    def read(node: fx.Node) -> Spelling | None:
        alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
        if not isinstance(alpha, int | float):
            return None
        a, b = node.args[:2]
        return _of(Sum, (b, 1), (a, -alpha)) if reverse else _of(Sum, (a, 1), (b, sign * alpha))

    return read


def _transpose(node: fx.Node) -> Spelling | None:
    permutation = permutation_of(node)
    if permutation is None:
        return None
    leading = 0
    while leading < len(permutation) and permutation[leading] == leading:
        leading += 1
    rank = len(permutation)
    return Call("permute", (node.args[0],), (("dims", tuple(d - rank for d in permutation[leading:])),))


def permutation_of(node: fx.Node) -> tuple[int, ...] | None:
    """The order of axes of a transposing op (t, T, mT, transpose, permute, swapaxes), or None for any other op."""
    source = node.args[0] if node.args else None
    rank = _rank(source)
    if node.target is aten.permute.default:
        dims: Any = node.args[1]
        return tuple(d % rank for d in dims)
    order = list(range(rank))
    if node.target in (aten.transpose.int, aten.swapaxes.default, aten.swapdims.default):
        i, j = node.args[1:3]
    elif node.target in (aten.mT.default, aten.t.default) and rank >= 2:
        i, j = -2, -1
    elif node.target is aten.numpy_T.default:
        return tuple(reversed(order))
    else:
        return None
    order[i], order[j] = order[j], order[i]  # type: ignore[index]  # ints by their schema
    return tuple(order)


def _var(node: fx.Node) -> Spelling | None:
    read = dict(call(node).literals)
    correction = 1 if (c := read.get("correction", int(read.get("unbiased", True)))) is None else c
    return Call("var", (node.args[0],), (("dim", read["dim"]), ("correction", correction), ("keepdim", read["keepdim"])))


def _softmax(node: fx.Node) -> Spelling | None:
    return Call("softmax", (node.args[0],), (("dim", dict(call(node).literals)["dim"]),))


def _multiply(node: fx.Node) -> Spelling | None:
    return Call("matmul", tuple(node.args[:2]))


RULES: dict[Any, Callable[[fx.Node], Spelling | None]] = {
    **dict.fromkeys((*CASTS, *LAYOUTS), _through),
    aten.mul.Tensor: _mul,
    aten.mul.Scalar: _mul,
    aten.div.Tensor: _div,
    aten.div.Scalar: _div,
    aten.pow.Tensor_Scalar: _pow,
    aten.square.default: lambda node: _of(Product, (node.args[0], 1), (node.args[0], 1)),
    aten.sqrt.default: _power(0.5),
    aten.rsqrt.default: _power(-0.5),
    aten.reciprocal.default: _power(-1),
    aten.neg.default: lambda node: _of(Product, (node.args[0], 1), (-1, 1)),
    aten.add.Tensor: _add(1),
    aten.add.Scalar: _add(1),
    aten.sub.Tensor: _add(-1),
    aten.sub.Scalar: _add(-1),
    aten.rsub.Scalar: _add(-1, reverse=True),
    aten.rsub.Tensor: _add(-1, reverse=True),
    aten.transpose.int: _transpose,
    aten.permute.default: _transpose,
    aten.t.default: _transpose,
    aten.mT.default: _transpose,
    aten.numpy_T.default: _transpose,
    aten.swapaxes.default: _transpose,
    aten.swapdims.default: _transpose,
    aten.var.dim: _var,
    aten.var.correction: _var,
    aten.softmax.int: _softmax,
    aten._softmax.default: _softmax,
    aten.matmul.default: _multiply,
    aten.mm.default: _multiply,
    aten.bmm.default: _multiply,
}

# Ops that differ in nothing that a pattern compares.
FAMILIES: dict[Any, Any] = {
    aten.view.default: "view",
    aten.reshape.default: "view",
    aten._unsafe_view.default: "view",
    aten.masked_fill.Scalar: "masked_fill",
    aten.where.ScalarOther: "where",
    aten.where.ScalarSelf: "where",
    aten.where.self: "where",
}

# Which ops may read as a product, as a sum, as a call of a given key.
_MULTIPLY = {"mul", "div", "pow", "square", "sqrt", "rsqrt", "reciprocal", "neg"}
PRODUCTS = tuple(op for op in RULES if op._schema.name.split("::")[1] in _MULTIPLY)
SUMS = tuple(op for op in RULES if op._schema.name.split("::")[1] in {"add", "sub", "rsub"})
MEMBERS: dict[Any, tuple[Any, ...]] = {
    "view": tuple(FAMILIES)[:3],
    "where": (aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.self),
    "masked_fill": (aten.masked_fill.Scalar,),
    "permute": tuple(op for op, rule in RULES.items() if rule is _transpose),
    "var": (aten.var.dim, aten.var.correction),
    "softmax": (aten.softmax.int, aten._softmax.default),
    "matmul": (aten.matmul.default, aten.mm.default, aten.bmm.default),
}
