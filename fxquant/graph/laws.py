"""The table of laws: what each op does with a map on the channels of one of its arguments, and why that changes nothing.

A map ``T`` is invertible and acts on channels: ``x~ = T(x)``. Every row of ``LAWS`` is an identity (``op`` written ``f``):

    passes            f(T(x), ...)      ==  T(f(x, ...))                  the output carries the map, nothing else changes
    agrees            f(T(a), T(b))     ==  T(f(a, b))                    as passes, if every operand carries it
    read              f(T(x), *rewrite(weights, m))  ==  f(x, *weights)   a reader absorbs the map into its weights
    made              f(x, *rewrite(weights, m))  ==  T(f(x, *weights))   a producer absorbs the map into its weights
    stops             neither: the row says why

``rewrite`` is the code that is traced into the graph *and* what SymPy proves (``Law.identity``): the proof is about the code.
What is not in the table stops every map.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import fx

from .layout import ATTENTION, COPIES, PERMUTES, PRODUCTS, RESHAPES, SPLITS, same, shape

aten = torch.ops.aten


@dataclass(frozen=True)
class Map:
    """An invertible map on channels, whose ``value`` is a node that depends on parameters and constants only."""

    value: fx.Node
    neutral: ClassVar[float] = 0.0  # what the map's vector holds for a channel that it leaves alone

    @staticmethod
    def apply(x: Any, m: Any) -> Any:
        """``x~``, from ``x``."""
        raise NotImplementedError

    @staticmethod
    def undo(x: Any, m: Any) -> Any:
        """``x``, from ``x~``."""
        raise NotImplementedError

    @staticmethod
    def inverse(m: Any) -> Any:
        """The number or matrix that undoes what ``m`` does: ``undo(x, inverse(m)) == apply(x, m)``."""
        raise NotImplementedError

    explicit: ClassVar[Any]  # the op that undoes the map where it is left over, with the operand ``operand(m)``

    @staticmethod
    def operand(m: Any) -> Any:
        """What ``explicit`` takes beside ``x~`` to give ``x``."""
        return m

    @classmethod
    def entering(cls, m: Any) -> Any:
        """What ``explicit`` takes beside ``x`` to give ``x~``."""
        return cls.operand(cls.inverse(m))


@dataclass(frozen=True)
class Scale(Map):
    """``x~ = x / s``, with no ``s_j`` zero; a negative one is as good as a positive one, except for ReLU."""

    neutral: ClassVar[float] = 1.0
    explicit: ClassVar[Any] = aten.mul.Tensor

    @staticmethod
    def apply(x: Any, m: Any) -> Any:
        return x / m

    @staticmethod
    def undo(x: Any, m: Any) -> Any:
        return x * m

    @staticmethod
    def inverse(m: Any) -> Any:
        return 1 / m


@dataclass(frozen=True)
class PositiveScale(Scale):
    """``x~ = x / s`` with every ``s_j > 0``: obeys the laws of Scale, and passes ReLU."""


@dataclass(frozen=True)
class Shift(Map):
    """``x~ = x - z``."""

    explicit: ClassVar[Any] = aten.add.Tensor

    @staticmethod
    def apply(x: Any, m: Any) -> Any:
        return x - m

    @staticmethod
    def undo(x: Any, m: Any) -> Any:
        return x + m

    @staticmethod
    def inverse(m: Any) -> Any:
        return -m


@dataclass(frozen=True)
class Matrix(Map):
    """``x~ = x M`` on the last axis: on the whole of it, or alike on every block of it (the heads of an attention)."""

    explicit: ClassVar[Any] = aten.matmul.default

    @staticmethod
    def apply(x: Any, m: Any) -> Any:
        return x @ m

    @classmethod
    def entering(cls, m: Any) -> Any:
        return m


@dataclass(frozen=True)
class Rotation(Matrix):
    """``x~ = x R`` with ``R`` orthogonal."""

    @staticmethod
    def undo(x: Any, m: Any) -> Any:
        return x @ m.T

    @staticmethod
    def inverse(m: Any) -> Any:
        return m.T

    @staticmethod
    def operand(m: Any) -> Any:
        return m.T


@dataclass(frozen=True)
class Centre(Matrix):
    """``x~ = x - mean(x)`` = ``x C`` with ``C = I - 1 1^T / d``; no inverse: only what takes the mean off may read it."""


class Effect(Enum):
    """What an op does with a map; see the module's docstring."""

    PASSES = "passes"
    AGREES = "agrees"
    READ = "read"
    MADE = "made"
    STOPS = "stops"


PASSES, AGREES, READ, MADE, STOPS = Effect
Condition = Callable[[fx.Node], bool]


