"""A layout says to which channel of a map each element of a tensor belongs, and follows it through views, heads and slices.

It is an integer array that broadcasts against the tensor: ``[[[0, 1, 2, 3]]]`` for four channels on the last axis of a
``[batch, tokens, 4]`` value, ``[[[[0, 1], [2, 3]]]]`` after ``view(batch, tokens, 2, 2)``. ``-1`` marks elements that the map
leaves alone, such as the queries and keys beside the values of a fused projection. No comparison of sizes adds a guard.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Layout:
    """``index[i, j, ...]`` is the channel of the elements at ``i, j, ...``; an axis of size 1 holds for the whole axis.

    >>> Layout.last(channels=4, rank=3).index.shape
    (1, 1, 4)
    """

    index: NDArray[np.int64]

    @staticmethod
    def last(channels: int, rank: int) -> "Layout":
        """``channels`` channels along the last of ``rank`` axes."""
        return Layout(np.arange(channels).reshape([1] * (rank - 1) + [channels]))

    @staticmethod
    def of(index: NDArray[np.int64]) -> "Layout":
        """The layout in its smallest form: an axis along which nothing changes has size 1."""
        for axis, size in enumerate(index.shape):
            if size > 1:
                first = index.take([0], axis)
                index = first if (index == first).all() else index
        return Layout(index)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and np.array_equal(self.index, other.index)

    __hash__ = None  # type: ignore[assignment]  # compared by content, never a key

    @property
    def rank(self) -> int:
        return self.index.ndim

    @property
    def untouched(self) -> bool:
        """True if the map leaves every element alone."""
        return bool((self.index < 0).all())

    @property
    def on_last_axis(self) -> bool:
        """True if only the last axis tells channels apart, as the inputs and outputs of a linear do."""
        return self.rank > 0 and all(size == 1 for size in self.index.shape[:-1])

    def padded(self, rank: int) -> "Layout":
        """The same layout for a tensor with more leading axes (broadcasting)."""
        return Layout(self.index.reshape([1] * (rank - self.rank) + list(self.index.shape)))

    def blocks(self, channels: int) -> tuple[bool, ...] | None:
        """What a matrix on the channels meets along the last axis: True for all of them in their order, False for an element
        that the map leaves alone; None if the axis cuts or reorders them, or if the other axes tell more apart.

        >>> Layout(np.array([[-1, 0, 1, 2, 0, 1, 2]])).blocks(3)
        (False, True, True)
        """
        return _runs(self.index.reshape(-1), channels) if self.on_last_axis else None

    def block_axis(self, channels: int) -> int | None:
        """The axis (-1 is the last) along which every row is made of blocks, though other axes may tell rows apart."""
        for axis in range(-1, -self.rank - 1, -1):
            rows = np.moveaxis(self.index, axis, -1).reshape(-1, self.index.shape[axis])
            if all(_runs(row, channels) is not None for row in rows):
                return axis
        return None

    def is_plain(self, channels: int) -> bool:
        """True if it is all channels in their order, once each: a map's vector then only needs a view."""
        return np.array_equal(self.index.reshape(-1), np.arange(channels))


def _runs(row: NDArray[np.int64], channels: int) -> tuple[bool, ...] | None:
    whole, found, at = np.arange(channels), [], 0
    while at < len(row):
        found.append(bool(row[at] >= 0))
        if row[at] >= 0 and not np.array_equal(row[at : at + channels], whole):
            return None
        at += channels if row[at] >= 0 else 1
    return tuple(found)


def forward(node: fx.Node, argument: int, layout: Layout) -> "Layout | list[Layout] | None":
    """The layout of ``node``'s output when its ``argument`` has ``layout``; None if the channels do not survive the op."""
    step = STEPS.get(node.target, STEPS_BY_POSITION.get((node.target, argument)))
    return step[0](node, layout) if step else None


