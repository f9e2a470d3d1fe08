"""A region: the producers and readers that share one channel axis, closed under the ops that a map may cross.

From a cut (a value) the map is walked back to what makes the value and forth to everything that reads it, by the table of laws.
Where a reader cannot take the map one explicit inverse may be left over; where that is not allowed the walk ends in a Refusal.
Nothing is changed here: ``fxquant.graph.equivalence.apply`` writes a region's decisions into the graph.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import fx

from .effects import writers_of
from .laws import MOVES, MUL, RMS_NORM, Effect, Law, Map, Rotation, Scale, laws_of
from .layout import ATTENTION, COPIES, PERMUTES, PRODUCTS, RESHAPES, Layout, backward, forward, forward_any, same, shape
from .weights import parameter_only

aten = torch.ops.aten


# These look at the shape and the type of a tensor, not at what is in it.
SHAPE_ONLY = (
    aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default, aten._assert_tensor_metadata.default,
    aten.zeros_like.default, aten.ones_like.default, aten.empty_like.default, aten.full_like.default,
    aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default,
)  # fmt: skip


class Explicit(Enum):
    """Where a map that nothing absorbs may stay in the graph as an op of its own."""

    NOWHERE = "nowhere"  # a region is refused if anything cannot absorb the map; operands of an add are made to agree
    READERS = "readers"  # the inverse before a reader: the shortcut of a post-norm block, a graph's output
    SOURCE = "source"  # the map after the cut, for the readers that absorb its inverse; the others read the value as it was


@dataclass(frozen=True)
class Refusal:
    """Why a map cannot be moved, and the node that is in the way."""

    reason: str
    node: fx.Node

    def __str__(self) -> str:
        return f"{self.reason} (at '{self.node.name}')"


@dataclass(frozen=True, eq=False)
class Site:
    """Where a region ends: ``argument`` of ``node`` reads ``value`` (None: ``node`` makes it), laid out as ``layout``."""

    node: fx.Node
    argument: int | str | None
    value: fx.Node
    layout: Layout
    law: Law | None = None  # None: an explicit inverse, or a constant operand that takes the map itself


@dataclass(frozen=True, eq=False)
class Region:
    """What one map on ``cut`` touches: who absorbs it at the front, who at the back, and what is left over."""

    cut: fx.Node
    kind: type[Map]
    channels: int
    carried: dict[fx.Node, Any]  # value -> Layout, or a list of them for the parts of a split
    producers: tuple[Site, ...]
    readers: tuple[Site, ...]
    constants: tuple[Site, ...]  # operands of an agreeing add that depend on parameters only
    explicit: tuple[Site, ...]
    at_source: bool = False
    joined: frozenset[fx.Node] = frozenset()

    def __repr__(self) -> str:
        names = ", ".join(site.node.name for site in self.readers)
        what = f"{self.kind.__name__} on '{self.cut.name}' of {self.channels}"
        return f"Region({what}: read by {names}; {len(self.explicit)} explicit)"


def find(gm: fx.GraphModule, cut: fx.Node, kind: type[Map], *, explicit: Explicit = Explicit.READERS) -> Region | Refusal:
    """The region of a map of ``kind`` on the last axis of ``cut``, or why there is none. Nothing is changed.

    A region in which no matrix product absorbs the map is refused: it would only add an op.
    """
    value = cut.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.ndim == 0 or not value.is_floating_point():
        return Refusal("a map needs a floating point tensor with a channel axis", cut)
    channels = value.shape[-1]
    if not isinstance(channels, int):
        return Refusal(f"the number of channels must be known, and is {channels}", cut)
    return _Walk(cut, kind, explicit, parameter_only(gm)).region(channels)


def edges(value: fx.Node) -> Iterator[tuple[fx.Node, int | str]]:
    """Everything that reads ``value``: the reader, and which of its arguments (once, however often inside a list)."""
    for reader in value.users:
        arguments: list[tuple[int | str, Any]] = [*enumerate(reader.args), *reader.kwargs.items()]
        for argument, given in arguments:
            if value in _nodes(given):
                yield reader, argument


def source_of(value: fx.Node) -> fx.Node:
    """Where the channels of ``value`` begin: back through views, ReLU, attention and gates, to a linear, a norm or a slice."""
    while True:
        node = value
        if node.target in _LEADS_BACK:
            value = node.args[0]  # type: ignore[assignment]  # a node, by the schema
        elif node.target is ATTENTION:
            value = node.args[2]  # type: ignore[assignment]
        elif node.target in PRODUCTS:
            value = node.args[1]  # type: ignore[assignment]
        elif node.target in MUL:
            ends = [source_of(a) for a in (node.args[1], node.args[0]) if isinstance(a, fx.Node)]
            made = [end for end in ends if end.target in MOVES or laws_of(end.target, None, Scale)]
            return made[0] if made else node
        else:
            return node


def _nodes(argument: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(argument, found.append)
    return found


class _Refused(Exception):
    """Carries a Refusal out of the recursion; it never leaves this file."""

    def __init__(self, reason: str, node: fx.Node) -> None:
        self.refusal = Refusal(reason, node)


class _Walk:
    """The search for one region. ``carried`` grows until every producer and every reader of every carried value is decided."""

    def __init__(self, cut: fx.Node, kind: type[Map], explicit: Explicit, weights: set[fx.Node]) -> None:
        self.cut, self.kind, self.explicit, self.weights = cut, kind, explicit, weights
        self.carried: dict[fx.Node, Any] = {}
        self.entered_by: dict[fx.Node, fx.Node] = {}  # the operand through which an op carries the map on
        self.joined: set[fx.Node] = set()  # ops whose operands all carry it
        self.needed: set[fx.Node] = set()  # values that were asked for, not merely reached
        self.producers: list[Site] = []
        self.readers: list[Site] = []
        self.constants: list[Site] = []
        self.leftovers: list[Site] = []
        self.passed: list[tuple[fx.Node, fx.Node, int]] = []
        self.why: dict[fx.Node, str] = {}
        self.at_source = False

    def region(self, channels: int) -> Region | Refusal:
        try:
            layout = Layout.last(channels, self.cut.meta["val"].ndim)
            self._start(layout)
            done: set[fx.Node] = set()
            while waiting := [value for value in self.carried if value not in done]:
                for value in waiting:
                    done.add(value)
                    if (writer := next(writers_of(value), None)) is not None:
                        raise _Refused(f"{_name(writer)} writes to the value in place", writer)
                    for reader, argument in edges(value):
                        self._read(value, reader, argument)
            self._prune()
        except _Refused as refused:
            return refused.refusal
        if not any(site.law and site.law.whole_axis for site in self.readers):
            why = next((f": {reason}" for reason in self.why.values()), "")
            return Refusal(f"no linear that reads '{self.cut.name}' can absorb the map{why}", self.cut)
        if self.explicit is Explicit.NOWHERE and self.leftovers:
            site = self.leftovers[0]
            return Refusal(self.why[site.node], site.node)
        return Region(
            self.cut, self.kind, channels, self.carried, tuple(self.producers), tuple(self.readers), tuple(self.constants),
            tuple(self.leftovers), self.at_source, frozenset(self.joined),
        )  # fmt: skip

    def _start(self, layout: Layout) -> None:
        if self.explicit is Explicit.SOURCE:
            self.at_source = True
            self._carry(self.cut, layout)
            self.needed.add(self.cut)
        else:
            self._demand(self.cut, layout)

    def _carry(self, value: fx.Node, layout: Any) -> bool:
        """Note that ``value`` carries the map; False if it carries it otherwise already."""
        if value in self.carried:
            return bool(self.carried[value] == layout)
        if isinstance(layout, Layout) and not _belongs(layout, value):
            return False
        if self.kind is Rotation and not _whole(value, layout):
            return False
        self.carried[value] = layout
        return True

    def _demand(self, value: fx.Node, layout: Any) -> None:
        """Make ``value`` carry the map, by what produces it; raises _Refused."""
        if value in self.carried:
            if self.carried[value] == layout:
                return
            raise _Refused("two ways lead here with different channels", value)
        if not self._carry(value, layout):
            raise _Refused(f"{_name(value)} does not have all the channels", value)
        self.needed.add(value)
        refusal = _Refused(f"{_name(value)} cannot produce the map", value)
        if isinstance(layout, Layout):
            for law in laws_of(value.target, None, self.kind):
                if self._fits(law, value, layout):
                    self.producers.append(Site(value, None, value, layout, law))
                    return
        for argument in range(len(value.args)):
            for law in laws_of(value.target, argument, self.kind):
                if law.effect in (Effect.PASSES, Effect.AGREES) and (law.only_if is None or law.only_if(value)):
                    state = self._state()
                    try:
                        return self._demand_operands(value, argument, law, layout)
                    except _Refused as refused:
                        refusal = refused
                        self._restore(state)
        raise refusal

    def _demand_operands(self, value: fx.Node, argument: int, law: Law, layout: Any) -> None:
        operands = _nodes(value.args[argument]) if law.effect is Effect.PASSES else value.all_input_nodes
        numbers = law.effect is Effect.AGREES and _has_number(value)
        twice = sum(operands[:1] == [n] for a in value.args for n in _nodes(a)) > 1
        if not operands or numbers or twice or (law.effect is Effect.PASSES and operands[0] in self.weights):
            raise _Refused(f"{_name(value)} has an operand that cannot carry the map", value)
        if law.effect is Effect.PASSES:
            inner = backward(value, argument, layout)
            if inner is None:
                raise _Refused(f"the channels of {_name(value)} do not lead back to its argument", value)
            self.entered_by[value] = operands[0]
            self._demand(operands[0], inner)
            return
        self.joined.add(value)
        self._agree(value, layout, None)

    def _agree(self, value: fx.Node, layout: Layout, known: fx.Node | None) -> None:
        """Every other operand of an add or cat takes the map too."""
        for n, operand in self._operands(value):
            if operand is known:
                continue
            inner = layout if value.target is aten.cat.default else backward(value, n, layout)
            if not isinstance(inner, Layout):
                raise _Refused(f"the operands of {_name(value)} differ in their channels", value)
            if operand in self.weights:
                self.constants.append(Site(value, 0 if value.target is aten.cat.default else n, operand, inner))
            elif not _empty(operand):
                self._demand(operand, inner)

    @staticmethod
    def _operands(value: fx.Node) -> list[tuple[int, fx.Node]]:
        parts: Any = value.args[0]
        given = [(0, part) for part in parts] if value.target is aten.cat.default else list(enumerate(value.args[:2]))
        return [(n, a) for n, a in given if isinstance(a, fx.Node)]

    def _read(self, value: fx.Node, reader: fx.Node, argument: int | str) -> None:
        """Decide one edge: the reader absorbs the map, passes it on, or an inverse is left over."""
        layout = self.carried[value]
        if reader.target in SHAPE_ONLY:
            return
        if reader in self.carried and (self.entered_by.get(reader) is value or reader in self.joined):
            self.passed.append((value, reader, int(argument)))
            return
        reason = f"{_name(reader)} stops it"
        if isinstance(argument, int) and reader.op == "call_function":
            for law in laws_of(reader.target, argument, self.kind):
                taken = self._try(law, value, reader, argument, layout)
                if taken is True:
                    return
                reason = taken or reason
        if reader.op == "output":
            reason = "it is an output of the graph"
        if not isinstance(layout, Layout):
            raise _Refused(reason, reader)
        self.why.setdefault(reader, reason)
        if self.explicit is Explicit.NOWHERE:
            raise _Refused(reason, reader)
        self.leftovers.append(Site(reader, argument, value, layout))

    def _try(self, law: Law, value: fx.Node, reader: fx.Node, argument: int, layout: Any) -> bool | str:
        """True if ``law`` decides the edge; otherwise the reason why not."""
        if law.effect is Effect.STOPS:
            return f"{_name(reader)} stops it: {law.says}"
        if law.effect is Effect.READ:
            if not self._fits(law, reader, layout):
                return f"{_name(reader)} has no weight to take it"
            self.readers.append(Site(reader, argument, value, layout, law))
            return True
        if law.only_if is not None and not law.only_if(reader):
            return f"{_name(reader)} does not meet the condition of: {law.says}"
        agrees = law.effect is Effect.AGREES
        carried_on = self._agreed(reader, layout, argument) if agrees else forward_any(reader, argument, layout)
        if carried_on is None:
            return f"{_name(reader)} mixes the channels with another axis"
        if isinstance(carried_on, Layout) and carried_on.untouched:
            return True
        if isinstance(carried_on, Layout) and not reader.meta["val"].is_floating_point():
            return f"{_name(reader)} rounds it"
        others = [n for n in reader.all_input_nodes if n is not value and n in self.carried]
        twice = sum(value in _nodes(a) for a in reader.args) > 1
        if law.effect is Effect.PASSES and (reader in self.carried or (others and law.kind is not Rotation) or twice):
            return f"two operands of {_name(reader)} carry it"
        if law.effect is Effect.AGREES:
            return self._join(value, reader, argument, carried_on)
        if not self._carry(reader, carried_on):
            return f"{_name(reader)} carries it otherwise"
        self.entered_by[reader] = value
        self.passed.append((value, reader, argument))
        return True

    def _agreed(self, reader: fx.Node, layout: Layout, argument: int) -> Layout | None:
        """The layout of a sum or a concatenation whose operands all have ``layout``."""
        if reader.target is not aten.cat.default:
            found = forward(reader, argument, layout)
            return found if isinstance(found, Layout) else None
        axis: Any = reader.args[1] if len(reader.args) > 1 else reader.kwargs.get("dim", 0)
        axis %= layout.rank
        return layout if layout.index.shape[axis] == 1 else None

    def _join(self, value: fx.Node, reader: fx.Node, argument: int, layout: Layout) -> bool | str:
        """An add or cat: carried on if the other operands carry the same map already, are constants, or can be made to."""
        if _has_number(reader):
            return f"a number is added by {_name(reader)}"
        others = [(n, operand) for n, operand in self._operands(reader) if operand is not value]
        others = [(n, operand) for n, operand in others if operand not in self.weights and not _empty(operand)]
        missing = [operand for n, operand in others if self.carried.get(operand) != self._operand_layout(reader, n, layout)]
        if missing and self.explicit is not Explicit.NOWHERE:
            return f"the other operand of {_name(reader)}, '{missing[0].name}', does not carry it"
        state = self._state()
        if not self._carry(reader, layout):
            return f"{_name(reader)} carries it otherwise"
        self.joined.add(reader)
        try:
            self._agree(reader, layout, value)
        except _Refused as refused:
            self._restore(state)
            return str(refused.refusal)
        # An operand that came first was taken for a leftover: it agrees after all.
        self.leftovers = [site for site in self.leftovers if site.node is not reader]
        self.why.pop(reader, None)
        for n, operand in self._operands(reader):
            if operand in self.carried:
                self.passed.append((operand, reader, n))
        return True

    def _operand_layout(self, reader: fx.Node, argument: int, layout: Layout) -> Any:
        return layout if reader.target is aten.cat.default else backward(reader, argument, layout)

    def _fits(self, law: Law, node: fx.Node, layout: Any) -> bool:
        """The op has weights that depend on parameters only, and its channels lie as the law needs them."""
        if not isinstance(layout, Layout) or (law.whole_axis and not layout.on_last_axis):
            return False
        if law.only_if is not None and not law.only_if(node):
            return False
        given = [node.args[n] if n < len(node.args) else None for n in law.weights]
        if not all(w is None or w in self.weights for w in given):
            return False
        return node.target in _OPTIONAL or all(w is not None for w in given)

    def _prune(self) -> None:
        """Where nothing further on absorbs the map it is not carried on: one inverse now costs less than several later."""
        if self.explicit is Explicit.NOWHERE:
            return
        useful = {site.value for site in self.readers} | self.needed
        changed = True
        while changed:
            more = {value for value, reader, _ in self.passed if reader in useful} - useful
            # The parts of a split have no tensor before getitem: an inverse can only come after it.
            split = {value for value in useful if isinstance(self.carried[value], list)}
            more |= {reader for value, reader, _ in self.passed if value in split} - useful
            useful |= more
            changed = bool(more)
        kept = {value: layout for value, layout in self.carried.items() if value in useful}
        ends = [(value, reader, n) for value, reader, n in self.passed if value in kept and reader not in kept]
        self.leftovers = [site for site in self.leftovers if site.value in kept]
        self.leftovers += [Site(reader, n, value, kept[value]) for value, reader, n in ends]
        self.constants = [site for site in self.constants if site.node in kept]
        self.joined &= set(kept)
        self.carried = kept

    def _state(self) -> tuple[Any, ...]:
        return (
            dict(self.carried), dict(self.entered_by), set(self.joined), set(self.needed), list(self.producers),
            list(self.readers), list(self.constants), list(self.leftovers), list(self.passed),
        )  # fmt: skip

    def _restore(self, state: tuple[Any, ...]) -> None:
        (
            self.carried, self.entered_by, self.joined, self.needed, self.producers,
            self.readers, self.constants, self.leftovers, self.passed,
        ) = state  # fmt: skip


_LEADS_BACK = (*RESHAPES, *PERMUTES, *COPIES, aten.expand.default, aten.relu.default, aten.repeat_interleave.self_int)
_OPTIONAL = (aten.linear.default, aten.layer_norm.default, *RMS_NORM)  # a bias or a gain may be absent


def _name(node: fx.Node) -> str:
    op = getattr(node.target, "__name__", str(node.target)).split(".")[0]
    return f"{op} '{node.name}'"


def _empty(node: fx.Node) -> bool:
    """A tensor without elements, such as the cache of the first step."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and any(isinstance(size, int) and size == 0 for size in value.shape)


def _has_number(node: fx.Node) -> bool:
    """An add or sub of a Python number."""
    return node.target is not aten.cat.default and not all(isinstance(a, fx.Node) for a in node.args[:2])


def _belongs(layout: Layout, value: fx.Node) -> bool:
    """The tensor has an element for every entry of the layout: a sum's operand that is broadcast over the channels has not."""
    sizes = shape(value)
    return layout.rank == len(sizes) and all(n == 1 or same(n, size) for n, size in zip(layout.index.shape, sizes, strict=True))


def _whole(value: fx.Node, layout: Any) -> bool:
    size = value.meta["val"].shape[-1] if isinstance(layout, Layout) else None
    return isinstance(size, int) and layout.on_last_axis and layout.is_plain(size)
