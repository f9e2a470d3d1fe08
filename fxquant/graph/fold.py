"""Split off the part of a graph that depends on parameters only, and run it once per parameter version.

Dynamo hands parameters over as graph inputs: one compiled graph may serve many layers, and weights may change in place. So the
weight graph is cut into *units* (one per weight, as a rule), each unit's result is cached under the identity of the parameters
it read, and a call first checks that these are still the same tensors with the same contents.
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import FxquantError
from .capture import Parameter
from .effects import family
from .rewrite import WRITTEN
from .tidy import value
from .weights import cone_of, parameter_only

_version = attrgetter("_version")
_address = Tensor.data_ptr

State = tuple[list[int], list[int]]

@dataclass(frozen=True)
class Unit:
    """A piece of the weight graph: parameters in, folded tensors out.

    ``inputs`` index the arguments of the compiled graph; ``key`` spells the computation, equal for equal units of any graph.
    """

    gm: fx.GraphModule
    inputs: tuple[int, ...]
    names: tuple[str, ...]
    key: str

    def fold(self, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the unit. Raises FxquantError if a parameter holds NaN or infinity, naming it."""
        with torch.no_grad():
            values = tuple(self.gm(*parameters))
        # An infinite mask in a bias is fine; a NaN beside codes is a scale that could not be had.
        has_codes = any(not v.is_floating_point() for v in values)
        if not has_codes or not any(bool(v.isnan().any()) for v in values if v.is_floating_point()):
            return values
        for name, parameter in zip(self.names, parameters, strict=True):
            if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
                raise FxquantError(
                    f"parameter '{name}' holds NaN or infinity, which no integer can stand for; "
                    "mend the checkpoint, or leave the layer in floating point with ignore=[...] and transforms=[]"
                )
        return values


@dataclass(frozen=True)
class Folded:
    """A graph cut in two: ``units`` (once per parameter version) and ``runtime`` (every call).

    ``runtime`` takes the arguments numbered ``kept`` of the original graph, then the results of all units in order.
    """

    units: tuple[Unit, ...]
    runtime: fx.GraphModule
    kept: tuple[int, ...]


def fold(gm: fx.GraphModule) -> Folded:
    """Cut ``gm`` (changed in place, returned as ``runtime``) along the weight algebra that rewrites wrote into it.

    A value is folded if it depends on parameters only, something else reads it, and a rewrite wrote part of it; the model's own
    parameter arithmetic is left to the runtime unless a rewrite built on it.
    """
    pure = parameter_only(gm)
    placeholders = gm.graph.find_nodes(op="placeholder")
    position = {node: i for i, node in enumerate(placeholders)}
    cones = {node: _cone(node) for node in gm.graph.nodes if _is_boundary(node, pure)}
    cones = {node: cone for node, cone in cones.items() if any(n.meta.get(WRITTEN) for n in cone)}

    units, results = [], []
    for outputs in _components(cones):
        unit = _extract(gm, outputs, set().union(*(cones[o] for o in outputs)), position)
        units.append(unit())
        results += outputs
    last = placeholders[-1] if placeholders else None
    for node in results:
        with gm.graph.inserting_after(last):
            last = gm.graph.placeholder(f"folded_{node.name}")
        last.meta["val"] = value(node)
        node.replace_all_uses_with(last)
    _copy_what_leaves(gm, set(gm.graph.find_nodes(op="placeholder")) - set(placeholders))
    gm.graph.eliminate_dead_code()
    for node in [n for n in placeholders if not n.users]:
        gm.graph.erase_node(node)
    kept = tuple(i for node, i in position.items() if node.users)
    gm.recompile()
    return Folded(tuple(units), gm, kept)


def _copy_what_leaves(gm: fx.GraphModule, folded: set[fx.Node]) -> None:
    """The user may write to what the graph returns, so a folded value, or a view of one, is returned as a copy."""
    output = gm.graph.output_node()
    for node in output.all_input_nodes:
        if family(node) & folded:
            with gm.graph.inserting_before(output):
                copy = gm.graph.call_function(torch.ops.aten.clone.default, (node,))
            copy.meta["val"] = value(node)
            output.replace_input_with(node, copy)


def _is_boundary(node: fx.Node, pure: set[fx.Node]) -> bool:
    """A computed weight value that something outside the weight graph reads."""
    if node not in pure or node.op in ("placeholder", "get_attr"):
        return False
    return isinstance(value(node), Tensor) and any(user not in pure for user in node.users)


def _cone(node: fx.Node) -> set[fx.Node]:
    """The computed nodes that ``node`` depends on, itself included."""
    return {n for n in cone_of(node) if n.op != "placeholder"}