def backward(node: fx.Node, argument: int, layout: Any) -> "Layout | list[Layout] | None":
    """The layout that ``argument`` of ``node`` must have for the output to have ``layout``; None if there is none."""
    step = STEPS.get(node.target, STEPS_BY_POSITION.get((node.target, argument)))
    found = step[1](node, layout) if step else None
    # A step back may lose what two elements disagreed on (the heads of a group): walking it forward again tells.
    return found if found is not None and _same_layout(forward_any(node, argument, found), layout) else None


def forward_any(node: fx.Node, argument: int, layout: Any) -> Any:
    """As ``forward``, for an operand that is a list of tensors too (what getitem reads)."""
    return layout[node.args[1]] if node.target is operator.getitem else forward(node, argument, layout)


def same(m: Any, n: Any) -> bool:
    """Two sizes are known to be equal, without adding a guard on a symbolic one."""
    if isinstance(m, int) and isinstance(n, int):
        return m == n
    return m is n or str(m) == str(n)


def shape(node: Any) -> list[Any]:
    """The sizes of a node's fake value."""
    return list(node.meta["val"].shape)


def _same_layout(a: Any, b: Any) -> bool:
    if isinstance(a, Layout) and isinstance(b, Layout):
        return a == b or (a.untouched and b.untouched)
    return isinstance(a, list) and isinstance(b, list) and len(a) == len(b) and all(map(_same_layout, a, b))


def _groups(a: Sequence[Any], b: Sequence[Any]) -> list[tuple[int, int, int, int]]:
    """Cut two shapes of one reshape into the smallest runs ``a[i:j]``, ``b[k:l]`` with the same number of elements."""
    start = 0
    while start < min(len(a), len(b)) and same(a[start], b[start]):
        start += 1
    groups = [(n, n + 1, n, n + 1) for n in range(start)]
    j, l = len(a), len(b)
    while j > start and l > start:
        i, k = j - 1, l - 1
        m, n = a[i], b[k]
        while not same(m, n) and isinstance(m, int) and isinstance(n, int):
            if m < n and i > start:
                i, m = i - 1, m * a[i - 1]
            elif n < m and k > start:
                k, n = k - 1, n * b[k - 1]
            else:
                break
        if not same(m, n):
            break
        groups.append((i, j, k, l))
        j, l = i, k
    return [*groups, (start, j, start, l)]


def _reshape(layout: Layout, a: Sequence[Any], b: Sequence[Any]) -> Layout | None:
    expanded, result = list(layout.index.shape), [1] * len(b)
    for i, j, k, l in _groups(a, b):
        if all(size == 1 for size in layout.index.shape[i:j]):
            continue
        if not all(isinstance(size, int) for size in [*a[i:j], *b[k:l]]):
            return None
        expanded[i:j], result[k:l] = a[i:j], b[k:l]
    return Layout.of(np.broadcast_to(layout.index, expanded).reshape(result))


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _axis(node: fx.Node, position: int = 1, default: int = 0, rank: int | None = None) -> int:
    return int(_argument(node, position, "dim", default)) % (rank or len(shape(node.args[0])))


