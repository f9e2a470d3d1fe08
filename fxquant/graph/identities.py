"""The two sides of a law, on symbols for SymPy or on numbers: what each op means, on small examples.

SymPy is imported when a proof is asked for: the package does not need it.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .laws import (
    ADD,
    CAST,
    CAT,
    DIV,
    EMBEDDING,
    GROUPED,
    LAYER_NORM,
    LINEAR,
    MUL,
    PADS,
    RMS_NORM,
    SOFTMAX,
    SUB,
    Centre,
    Effect,
    Law,
    Matrix,
    Rotation,
    factor_per_row,
    factor_per_row_first,
    no_gain,
    rows_sum_to_one,
)
from .layout import ATTENTION, COPIES, PRODUCTS

aten = torch.ops.aten
New = Callable[..., Any]  # new(*shape): symbols or numbers of that shape

TOKENS, CHANNELS, OUTPUTS = 2, 2, 2
EPS = 1e-3


@dataclass(frozen=True)
class Example:
    """Arguments for an op with the channels on the last axis, and the op's meaning in the notation of arrays."""

    arguments: Callable[[New], Sequence[Any]]
    meaning: Callable[..., Any]


def sides(op: Any, law: Law, new: New, call: Callable[..., Any]) -> tuple[Any, Any]:
    """Both sides of the identity of ``law`` for ``op``; equal if it is one (for ``stops``: equal if it stopped nothing)."""
    given = list(_example(op, law).arguments(new))
    plain = call(op, given)
    m = _map(law, new)
    turned = list(given)
    if law.effect is Effect.READ or law.effect is Effect.MADE:
        assert law.rewrite is not None
        for place, weight in zip(law.weights, law.rewrite(*[given[n] for n in law.weights], m), strict=True):
            turned[place] = weight
    if law.effect is Effect.MADE:
        return call(op, turned), law.kind.apply(plain, m)
    places = (0, 1) if law.effect is Effect.AGREES and op not in CAT else (law.argument or 0,)
    for place in places:
        x = turned[place]
        turned[place] = [law.kind.apply(part, m) for part in x] if isinstance(x, list) else law.kind.apply(x, m)
    if law.effect is Effect.READ:
        return call(op, turned), plain
    outputs = plain if isinstance(plain, (list, tuple)) else [plain]
    expected = [law.kind.apply(part, m) for part in outputs]
    return call(op, turned), expected if isinstance(plain, (list, tuple)) else expected[0]


def _map(law: Law, new: New) -> Any:
    """The number, vector or matrix of a map of the law's kind, on CHANNELS channels."""
    if law.kind is Rotation:
        return new.rotation(CHANNELS)  # type: ignore[attr-defined]
    if not issubclass(law.kind, Matrix):
        return new.positive(CHANNELS)  # type: ignore[attr-defined]
    m = new(CHANNELS, CHANNELS)
    if law.kind is not Centre:
        return m
    for i, j in np.ndindex(CHANNELS, CHANNELS):
        m[i, j] = (1 if i == j else 0) - (1 / CHANNELS if isinstance(m, torch.Tensor) else _exact(1) / CHANNELS)
    return m


def difference(op: Any, law: Law) -> list[Any]:
    """Left side less right side, entry by entry, simplified by SymPy."""
    import sympy

    left, right = sides(op, law, _Symbols(), lambda op, given: _example(op, law).meaning(*given))
    pairs = zip(np.ravel(np.asarray(left, dtype=object)), np.ravel(np.asarray(right, dtype=object)), strict=True)
    return [sympy.simplify(a - b) for a, b in pairs]


def _example(op: Any, law: Law) -> Example:
    return CONDITIONAL.get((op, law.only_if), EXAMPLES.get(op)) or EXAMPLES[op]


class _Symbols:
    """``new(2, 3)``: an array of fresh real symbols."""

    def __init__(self) -> None:
        self._count = 0

    def _fill(self, shape: Sequence[int], **assumptions: bool) -> Any:
        import sympy

        def fresh() -> Any:
            self._count += 1
            return sympy.Symbol(f"a{self._count}", real=True, **assumptions)

        return np.array([fresh() for _ in range(int(np.prod(shape)))], dtype=object).reshape(shape)

    def __call__(self, *shape: int) -> Any:
        return self._fill(shape)

    def positive(self, *shape: int) -> Any:
        return self._fill(shape, positive=True)

    def rotation(self, size: int) -> Any:
        import sympy

        angle = self(1)[0]
        return np.array([[sympy.cos(angle), -sympy.sin(angle)], [sympy.sin(angle), sympy.cos(angle)]], dtype=object)