def unit_of(gm: fx.GraphModule, node: fx.Node) -> Callable[[], Unit]:
    """The computation of one weight expression as a Unit, copied now and compiled when it is first asked for."""
    position = {p: i for i, p in enumerate(gm.graph.find_nodes(op="placeholder"))}
    return lru_cache(1)(_extract(gm, [node], _cone(node), position))


def _components(cones: dict[fx.Node, set[fx.Node]]) -> list[list[fx.Node]]:
    """Results that share a computation belong to one unit, so that it is computed once."""
    groups: list[tuple[list[fx.Node], set[fx.Node]]] = []
    for node, cone in cones.items():
        touching = [g for g in groups if g[1] & cone]
        groups = [g for g in groups if not g[1] & cone]
        together = [n for g in touching for n in g[0]]
        groups.append(([*together, node], cone.union(*(g[1] for g in touching))))
    return [nodes for nodes, _ in groups]


def _extract(
    gm: fx.GraphModule, outputs: list[fx.Node], cone: set[fx.Node], position: dict[fx.Node, int]
) -> Callable[[], Unit]:
    graph = fx.Graph()
    order = [n for n in gm.graph.nodes if n in cone]
    reads = [p for p in position if p in outputs or any(p in n.all_input_nodes for n in order)]
    placed = {p: graph.placeholder(f"p{i}") for i, p in enumerate(reads)}
    spelled = [f"{tuple(value(p).shape)} {value(p).dtype} {value(p).device}" for p in reads]
    for i, node in enumerate(order):
        placed[node] = graph.node_copy(node, lambda n: placed[n])
        placed[node]._rename(f"n{i}")
        constant = _fingerprint(_attribute(gm, node.target)) if node.op == "get_attr" else ""
        spelled.append(f"{placed[node].format_node()} {constant}")
    graph.output(tuple(placed[o] for o in outputs))
    spelled.append(str([placed[o].name for o in outputs]))
    names = tuple(parameter.path if (parameter := Parameter.of(p)) else p.name for p in reads)
    inputs, key = tuple(position[p] for p in reads), "\n".join(spelled)
    return lambda: Unit(fx.GraphModule(gm, graph), inputs, names, key)


def _attribute(gm: fx.GraphModule, target: Any) -> Any:
    return attrgetter(str(target))(gm)


def _fingerprint(tensor: Tensor) -> int:
    """A number that changes when the contents do, or their order; a few passes at memory speed."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8) if tensor.numel() else torch.zeros(0, dtype=torch.uint8)
    words = torch.nn.functional.pad(data, (0, -data.numel() % 8)).view(torch.int64)
    width = min(max(words.numel(), 1), 4096)
    rows = torch.nn.functional.pad(words, (0, -words.numel() % width)).view(-1, width)
    per_row = (rows * _odd(width, rows.device)).sum(1)  # wraps around, as meant
    return hash((tuple(tensor.shape), tensor.dtype, int((per_row * _odd(len(per_row), rows.device)).sum())))


def _odd(count: int, device: torch.device) -> Tensor:
    """Odd multipliers [count], no two alike, spread over 64 bits."""
    return (torch.arange(1, count + 1, device=device) * -7046029254386353131) | 1


@dataclass
class _Entry:
    """The folded tensors of one unit for one tuple of parameters."""

    state: State
    prints: tuple[int, ...]
    values: tuple[Tensor, ...]
    guards: list[Any] = field(default_factory=list)


class WeightCache:
    """Folded tensors by (unit, parameters); an entry dies with any of its parameters.

    Shared by all graphs, safe under threads.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[str, tuple[int, ...]], _Entry] = {}
        self._lock = threading.RLock()
        self.folds = 0  # how many units were run, for tests and for the curious

    def get(self, unit: Unit, parameters: Sequence[Tensor], first: bool) -> tuple[Tensor, ...]:
        """The folded tensors of ``unit`` for ``parameters``.

        ``first``: the asking graph has not met these parameters before, so their contents are looked at, not only their state:
        ``p.data.add_(...)``, as in a LoRA merge, leaves no trace in the state.
        """
        key = (unit.key, tuple(map(id, parameters)))
        state = state_of(parameters)
        with self._lock:
            entry = self._entries.get(key)
            if (
                entry is not None
                and entry.state == state
                and (not first or entry.prints == tuple(map(_fingerprint, parameters)))
            ):
                return entry.values
            values = unit.fold(parameters)
            self.folds += 1
            guards = [weakref.ref(p, lambda _: self._entries.pop(key, None)) for p in parameters]
            self._entries[key] = _Entry(state, tuple(map(_fingerprint, parameters)), values, guards)
            return values

    def clear(self) -> None:
        """Forget everything; the next call folds anew."""
        with self._lock:
            self._entries.clear()