def _order(node: fx.Node) -> list[int]:
    rank = len(shape(node.args[0]))
    order = list(range(rank))
    if node.target is aten.permute.default:
        return [d % rank for d in node.args[1]]  # type: ignore[union-attr, operator, misc]  # a list of ints, by the schema
    i, j = (0, rank - 1) if node.target is aten.t.default else (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
    order[i], order[j] = order[j], order[i]
    return order


def _without_leading(layout: Layout, rank: int) -> Layout | None:
    """The layout without the leading axes that broadcasting added, if they tell no channels apart."""
    extra = layout.rank - rank
    plain = all(size == 1 for size in layout.index.shape[:extra])
    return Layout(layout.index.reshape(layout.index.shape[extra:])) if plain else None


def _whole(node: fx.Node, axis: int, layout: Layout) -> NDArray[np.int64] | None:
    """An array of -1 as long as the argument along ``axis`` and like ``layout`` elsewhere, to write a part into."""
    size = shape(node.args[0])[axis]
    sizes = list(layout.index.shape)
    sizes[axis : axis + 1] = [size]
    return np.full(sizes, -1) if isinstance(size, int) else None


def _cut(node: fx.Node) -> tuple[int, slice] | None:
    start, end, step = (_argument(node, n, name, d) for n, name, d in ((2, "start", None), (3, "end", None), (4, "step", 1)))
    plain = all(bound is None or isinstance(bound, int) for bound in (start, end, step))
    return (_axis(node), slice(start, end, step)) if plain else None


def _slice(node: fx.Node, layout: Layout) -> Layout | None:
    axis = _axis(node)
    if layout.index.shape[axis] == 1:
        return layout
    cut = _cut(node)
    return Layout.of(layout.index[(slice(None),) * axis + (cut[1],)]) if cut else None


def _slice_back(node: fx.Node, layout: Layout) -> Layout | None:
    cut = _cut(node)
    whole = _whole(node, _axis(node), layout)
    if cut is None or whole is None:
        return None
    whole[(slice(None),) * cut[0] + (cut[1],)] = layout.index
    return Layout.of(whole)


def _select(node: fx.Node, layout: Layout) -> Layout | None:
    axis, at = _axis(node), node.args[2]
    if layout.index.shape[axis] == 1:
        return Layout(layout.index.squeeze(axis))
    return Layout.of(layout.index.take([at], axis).squeeze(axis)) if isinstance(at, int) else None


def _select_back(node: fx.Node, layout: Layout) -> Layout | None:
    axis, at = _axis(node), node.args[2]
    whole = _whole(node, axis, Layout(np.expand_dims(layout.index, axis)))
    if whole is None or not isinstance(at, int):
        return None
    whole[(slice(None),) * axis + (at,)] = layout.index
    return Layout.of(whole)


def _parts(node: fx.Node) -> tuple[int, list[Any]]:
    """The axis of a split and the size of every part (None where unbind drops the axis)."""
    axis = _axis(node, 1 if node.target is aten.unbind.int else 2)
    gone = node.target is aten.unbind.int
    return axis, [None if gone else part.shape[axis] for part in node.meta["val"]]


def _split(node: fx.Node, layout: Layout) -> list[Layout] | None:
    axis, sizes = _parts(node)
    gone = sizes[0] is None
    if layout.index.shape[axis] == 1:
        return [Layout(layout.index.squeeze(axis)) if gone else layout] * len(sizes)
    if gone:
        return [Layout.of(layout.index.take([i], axis).squeeze(axis)) for i in range(len(sizes))]
    if not all(isinstance(size, int) for size in sizes):
        return None
    return [Layout.of(part) for part in np.split(layout.index, np.cumsum(sizes)[:-1].tolist(), axis)]


def _split_back(node: fx.Node, layouts: list[Layout]) -> Layout | None:
    axis, sizes = _parts(node)
    gone = sizes[0] is None
    if not all(size is None or isinstance(size, int) for size in sizes):
        return None
    pieces = [np.expand_dims(part.index, axis) if gone else part.index for part in layouts]
    common = list(np.broadcast_shapes(*(piece.take([0], axis).shape for piece in pieces)))
    lengths = [1 if gone else size for size in sizes]
    wide = [np.broadcast_to(p, [*common[:axis], n, *common[axis + 1 :]]) for p, n in zip(pieces, lengths, strict=True)]
    return Layout.of(np.concatenate(wide, axis))


def _getitem_back(node: fx.Node, layout: Layout) -> list[Layout]:
    parts = node.args[0].meta["val"]  # type: ignore[union-attr]  # getitem reads the node of a split
    return [layout if i == node.args[1] else Layout(np.full([1] * part.ndim, -1)) for i, part in enumerate(parts)]


def _repeat(node: fx.Node, layout: Layout) -> Layout | None:
    axis = _argument(node, 2, "dim", None)
    if not isinstance(axis, int) or not isinstance(node.args[1], int):
        return None
    return layout if layout.index.shape[axis] == 1 else Layout(layout.index.repeat(node.args[1], axis))


def _repeat_back(node: fx.Node, layout: Layout) -> Layout | None:
    axis = _argument(node, 2, "dim", None)
    if not isinstance(axis, int) or not isinstance(node.args[1], int):
        return None
    axis %= layout.rank
    every = slice(None, None, node.args[1])
    return layout if layout.index.shape[axis] == 1 else Layout.of(layout.index[(slice(None),) * axis + (every,)])


def _index(node: fx.Node, layout: Layout) -> Layout | None:
    """Rows picked from leading axes: ``x[rows]``; the axes behind keep their channels."""
    picked: Any = node.args[1]
    if any(i is None for i in picked):
        return None
    gone = sum(i.meta["val"].ndim if i.meta["val"].dtype is torch.bool else 1 for i in picked)  # a mask takes all of its axes
    if any(size != 1 for size in layout.index.shape[:gone]):
        return None
    kept = Layout(layout.index.reshape(layout.index.shape[gone:]))
    return kept.padded(len(shape(node)))


def _index_back(node: fx.Node, layout: Layout) -> Layout | None:
    """The axes behind those that rows were picked from keep their channels."""
    picked: Any = node.args[1]
    if any(i is None for i in picked):
        return None
    gone = sum(i.meta["val"].ndim if i.meta["val"].dtype is torch.bool else 1 for i in picked)
    behind = len(shape(node.args[0])) - gone
    kept = layout.index.shape[layout.rank - behind :]
    plain = all(size == 1 for size in layout.index.shape[: layout.rank - behind])
    return Layout(layout.index.reshape([1] * gone + list(kept))) if plain else None


def _along_others(axes: Callable[[fx.Node, int], list[int] | None]) -> Callable[[fx.Node, Layout], Layout | None]:
    """An op that moves or picks along axes that tell no channels apart keeps the layout."""

    def step(node: fx.Node, layout: Layout) -> Layout | None:
        touched = axes(node, layout.rank)
        fine = touched is not None and all(layout.index.shape[axis] == 1 for axis in touched)
        return layout if fine else None

    return step


def _rolled(node: fx.Node, rank: int) -> list[int] | None:
    axes = _argument(node, 2 if node.target is aten.roll.default else 1, "dims", [])
    return [int(axis) % rank for axis in axes] or None


def _padded_axes(node: fx.Node, rank: int) -> list[int] | None:
    """Zeros beside the channels' axis: a scale does not change them."""
    pads: Any = node.args[1]
    general = node.target is aten.pad.default
    filler = _argument(node, 3, "value", 0) if general else _argument(node, 2, "value", 0)
    if filler not in (0, None) or (general and _argument(node, 2, "mode", "constant") != "constant"):
        return None
    return [rank - 1 - i // 2 for i in range(len(pads)) if not same(pads[i], 0)]


def _reduce(node: fx.Node, layout: Layout) -> Layout | None:
    axes = _argument(node, 1, "dim", None)
    if not axes:
        return None
    gone = [int(axis) % layout.rank for axis in axes]
    if any(layout.index.shape[axis] != 1 for axis in gone):
        return None
    return layout if _argument(node, 2, "keepdim", False) else Layout(layout.index.squeeze(tuple(gone)))


def _reduce_back(node: fx.Node, layout: Layout) -> Layout | None:
    rank = len(shape(node.args[0]))
    axes = _argument(node, 1, "dim", None)
    if not axes:
        return None
    gone = sorted(int(axis) % rank for axis in axes)
    if not _argument(node, 2, "keepdim", False):
        return Layout(np.expand_dims(layout.index, tuple(gone)))
    return layout if all(layout.index.shape[axis] == 1 for axis in gone) else None


def _attend(node: fx.Node, layout: Layout) -> Layout | None:
    """``[batch, heads, keys, dim]`` to ``[batch, query heads, queries, dim]``."""
    if layout.rank < 2 or layout.index.shape[-2] != 1:
        return None
    index = layout.index
    if node.target is aten.scaled_dot_product_attention.default and node.kwargs.get("enable_gqa") and index.shape[-3] > 1:
        queries, keys = shape(node.args[0])[-3], shape(node.args[2])[-3]
        if not isinstance(queries, int) or not isinstance(keys, int):
            return None
        index = index.repeat(queries // keys, -3)
    return Layout(index).padded(len(shape(node)))


def _attend_back(node: fx.Node, layout: Layout) -> Layout | None:
    values: Any = node.args[2 if node.target is aten.scaled_dot_product_attention.default else 1]
    sizes = shape(values)
    inner = _without_leading(layout, len(sizes)) if layout.rank >= len(sizes) >= 2 else None
    if inner is None or inner.index.shape[-2] != 1:
        return None
    index = inner.index
    if node.kwargs.get("enable_gqa") and index.shape[-3] > 1:
        queries = shape(node.args[0])[-3]
        if not isinstance(queries, int) or not isinstance(sizes[-3], int):
            return None
        index = index[..., :: queries // sizes[-3], :, :]
    return Layout.of(index)


def _broadcast(node: fx.Node, layout: Layout) -> Layout:
    return layout.padded(len(shape(node)))


def _operand(position: int) -> "Step":
    """An elementwise op of several operands: the layout of one of them, with the leading axes that broadcasting adds."""
    return _broadcast, lambda node, layout: _without_leading(layout, len(shape(node.args[position])))


Step = tuple[Callable[[fx.Node, Any], Any], Callable[[fx.Node, Any], Any]]
_RESHAPE: Step = (
    lambda node, layout: _reshape(layout, shape(node.args[0]), shape(node)),
    lambda node, layout: _reshape(layout, shape(node), shape(node.args[0])),
)
_PERMUTE: Step = (
    lambda node, layout: Layout(layout.index.transpose(_order(node))),
    lambda node, layout: Layout(layout.index.transpose(np.argsort(_order(node)))),
)
_KEEP: Step = (lambda node, layout: layout, lambda node, layout: layout)

RESHAPES = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.squeeze.default, aten.flatten.using_ints, aten.unflatten.int,
)  # fmt: skip
PERMUTES = (aten.transpose.int, aten.permute.default, aten.t.default)
COPIES = (aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default)
SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)
ATTENTION = aten.scaled_dot_product_attention.default
PRODUCTS = (aten.matmul.default, aten.bmm.default)

# How a layout goes forward and backward through an op: on its first argument, or on the argument named.
STEPS: dict[Any, Step] = {
    **dict.fromkeys(RESHAPES, _RESHAPE),
    **dict.fromkeys(PERMUTES, _PERMUTE),
    **dict.fromkeys(COPIES, _KEEP),
    **dict.fromkeys(SPLITS, (_split, _split_back)),
    aten.expand.default: (
        _broadcast,
        lambda node, layout: _without_leading(layout, len(shape(node.args[0]))),
    ),
    aten.slice.Tensor: (_slice, _slice_back),
    aten.select.int: (_select, _select_back),
    operator.getitem: (lambda node, layouts: layouts[node.args[1]], _getitem_back),
    aten.repeat_interleave.self_int: (_repeat, _repeat_back),
    aten.index.Tensor: (_index, _index_back),
    aten.roll.default: (_along_others(_rolled), _along_others(_rolled)),
    aten.flip.default: (_along_others(_rolled), _along_others(_rolled)),
    **dict.fromkeys((aten.constant_pad_nd.default, aten.pad.default), (_along_others(_padded_axes),) * 2),
    aten.index_select.default: (_along_others(lambda node, rank: [_axis(node)]),) * 2,
    aten.mean.dim: (_reduce, _reduce_back),
    aten.sum.dim_IntList: (_reduce, _reduce_back),
    **dict.fromkeys((aten.relu.default, aten.neg.default, aten.to.dtype, aten._to_copy.default), _KEEP),
    **dict.fromkeys((aten.rms_norm.default, aten.layer_norm.default), _KEEP),
}
STEPS_BY_POSITION: dict[tuple[Any, int], Step] = {
    (ATTENTION, 2): (_attend, _attend_back),
    **{(op, 1): (_attend, _attend_back) for op in PRODUCTS},
    **{(op, n): _operand(n) for op in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor) for n in (0, 1)},
}
