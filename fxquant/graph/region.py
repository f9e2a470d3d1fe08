"""A region: the producers and readers that share one channel axis, closed under the ops that a map may cross.

From a cut (a value) the map is walked back to what makes the value and forth to everything that reads it, by the table of laws.
Where a reader cannot take the map one explicit inverse may be left over; where that is not allowed the walk ends in a Refusal.
Nothing is changed here: ``fxquant.graph.equivalence.apply`` writes a region's decisions into the graph.
"""

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import fx

from .effects import writers_of
from .laws import DIV, MOVES, MUL, NORMS, RMS_NORM, Centre, Effect, Law, Map, Matrix, Scale, laws_of
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
    ENDS = "ends"  # the map where it cannot be made, its inverse where it cannot be read; operands of an add are made to agree


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
    entries: dict[fx.Node, tuple[tuple[fx.Node, int], ...]]  # value that no op makes so -> where it is read with the map on it
    joined: frozenset[fx.Node] = frozenset()

    def __repr__(self) -> str:
        names = ", ".join(site.node.name for site in self.readers)
        what = f"{self.kind.__name__} on '{self.cut.name}' of {self.channels}"
        return f"Region({what}: read by {names}; {self.cost} explicit)"

    @property
    def cost(self) -> int:
        """How many ops it would leave in the graph."""
        return len({site.value for site in self.explicit} | set(self.entries))


def find(
    gm: fx.GraphModule, cut: fx.Node, kind: type[Map], *, explicit: Explicit = Explicit.READERS,
    plain: Collection[fx.Node] = (), ends: Collection[fx.Node] = (),
) -> Region | Refusal:
    """The region of a map of ``kind`` on the last axis of ``cut``, or why there is none. Nothing is changed.

    A region in which no matrix product absorbs the map is refused: it would only add an op. To look ahead: ``plain`` norms are
    taken for RMS norms without a gain, and at ``ends`` the map is not carried on.
    """
    value = cut.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.ndim == 0 or not value.is_floating_point():
        return Refusal("a map needs a floating point tensor with a channel axis", cut)
    channels = value.shape[-1]
    if not isinstance(channels, int):
        return Refusal(f"the number of channels must be known, and is {channels}", cut)
    if channels < 2 and issubclass(kind, Matrix):
        return Refusal("one channel cannot be turned", cut)
    with _room_for(len(gm.graph.nodes)):
        return _Walk(cut, kind, explicit, parameter_only(gm), plain, ends).region(channels)


def edges(value: fx.Node) -> Iterator[tuple[fx.Node, int | str]]:
    """Everything that reads ``value``: the reader, and which of its arguments (once, however often inside a list)."""
    for reader in value.users:
        arguments: list[tuple[int | str, Any]] = [*enumerate(reader.args), *reader.kwargs.items()]
        for argument, given in arguments:
            if value in _nodes(given):
                yield reader, argument


def source_of(value: fx.Node) -> fx.Node:
    """Where the channels of ``value`` begin: back through views, ReLU, attention and gates, to a linear, a norm or a slice."""
    begins: dict[fx.Node, fx.Node] = {}
    stack = [value]
    while stack:
        node = stack[-1]
        back = _back(node)
        if unknown := [n for n in back if n not in begins]:
            stack += unknown
            continue
        ends = [begins[n] for n in back]
        if node.target in MUL:
            ends = [end for end in ends if end.target in MOVES or laws_of(end.target, None, Scale)]
        begins[stack.pop()] = ends[0] if ends else node
    return begins[value]


def _back(node: fx.Node) -> list[fx.Node]:
    """The operands that the channels of ``node`` may come from, the likeliest first."""
    places = (
        (0,) if node.target in _LEADS_BACK else (2,) if node.target is ATTENTION
        else (1,) if node.target in PRODUCTS else (1, 0) if node.target in MUL else ()
    )  # fmt: skip
    return [n for n in (node.args[place] for place in places) if isinstance(n, fx.Node)]