CACHE = WeightCache()


def state_of(parameters: Sequence[Tensor]) -> State:
    """What tells in no time that parameters were replaced or written: their addresses and their version counters.

    A tensor made in inference mode has no counter; its address must do.
    """
    try:
        return [*map(_address, parameters)], [*map(_version, parameters)]
    except RuntimeError:
        return [*map(_address, parameters)], [0 if p.is_inference() else p._version for p in parameters]


@dataclass(frozen=True)
class _Known:
    """What one compiled graph remembers of one set of parameters."""

    state: State
    values: list[Tensor]
    generation: int
    guards: tuple[Any, ...]


class FoldedWeights:
    """The weight side of one compiled graph: hands out folded tensors, and checks on every call that they are still right.

    The check reads address and version counter of each parameter in ``watched`` (argument positions; all that the units read
    are added); ``_Storages`` makes addresses proofs. Not seen between two calls of the same graph: a write through ``p.data``
    that keeps the address, such as ``p.data.add_(...)``; call ``refresh()`` after one. ``on_new(args)`` is called when
    parameters are met or met changed.
    """

    def __init__(self, units: Sequence[Unit], watched: Sequence[int], on_new: Callable[[Sequence[Any]], None]) -> None:
        self._units = tuple(units)
        indices = sorted({*watched, *(i for unit in units for i in unit.inputs)})
        self._pick = _picker(indices)
        self._largest: int | None = None  # whose identity tells layers apart: small parameters are shared more often
        self._known: dict[int, _Known] = {}
        self._on_new = on_new

    def __call__(self, args: Sequence[Any]) -> list[Tensor]:
        parameters = self._pick(args)
        if self._largest is None:
            self._largest = max(range(len(parameters)), key=lambda i: parameters[i].numel(), default=-1)
        known = self._known.get(id(parameters[self._largest]) if parameters else 0)
        if known is not None and known.generation == _generation and known.state == state_of(parameters):
            return known.values
        return self._fold(args, parameters)

    def _fold(self, args: Sequence[Any], parameters: Sequence[Tensor]) -> list[Tensor]:
        key = id(parameters[self._largest or 0]) if parameters else 0
        known = self._known.get(key)
        state = state_of(parameters)
        seen = known is not None and known.generation == _generation and known.state[0] == state[0]
        values: list[Tensor] = []
        for unit in self._units:
            mine = [args[i] for i in unit.inputs]
            values += CACHE.get(unit, mine, first=not seen)
        guards = tuple(weakref.ref(p, lambda _: self._known.pop(key, None)) for p in parameters)
        STORAGES.hold(parameters, self)
        self._known[key] = _Known(state, values, _generation, guards)
        self._on_new(args)
        return values


    def forget(self) -> None:
        """Look at every parameter anew on the next call."""
        self._known.clear()


class _Storages:
    """Keeps the storage that each parameter had when it was folded, so that no other can come to lie at its address.

    Without it ``p.data = a; p.data = b`` might put ``b`` where the folded one was, and an address would prove nothing. When a
    parameter is met with another storage, the old one is let go and all graphs that read the parameter look at it anew.
    """

    def __init__(self) -> None:
        self._held: dict[int, tuple[weakref.ref[Tensor], torch.UntypedStorage, weakref.WeakSet[FoldedWeights]]] = {}
        self._lock = threading.RLock()

    def hold(self, parameters: Sequence[Tensor], graph: FoldedWeights) -> None:
        """Keep the storages that ``parameters`` have now, on behalf of ``graph``."""
        with self._lock:
            for key in [k for k, held in self._held.items() if not held[2]]:
                del self._held[key]  # no graph reads it any more
            for parameter in parameters:
                key, storage = id(parameter), parameter.untyped_storage()
                held = self._held.get(key)
                if held is None or held[1]._cdata != storage._cdata:
                    for other in () if held is None else tuple(held[2]):
                        other.forget()
                    alive = weakref.ref(parameter, partial(self._let_go, key))
                    held = self._held[key] = (alive, storage, weakref.WeakSet())
                held[2].add(graph)

    def _let_go(self, key: int, _: object) -> None:
        self._held.pop(key, None)


STORAGES = _Storages()


def _picker(indices: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    if not indices:
        return lambda args: ()
    if len(indices) == 1:
        return lambda args: (args[indices[0]],)
    return itemgetter(*indices)


_generation = 0


def refresh() -> None:
    """Look at the contents of every parameter again on the next call.

    Needed only after a write that PyTorch does not count, such as ``p.data.copy_(...)`` on a model that stays compiled.
    """
    global _generation
    _generation += 1