def _each(name: str) -> Callable[[Any], Any]:
    def meaning(x: Any, *_: Any) -> Any:
        import sympy

        return np.vectorize(getattr(sympy, name), otypes=[object])(x)

    return meaning


_sqrt, _exp, _erf, _abs, _tanh = map(_each, ("sqrt", "exp", "erf", "Abs", "tanh"))


def _softmax(x: Any, *_: Any) -> Any:
    return _exp(x) / _exp(x).sum(-1, keepdims=True)


def _rms(x: Any, shape: Any, w: Any = None, eps: float = EPS) -> Any:
    n = x / _sqrt((x * x).sum(-1, keepdims=True) / x.shape[-1] + _exact(eps))
    return n if w is None else n * w


def _layer_norm(x: Any, shape: Any, w: Any, b: Any, eps: float) -> Any:
    return _rms(x - x.sum(-1, keepdims=True) / x.shape[-1], shape, w, eps) + b


def _exact(number: float) -> Any:
    import sympy

    return sympy.Rational(str(number))


def _attention(q: Any, k: Any, v: Any) -> Any:
    return np.matmul(_softmax(np.matmul(q, np.swapaxes(k, -1, -2))), v)


def _x(new: New) -> list[Any]:
    return [new(TOKENS, CHANNELS)]


def _with(*more: Any) -> Callable[[New], list[Any]]:
    return lambda new: [new(TOKENS, CHANNELS), *more]


def _two(new: New) -> list[Any]:
    return [new(TOKENS, CHANNELS), new(TOKENS, CHANNELS)]


def _rows_of_one(new: New) -> Any:
    p = new(TOKENS, 1)
    return torch.cat([p, 1 - p], -1) if isinstance(p, torch.Tensor) else np.concatenate([p, 1 - p], -1)


def _rows(new: New) -> list[Any]:
    return [new.index([1, 0, 1])] if hasattr(new, "index") else [np.array([1, 0, 1])]