@dataclass(frozen=True)
class Law:
    """One row: ``kind`` of map on ``argument`` of any of ``ops`` (None: on the output, for a producer).

    ``weights`` are the argument positions that ``rewrite`` takes (before the map) and returns: of parameters only.
    ``only_if`` looks at the node for what the identity takes for granted.
    """

    ops: tuple[Any, ...]
    argument: int | None
    kind: type[Map]
    effect: Effect
    says: str
    weights: tuple[int, ...] = ()
    rewrite: Callable[..., tuple[Any, ...]] | None = None
    only_if: Condition | None = None
    whole_axis: bool = True  # the channels must lie along the last axis of the argument, as a linear's do

    def identity(self) -> Any:
        """The difference of both sides for each op, as SymPy expressions that simplify to zero (for ``stops``: that do not)."""
        from .identities import difference  # SymPy is a test's dependency, not the package's

        return {str(op): difference(op, self) for op in self.ops}


LINEAR = (aten.linear.default,)
LAYER_NORM = (aten.layer_norm.default,)
RMS_NORM = (aten.rms_norm.default,)
NORMS = LAYER_NORM + RMS_NORM
EMBEDDING = (aten.embedding.default,)
ADD, SUB, MUL, DIV = (aten.add.Tensor,), (aten.sub.Tensor,), (aten.mul.Tensor,), (aten.div.Tensor,)
CAST = (aten.to.dtype, aten._to_copy.default)
CAT = (aten.cat.default,)
SOFTMAX = (aten.softmax.int, aten._softmax.default)
MOVES = (
    *RESHAPES, *PERMUTES, *COPIES, *SPLITS, operator.getitem, aten.expand.default, aten.slice.Tensor, aten.select.int,
    aten.repeat_interleave.self_int, aten.index.Tensor, aten.index_select.default, aten.roll.default, aten.flip.default,
)  # fmt: skip
PADS = (aten.constant_pad_nd.default, aten.pad.default)
# x [tokens, K] times the matrix of each token's group, W [groups, K, N]; a library has its own fallback of the op for CPUs.
GROUPED = (aten._grouped_mm.default, "transformers.grouped_mm_fallback.default")
SQUASHES = (aten.gelu.default, aten.silu.default, aten.tanh.default, aten.sigmoid.default, *SOFTMAX)


def _some(b: Any, then: Callable[[Any], Any], otherwise: Callable[[], Any] = lambda: None) -> Any:
    """``then(b)`` for a bias that is there."""
    return otherwise() if b is None else then(b)


def _unit_alpha(node: fx.Node) -> bool:
    return node.kwargs.get("alpha", 1) in (1, 1.0)


def no_gain(node: fx.Node) -> bool:
    return len(node.args) < 3 or node.args[2] is None


def has_matrix(node: fx.Node) -> bool:
    """The weight is a matrix, or a stack of them: a vector has an axis of inputs and none of outputs."""
    return len(shape(node.args[1])) > 1


def has_whole_bias(node: fx.Node) -> bool:
    """The same, and a bias has a number for every output: one for all of them has no channels to turn."""
    bias = node.args[2] if len(node.args) > 2 else None
    return has_matrix(node) and (bias is None or shape(bias)[-1:] == shape(node.args[1])[:1])


def _one_per_row(c: Any) -> bool:
    sizes = c.meta["val"].shape if isinstance(c, fx.Node) and isinstance(c.meta["val"], torch.Tensor) else ()
    return len(sizes) == 0 or same(sizes[-1], 1)


def factor_per_row(node: fx.Node) -> bool:
    """The second operand is a number, or has one entry per row."""
    return _one_per_row(node.args[1])


def factor_per_row_first(node: fx.Node) -> bool:
    """The same of the first operand."""
    return _one_per_row(node.args[0])


def _one_axis(node: fx.Node) -> bool:
    axes: Any = node.args[1]
    return len(axes) == 1


def rows_sum_to_one(node: fx.Node) -> bool:
    """Attention weights that sum to one: no dropout, and no mask that might forbid a whole row."""
    if node.target is ATTENTION:
        mask, dropout = (*node.args[3:5], None, 0.0)[:2] if len(node.args) < 5 else node.args[3:5]
        mask, dropout = node.kwargs.get("attn_mask", mask), node.kwargs.get("dropout_p", dropout)
        return mask is None and not dropout
    rows = node.args[0]
    while isinstance(rows, fx.Node) and rows.target in (*CAST, *COPIES, *RESHAPES, aten.expand.default) and _same_rows(rows):
        rows = rows.args[0]
    if not isinstance(rows, fx.Node) or rows.target not in SOFTMAX:
        return False
    return int(rows.args[1]) in (-1, rows.meta["val"].ndim - 1)  # type: ignore[arg-type]  # dim, by the schema