def _nodes(argument: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(argument, found.append)
    return found


@contextmanager
def _room_for(nodes: int) -> Iterator[None]:
    """The walk calls itself along the residual stream: three calls for a node, and a model may have a thousand blocks."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(before + 4 * nodes)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


class _Refused(Exception):
    """Carries a Refusal out of the recursion; it never leaves this file."""

    def __init__(self, reason: str, node: fx.Node) -> None:
        self.refusal = Refusal(reason, node)


class _Walk:
    """The search for one region. ``carried`` grows until every producer and every reader of every carried value is decided."""

    def __init__(
        self, cut: fx.Node, kind: type[Map], explicit: Explicit, weights: set[fx.Node], plain: Collection[fx.Node],
        ends: Collection[fx.Node],
    ) -> None:
        self.cut, self.kind, self.explicit, self.weights, self.plain, self.ends = cut, kind, explicit, weights, plain, ends
        self.channels = 0
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
        self.entries: list[fx.Node] = []

    def region(self, channels: int) -> Region | Refusal:
        self.channels = channels
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
            self.leftovers = [site for site in self.leftovers if site.value not in self.entries]
            for site in self.leftovers:
                if issubclass(self.kind, Matrix) and site.layout.blocks(channels) is None:
                    raise _Refused(f"{_name(site.value)} has its channels on another axis than the last", site.node)
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
            tuple(self.leftovers), {value: self._entered(value) for value in self.entries}, frozenset(self.joined),
        )  # fmt: skip

    def _entered(self, value: fx.Node) -> tuple[tuple[fx.Node, int], ...]:
        """Where an entry is read with the map on it."""
        absorbed = {(site.node, site.argument) for site in self.readers if site.value is value}
        carried = {(reader, n) for by, reader, n in self.passed if by is value and reader in self.carried}
        return tuple((reader, n) for reader, n in edges(value) if (reader, n) in absorbed | carried and isinstance(n, int))

    def _start(self, layout: Layout) -> None:
        if self.explicit is Explicit.SOURCE:
            self.entries.append(self.cut)
            self._carry(self.cut, layout)
            self.needed.add(self.cut)
        else:
            self._demand(self.cut, layout)

    def _carry(self, value: fx.Node, layout: Any) -> bool:
        """Note that ``value`` carries the map; False if it carries it otherwise already."""
        if value in self.carried:
            return bool(self.carried[value] == layout)
        if isinstance(layout, Layout) and not (value.meta["val"].is_floating_point() and _belongs(layout, value)):
            return False
        if issubclass(self.kind, Matrix) and not self._whole(layout):
            return False
        self.carried[value] = layout
        return True

    def _whole(self, layout: Any) -> bool:
        """An axis is made of whole blocks of all channels; of one, if it must be the whole axis."""
        if not isinstance(layout, Layout):
            return all(map(self._whole, layout))
        return layout.is_plain(self.channels) if self.kind is Centre else layout.block_axis(self.channels) is not None

    def _elsewhere(self, op: fx.Node, layout: Any) -> bool:
        """A matrix acts on another axis than the last, of which the law of ``op`` speaks."""
        if not issubclass(self.kind, Matrix) or not isinstance(layout, Layout) or op.target not in _OF_THE_LAST_AXIS:
            return False
        return layout.block_axis(self.channels) != -1

    def _laws(self, op: fx.Node, argument: int | None) -> list[Law]:
        """The laws whose condition ``op`` meets; a norm that is to be plain has lost its gain already."""
        if op in self.plain:
            return [law for law in laws_of(RMS_NORM[0], argument, self.kind) if law.effect is Effect.PASSES]
        return laws_of(op.target, argument, self.kind)

    def _holds(self, law: Law, op: fx.Node) -> bool:
        return law.only_if is None or op in self.plain or law.only_if(op)

    def _demand(self, value: fx.Node, layout: Any) -> None:
        """Make ``value`` carry the map, by what produces it; raises _Refused."""
        if value in self.carried:
            if self.carried[value] == layout:
                return
            raise _Refused("two ways lead here with different channels", value)
        if not self._carry(value, layout):
            raise _Refused(f"{_name(value)} does not have all the channels, or rounds them to integers", value)
        self.needed.add(value)
        refusal = _Refused(f"{_name(value)} cannot produce the map", value)
        if isinstance(layout, Layout):
            for law in self._laws(value, None):
                if self._fits(law, value, layout):
                    self.producers.append(Site(value, None, value, layout, law))
                    return
        for argument in range(0 if value in self.ends or self._elsewhere(value, layout) else len(value.args)):
            for law in self._laws(value, argument):
                if law.effect in (Effect.PASSES, Effect.AGREES) and self._holds(law, value):
                    state = self._state()
                    try:
                        return self._demand_operands(value, argument, law, layout)
                    except _Refused as refused:
                        refusal = refused
                        self._restore(state)
        if self.explicit is not Explicit.ENDS or not isinstance(layout, Layout) or layout.blocks(self.channels) is None:
            raise refusal
        self.entries.append(value)

    def _demand_operands(self, value: fx.Node, argument: int, law: Law, layout: Any) -> None:
        operands = _nodes(value.args[argument]) if law.effect is Effect.PASSES else value.all_input_nodes
        numbers = law.effect is Effect.AGREES and _has_number(value)
        twice = sum(operands[:1] == [n] for a in value.args for n in _nodes(a)) > 1
        if not operands or numbers or twice:
            raise _Refused(f"{_name(value)} has an operand that cannot carry the map", value)
        if law.effect is Effect.PASSES:
            inner = backward(value, argument, layout)
            if inner is None:
                raise _Refused(f"the channels of {_name(value)} do not lead back to its argument", value)
            if operands[0] in self.weights:
                return self._constant(value, argument, operands[0], inner)
            self.entered_by[value] = operands[0]
            self._demand(operands[0], inner)
            return
        self.joined.add(value)
        self._agree(value, layout, None)

    def _constant(self, node: fx.Node, argument: int, operand: fx.Node, layout: Any) -> None:
        """An operand that depends on parameters only takes the map itself."""
        if not isinstance(layout, Layout) or (issubclass(self.kind, Matrix) and not self._takes(operand, layout)):
            raise _Refused(f"'{operand.name}' does not have all the channels", node)
        self.constants.append(Site(node, argument, operand, layout))

    def _takes(self, operand: fx.Node, layout: Layout) -> bool:
        return layout.blocks(self.channels) is not None and same(shape(operand)[-1], layout.index.shape[-1])

    def _agree(self, value: fx.Node, layout: Layout, known: fx.Node | None) -> None:
        """Every other operand of an add or cat takes the map too."""
        if value.target is aten.cat.default and self._agreed(value, layout, 0) is None:
            raise _Refused(f"{_name(value)} puts channels side by side", value)
        for n, operand in self._operands(value):
            if operand is known:
                continue
            inner = layout if value.target is aten.cat.default else backward(value, n, layout)
            if not isinstance(inner, Layout):
                raise _Refused(f"the operands of {_name(value)} differ in their channels", value)
            if operand in self.weights:
                self._constant(value, 0 if value.target is aten.cat.default else n, operand, inner)
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
        if value in self.entries and self.explicit is Explicit.ENDS and reader.target not in NORMS:
            return  # it reads the value as it was
        reason = f"{_name(reader)} stops it"
        if isinstance(argument, int) and reader.op == "call_function" and reader not in self.ends:
            for law in self._laws(reader, argument):
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
        if self._elsewhere(reader, layout):
            return f"{_name(reader)} acts on another axis than the channels'"
        if not self._holds(law, reader):
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
        if law.effect is Effect.PASSES and (reader in self.carried or (others and not issubclass(law.kind, Matrix)) or twice):
            return f"two operands of {_name(reader)} carry it"
        if law.effect is Effect.AGREES:
            return self._join(value, reader, argument, carried_on)
        away = isinstance(carried_on, Layout) and issubclass(self.kind, Matrix) and carried_on.block_axis(self.channels) != -1
        if away and self.explicit is Explicit.ENDS:
            return f"{_name(reader)} takes the channels off the last axis"  # where an op that is left over could not act
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
        if missing and self.explicit in (Explicit.READERS, Explicit.SOURCE):
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
        if not isinstance(layout, Layout) or (law.whole_axis and not _spans(layout, node, law.argument)):
            return False
        if law.only_if is not None and not law.only_if(node):
            return False
        given = [node.args[n] if n < len(node.args) else None for n in law.weights]
        if not all(w is None or w in self.weights for w in given):
            return False
        return node.target in _OPTIONAL or all(w is not None for w in given)

    def _prune(self) -> None:
        """Where nothing further on absorbs the map it is not carried on: one inverse now costs less than several later."""
        if self.explicit in (Explicit.NOWHERE, Explicit.ENDS):
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
            list(self.readers), list(self.constants), list(self.leftovers), list(self.passed), list(self.entries),
        )  # fmt: skip

    def _restore(self, state: tuple[Any, ...]) -> None:
        (
            self.carried, self.entered_by, self.joined, self.needed, self.producers,
            self.readers, self.constants, self.leftovers, self.passed, self.entries,
        ) = state  # fmt: skip


_LEADS_BACK = (*RESHAPES, *PERMUTES, *COPIES, aten.expand.default, aten.relu.default, aten.repeat_interleave.self_int)
_OF_THE_LAST_AXIS = (*NORMS, *MUL, *DIV, ATTENTION)
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


def _spans(layout: Layout, node: fx.Node, argument: int | None) -> bool:
    """The last axis of what ``node`` reads or makes has the channels, one for each element: none is one channel expanded."""
    value = node if argument is None else node.args[argument]
    return layout.on_last_axis and same(layout.index.shape[-1], shape(value)[-1])


def _belongs(layout: Layout, value: fx.Node) -> bool:
    """The tensor has an element for every entry of the layout: a sum's operand that is broadcast over the channels has not."""
    sizes = shape(value)
    return layout.rank == len(sizes) and all(n == 1 or same(n, size) for n, size in zip(layout.index.shape, sizes, strict=True))