# Moves keep the last axis here; how channels move through heads and slices is the law of layouts (tests/test_layout.py).
EXAMPLES: dict[Any, Example] = {
    LINEAR[0]: Example(lambda new: [new(TOKENS, CHANNELS), new(OUTPUTS, CHANNELS), new(OUTPUTS)], lambda x, W, b: x @ W.T + b),
    LAYER_NORM[0]: Example(lambda new: [new(TOKENS, CHANNELS), [CHANNELS], new(CHANNELS), new(CHANNELS), EPS], _layer_norm),
    RMS_NORM[0]: Example(lambda new: [new(TOKENS, CHANNELS), [CHANNELS], new(CHANNELS), EPS], _rms),
    EMBEDDING[0]: Example(lambda new: [new(3, CHANNELS), *_rows(new)], lambda E, i: E[i]),
    PRODUCTS[0]: Example(lambda new: [new(TOKENS, CHANNELS), new(CHANNELS, CHANNELS)], np.matmul),
    PRODUCTS[1]: Example(lambda new: [new(1, TOKENS, CHANNELS), new(1, CHANNELS, CHANNELS)], np.matmul),
    ADD[0]: Example(_two, operator.add),
    SUB[0]: Example(_two, operator.sub),
    MUL[0]: Example(_two, operator.mul),
    DIV[0]: Example(_two, operator.truediv),
    CAT[0]: Example(lambda new: [_two(new)], np.concatenate),
    aten.neg.default: Example(_x, operator.neg),
    aten.relu.default: Example(_x, lambda x: (x + _abs(x)) / 2),
    aten.gelu.default: Example(_x, lambda x: x * (1 + _erf(x / _sqrt(np.array(2)))) / 2),
    aten.silu.default: Example(_x, lambda x: x / (1 + _exp(-x))),
    aten.tanh.default: Example(_x, _tanh),
    aten.sigmoid.default: Example(_x, lambda x: 1 / (1 + _exp(-x))),
    SOFTMAX[0]: Example(_with(-1), _softmax),
    SOFTMAX[1]: Example(_with(-1, False), _softmax),
    ATTENTION: Example(lambda new: [new(1, 1, TOKENS, CHANNELS) for _ in range(3)], _attention),
    aten.sum.dim_IntList: Example(_with([0]), lambda x, axes: x.sum(0)),
    aten.mean.dim: Example(_with([0]), lambda x, axes: x.sum(0) / TOKENS),
    **dict.fromkeys(PADS, Example(_with([0, 0, 0, 1]), lambda x, pads: np.concatenate([x, 0 * x[:1]]))),
    **dict.fromkeys(COPIES, Example(_x, lambda x: x)),
    CAST[0]: Example(_with(torch.float64), lambda x, dtype: x),
    CAST[1]: Example(_x, lambda x: x),
    aten.view.default: Example(_with([1, TOKENS, CHANNELS]), np.reshape),
    aten.reshape.default: Example(_with([1, TOKENS, CHANNELS]), np.reshape),
    aten._unsafe_view.default: Example(_with([1, TOKENS, CHANNELS]), np.reshape),
    aten.unsqueeze.default: Example(_with(0), np.expand_dims),
    aten.squeeze.dim: Example(lambda new: [new(1, TOKENS, CHANNELS), 0], np.squeeze),
    aten.squeeze.dims: Example(lambda new: [new(1, TOKENS, CHANNELS), [0]], lambda x, axes: x.squeeze(0)),
    aten.squeeze.default: Example(lambda new: [new(1, TOKENS, CHANNELS)], np.squeeze),
    aten.flatten.using_ints: Example(lambda new: [new(1, TOKENS, CHANNELS), 0, 1], lambda x, *_: x[0]),
    aten.unflatten.int: Example(_with(0, [1, TOKENS]), lambda x, *_: x[None]),
    aten.transpose.int: Example(lambda new: [new(1, TOKENS, CHANNELS), 0, 1], np.swapaxes),
    aten.permute.default: Example(lambda new: [new(1, TOKENS, CHANNELS), [1, 0, 2]], np.transpose),
    aten.t.default: Example(lambda new: [new(CHANNELS)], np.transpose),
    aten.expand.default: Example(_with([3, TOKENS, CHANNELS]), np.broadcast_to),
    aten.slice.Tensor: Example(_with(0, 1, 2), lambda x, *_: x[1:2]),
    aten.select.int: Example(_with(0, 1), lambda x, *_: x[1]),
    aten.split.Tensor: Example(_with(1), lambda x, size: [x[:1], x[1:]]),
    aten.split_with_sizes.default: Example(_with([1, 1]), lambda x, size: [x[:1], x[1:]]),
    aten.chunk.default: Example(_with(2), lambda x, size: [x[:1], x[1:]]),
    aten.unbind.int: Example(_x, list),
    operator.getitem: Example(_with(1), operator.getitem),
    aten.repeat_interleave.self_int: Example(_with(2, 0), lambda x, n, axis: x.repeat(n, axis)),
    aten.index.Tensor: Example(lambda new: [new(TOKENS, CHANNELS), _rows(new)], lambda x, rows: x[rows[0]]),
    aten.index_select.default: Example(lambda new: [new(TOKENS, CHANNELS), 0, *_rows(new)], lambda x, axis, rows: x[rows]),
    aten.roll.default: Example(_with([1], [0]), lambda x, *_: np.roll(x, 1, 0)),
    aten.flip.default: Example(_with([0]), lambda x, *_: x[::-1]),
}
# A group of one: x times its only matrix.
_GROUP = Example(lambda new: [new(TOKENS, CHANNELS), new(1, CHANNELS, CHANNELS)], lambda x, W: x @ W[0])
EXAMPLES |= dict.fromkeys(GROUPED, _GROUP)

# Laws that hold under a condition, on arguments that meet it.
CONDITIONAL: dict[tuple[Any, Any], Example] = {
    (RMS_NORM[0], no_gain): Example(lambda new: [new(TOKENS, CHANNELS), [CHANNELS], None, EPS], _rms),
    (MUL[0], factor_per_row): Example(lambda new: [new(TOKENS, CHANNELS), new(TOKENS, 1)], operator.mul),
    (DIV[0], factor_per_row): Example(lambda new: [new(TOKENS, CHANNELS), new(TOKENS, 1)], operator.truediv),
    (MUL[0], factor_per_row_first): Example(lambda new: [new(TOKENS, 1), new(TOKENS, CHANNELS)], operator.mul),
    (PRODUCTS[0], rows_sum_to_one): Example(lambda new: [_rows_of_one(new), new(2, CHANNELS)], np.matmul),
    (PRODUCTS[1], rows_sum_to_one): Example(lambda new: [_rows_of_one(new)[None], new(1, 2, CHANNELS)], np.matmul),
}