def _same_rows(node: fx.Node) -> bool:
    before, after = node.args[0].meta["val"].shape[-1], node.meta["val"].shape[-1]  # type: ignore[union-attr]
    return same(before, after)


# fmt: off
LAWS: tuple[Law, ...] = (
    # linear(x, W, b) = x W^T + b
    Law(LINEAR, 0, Scale, READ, "linear(x / s, W * s, b) == linear(x, W, b)", (1, 2), lambda W, b, s: (W * s, b), has_matrix),
    Law(LINEAR, 0, Shift, READ, "linear(x - z, W, b + W z) == linear(x, W, b)", (1, 2),
        lambda W, b, z: (W, _some(b, lambda b: b + W @ z, lambda: W @ z)), has_matrix),
    Law(LINEAR, 0, Rotation, READ, "linear(x R, W R, b) == linear(x, W, b)", (1, 2), lambda W, b, R: (W @ R, b), has_matrix),
    Law(LINEAR, None, Scale, MADE, "linear(x, W / s', b / s) == linear(x, W, b) / s", (1, 2),
        lambda W, b, s: (W / s[:, None], _some(b, lambda b: b / s)), has_matrix),
    Law(LINEAR, None, Shift, MADE, "linear(x, W, b - z) == linear(x, W, b) - z", (1, 2),
        lambda W, b, z: (W, _some(b, lambda b: b - z, lambda: -z)), has_matrix),
    Law(LINEAR, None, Matrix, MADE, "linear(x, M^T W, b M) == linear(x, W, b) M", (1, 2),
        lambda W, b, M: (M.T @ W, _some(b, lambda b: b @ M)), has_whole_bias),
    # norms: n(x) w + b, with n(x) of mean 0 and variance 1, or of mean square 1
    Law(LAYER_NORM, None, Scale, MADE, "layer_norm(x, w / s, b / s) == layer_norm(x, w, b) / s", (2, 3),
        lambda w, b, s: (_some(w, lambda w: w / s, lambda: 1 / s), _some(b, lambda b: b / s)), _one_axis),
    Law(LAYER_NORM, None, Shift, MADE, "layer_norm(x, w, b - z) == layer_norm(x, w, b) - z", (2, 3),
        lambda w, b, z: (w, _some(b, lambda b: b - z, lambda: -z)), _one_axis),
    Law(RMS_NORM, None, Scale, MADE, "rms_norm(x, w / s) == rms_norm(x, w) / s", (2,),
        lambda w, s: (_some(w, lambda w: w / s, lambda: 1 / s),), _one_axis),
    Law(RMS_NORM, 0, Rotation, PASSES, "rms_norm(x R) == rms_norm(x) R without a gain", only_if=no_gain),
    Law(LAYER_NORM, 0, Centre, READ, "layer_norm(x - mean(x), w, b) == layer_norm(x, w, b)", (), lambda C: (), _one_axis),
    Law(NORMS, 0, Scale, STOPS, "the statistics of a norm mix its channels"),
    # a table of rows
    Law(EMBEDDING, None, Scale, MADE, "embedding(E / s, i) == embedding(E, i) / s", (0,), lambda E, s: (E / s,)),
    Law(EMBEDDING, None, Shift, MADE, "embedding(E - z, i) == embedding(E, i) - z", (0,), lambda E, z: (E - z,)),
    Law(EMBEDDING, None, Matrix, MADE, "embedding(E M, i) == embedding(E, i) M", (0,), lambda E, M: (E @ M,)),
    # matrix products with a weight: experts and the like, x W
    Law((*PRODUCTS, *GROUPED), 0, Scale, READ, "(x / s) @ (W * s') == x @ W", (1,), lambda W, s: (W * s[:, None],), has_matrix),
    Law((*PRODUCTS, *GROUPED), 0, Rotation, READ, "(x R) @ (R^T W) == x @ W", (1,), lambda W, R: (R.T @ W,), has_matrix),
    Law((*PRODUCTS, *GROUPED), None, Scale, MADE, "x @ (W / s) == (x @ W) / s", (1,), lambda W, s: (W / s,), has_matrix),
    Law((*PRODUCTS, *GROUPED), None, Matrix, MADE, "x @ (W M) == (x @ W) M", (1,), lambda W, M: (W @ M,), has_matrix),
    # sums: all operands alike, but for a shift, which any one of them carries on
    Law((*ADD, *SUB), 0, Scale, AGREES, "a / s + b / s == (a + b) / s"),
    Law((*ADD, *SUB), 1, Scale, AGREES, "a / s + b / s == (a + b) / s"),
    Law((*ADD, *SUB), 0, Matrix, AGREES, "a M + b M == (a + b) M"),
    Law((*ADD, *SUB), 1, Matrix, AGREES, "a M + b M == (a + b) M"),
    Law(ADD, 0, Shift, READ, "(x - z) + (c + z) == x + c", (1,), lambda c, z: (c + z,), _unit_alpha, whole_axis=False),
    Law(ADD, 1, Shift, READ, "(c + z) + (x - z) == c + x", (0,), lambda c, z: (c + z,), _unit_alpha, whole_axis=False),
    Law(ADD, 0, Shift, PASSES, "(a - z) + b == (a + b) - z"),
    Law(ADD, 1, Shift, PASSES, "a + (b - z) == (a + b) - z", only_if=_unit_alpha),
    Law(SUB, 0, Shift, PASSES, "(a - z) - b == (a - b) - z"),
    Law(CAT, 0, Scale, AGREES, "cat(a / s, b / s) == cat(a, b) / s along another axis"),
    Law(CAT, 0, Matrix, AGREES, "cat(a M, b M) == cat(a, b) M along another axis"),
    Law(CAT, 0, Shift, AGREES, "cat(a - z, b - z) == cat(a, b) - z along another axis"),
    # products, elementwise: the gate of a gated MLP, a mask, a constant; with a weight the map ends there
    Law(MUL, 0, Scale, READ, "(x / s) * (c s) == x * c", (1,), lambda c, s: (c * s,), whole_axis=False),
    Law(MUL, 1, Scale, READ, "(c s) * (x / s) == c * x", (0,), lambda c, s: (c * s,), whole_axis=False),
    Law(MUL, 0, Scale, PASSES, "(a / s) * b == (a * b) / s"),
    Law(MUL, 1, Scale, PASSES, "a * (b / s) == (a * b) / s"),
    Law(DIV, 0, Scale, PASSES, "(a / s) / b == (a / b) / s"),
    Law((*MUL, *DIV), 0, Matrix, PASSES, "(x M) * c == (x * c) M for one c per row", only_if=factor_per_row),
    Law(MUL, 1, Matrix, PASSES, "c * (x M) == (c * x) M for one c per row", only_if=factor_per_row_first),
    # elementwise functions
    Law((aten.neg.default,), 0, Matrix, PASSES, "-(x M) == (-x) M"),
    Law((aten.neg.default,), 0, Scale, PASSES, "-(x / s) == (-x) / s"),
    Law((aten.relu.default,), 0, PositiveScale, PASSES, "relu(x / s) == relu(x) / s for s > 0"),
    Law((aten.relu.default,), 0, Shift, STOPS, "relu(x - z) is not relu(x) - z"),
    Law(SQUASHES, 0, Scale, STOPS, "not homogeneous: f(x / s) is not f(x) / s"),
    Law(SQUASHES, 0, Shift, STOPS, "not additive: f(x - z) is not f(x) - z"),
    # attention's value path: P V, with the channels of a head on the last axis
    Law((ATTENTION,), 2, Scale, PASSES, "P (V / s) == (P V) / s"),
    Law((ATTENTION,), 2, Shift, PASSES, "P (V - z) == P V - z: the rows of P sum to one", only_if=rows_sum_to_one),
    Law((ATTENTION,), 2, Matrix, PASSES, "P (V M) == (P V) M"),
    Law(PRODUCTS, 1, Scale, PASSES, "P (V / s) == (P V) / s"),
    Law(PRODUCTS, 1, Matrix, PASSES, "P (V M) == (P V) M"),
    Law(PRODUCTS, 1, Shift, PASSES, "P (V - z) == P V - z: the rows of P sum to one", only_if=rows_sum_to_one),
    # what only moves, picks or copies elements
    Law((*MOVES, *CAST), 0, Scale, PASSES, "view(x / s) == view(x) / view(s)"),
    Law((*MOVES, *CAST), 0, Shift, PASSES, "view(x - z) == view(x) - view(z)"),
    Law((*MOVES, *CAST), 0, Matrix, PASSES, "view(x M) == view(x) M if the blocks of the last axis stay"),
    Law((*PADS, aten.sum.dim_IntList, aten.mean.dim), 0, Scale, PASSES, "sum(x / s) == sum(x) / s over other axes"),
    Law((*PADS, aten.sum.dim_IntList, aten.mean.dim), 0, Matrix, PASSES, "sum(x M) == sum(x) M over other axes"),
    Law((aten.mean.dim,), 0, Shift, PASSES, "mean(x - z) == mean(x) - z over other axes"),
)
# fmt: on


def laws_of(op: Any, argument: int | None, kind: type[Map]) -> list[Law]:
    """The rows for a map of ``kind`` on ``argument`` of ``op``, in the table's order; PositiveScale obeys Scale's as well."""
    rows = [law for law in LAWS if law.argument == argument and issubclass(kind, law.kind)]
    return [law for law in rows if op in law.ops or str(op) in law.ops]
