"""Split off the part of a graph that depends on parameters only, and run it once per parameter version.

Dynamo hands parameters over as graph inputs: one compiled graph may serve many layers, and weights may change in place. So the
weight graph is cut into *units* (one per weight, as a rule), each unit's result is cached under the identity of the parameters
it read, and a call first checks that these are still the same tensors with the same contents.
"""

import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import FxquantError
from .capture import Parameter
from .effects import family
from .fingerprint import fingerprint
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
    read = {*outputs, *(n for node in order for n in node.all_input_nodes)}
    reads = [p for p in position if p in read]
    placed = {p: graph.placeholder(f"p{i}") for i, p in enumerate(reads)}
    spelled = [f"{tuple(value(p).shape)} {value(p).dtype} {value(p).device}" for p in reads]
    for i, node in enumerate(order):
        placed[node] = graph.node_copy(node, lambda n: placed[n])
        placed[node]._rename(f"n{i}")
        constant = fingerprint(_attribute(gm, node.target)) if node.op == "get_attr" else ""
        spelled.append(f"{placed[node].format_node()} {constant}")
    graph.output(tuple(placed[o] for o in outputs))
    spelled.append(str([placed[o].name for o in outputs]))
    names = tuple(parameter.path if (parameter := Parameter.of(p)) else p.name for p in reads)
    inputs, key = tuple(position[p] for p in reads), "\n".join(spelled)
    return lambda: Unit(fx.GraphModule(gm, graph), inputs, names, key)


def _attribute(gm: fx.GraphModule, target: Any) -> Any:
    return attrgetter(str(target))(gm)


@dataclass(frozen=True, eq=False)
class _Entry:
    """The folded tensors of one unit for one tuple of parameters."""

    state: State
    prints: tuple[int, ...]
    values: tuple[Tensor, ...]


Key = tuple[str, tuple[int, ...]]  # the unit's, and the identities of the parameters


class WeightCache:
    """Folded tensors by (unit, parameters), so that graphs share them; an entry lives as long as a graph that uses it.

    Shared by all graphs, safe under threads.
    """

    def __init__(self) -> None:
        self._entries: weakref.WeakValueDictionary[Key, _Entry] = weakref.WeakValueDictionary()
        self._lock = threading.RLock()
        self.folds = 0  # how many units were run, for tests and for the curious

    def get(self, unit: Unit, parameters: Sequence[Tensor], first: bool) -> _Entry:
        """The folded tensors of ``unit`` for ``parameters``; the caller keeps the entry.

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
                and (not first or entry.prints == tuple(map(fingerprint, parameters)))
            ):
                return entry
            values = unit.fold(parameters)
            self.folds += 1
            entry = self._entries[key] = _Entry(state, tuple(map(fingerprint, parameters)), values)
            return entry

    def clear(self) -> None:
        """Forget everything, in every graph; the next call folds anew."""
        with self._lock:
            self._entries.clear()
            for graph in tuple(_GRAPHS):
                graph.forget(entries=True)


def state_of(parameters: Sequence[Tensor]) -> State:
    """What tells in no time that parameters were replaced or written: their addresses and their version counters.

    A tensor made in inference mode has no counter; its address must do.
    """
    try:
        return [*map(_address, parameters)], [*map(_version, parameters)]
    except RuntimeError:
        return [*map(_address, parameters)], [0 if p.is_inference() else p._version for p in parameters]


@dataclass(eq=False)
class _Storage:
    """Keeps the storage that a parameter had when it was folded, so that no other can come to lie at its address.

    Without it ``p.data = a; p.data = b`` might put ``b`` where the folded one was, and an address would prove nothing.
    """

    held: torch.UntypedStorage
    graphs: "weakref.WeakSet[FoldedWeights]" = field(default_factory=weakref.WeakSet)


@dataclass(frozen=True)
class _Known:
    """What one compiled graph remembers of one set of parameters."""

    identities: tuple[int, ...]
    state: State
    values: list[Tensor]
    storages: tuple[_Storage, ...]
    guards: tuple[Any, ...]


class FoldedWeights:
    """The weight side of one compiled graph: hands out folded tensors, and checks on every call that they are still right.

    The check reads address and version counter of each parameter in ``watched`` (argument positions; all that the units read
    are added); the storages are kept, which makes addresses proofs. Not seen between two calls of the same graph: a write
    through ``p.data`` that keeps the address, such as ``p.data.add_(...)``; call ``refresh()`` after one. ``on_new(args)`` is
    called when parameters are met or met changed.
    """

    def __init__(self, units: Sequence[Unit], watched: Sequence[int], on_new: Callable[[Sequence[Any]], None]) -> None:
        self._units = tuple(units)
        self._pick = _picker(sorted({*watched, *(i for unit in units for i in unit.inputs)}))
        self._largest: int | None = None  # whose identity tells layers apart, or nearly so: they may share it
        self._known: dict[int, tuple[_Known, ...]] = {}
        self._entries: dict[Key, tuple[_Entry, tuple[Any, ...]]] = {}  # with the guards that drop them
        self._warned = False
        self._on_new = on_new
        with CACHE._lock:
            _GRAPHS.add(self)

    def __call__(self, args: Sequence[Any]) -> list[Tensor]:
        parameters = self._pick(args)
        state = state_of(parameters)
        if self._largest is None:
            self._largest = max(range(len(parameters)), key=lambda i: parameters[i].numel(), default=-1)
        key = id(parameters[self._largest]) if parameters else 0
        for known in self._known.get(key, ()):
            if known.state == state:
                return known.values
        return self._fold(args, parameters, key, state)

    def _fold(self, args: Sequence[Any], parameters: Sequence[Tensor], key: int, state: State) -> list[Tensor]:
        generation, identities = _generation, tuple(map(id, parameters))
        seen = any(known.identities == identities and known.state[0] == state[0] for known in self._known.get(key, ()))
        self._warn_of_inference(args)
        values: list[Tensor] = []
        for unit in self._units:
            mine = [args[i] for i in unit.inputs]
            entry = CACHE.get(unit, mine, first=not seen)
            entry_key = (unit.key, tuple(map(id, mine)))
            self._entries[entry_key] = (entry, _guards(mine, self, entry_key))
            values += entry.values
        storages = _hold(parameters, self)
        with CACHE._lock:
            if generation == _generation:  # else somebody asked meanwhile to look at the contents again
                others = [known for known in self._known.get(key, ()) if known.identities != identities]
                self._known[key] = (*others, _Known(identities, state, values, storages, _guards(parameters, self, key)))
        self._on_new(args)
        return values

    def _warn_of_inference(self, args: Sequence[Any]) -> None:
        named = [pair for unit in self._units for pair in zip(unit.inputs, unit.names, strict=True)]
        blind = list(dict.fromkeys(name for i, name in named if args[i].is_inference()))
        if blind and not self._warned:
            self._warned = True
            more = f" and {len(blind) - 1} others" if len(blind) > 1 else ""
            warnings.warn(
                f"parameter '{blind[0]}'{more}: made in inference mode, where PyTorch counts no writes: call "
                "fxquant.refresh() after a change of it, such as load_state_dict, or the old weights stay in use",
                stacklevel=2,
            )

    def forget(self, *, entries: bool = False, storage: _Storage | None = None) -> None:
        """Look at the parameters anew on the next call: at all of them, or at those that had ``storage``.

        Their contents decide whether the folded tensors are still right; with ``entries`` these are forgotten too.
        """
        if entries:
            self._entries.clear()
        for key, known in self._known.copy().items():
            if storage is None or any(storage in one.storages for one in known):
                self._known.pop(key, None)

    def _drop(self, key: Any) -> None:
        self._known.pop(key, None)
        self._entries.pop(key, None)


CACHE = WeightCache()
_GRAPHS: weakref.WeakSet[FoldedWeights] = weakref.WeakSet()
_STORAGES: weakref.WeakValueDictionary[int, _Storage] = weakref.WeakValueDictionary()  # by the identity of the parameter


def _guards(parameters: Sequence[Tensor], graph: FoldedWeights, key: Any) -> tuple[Any, ...]:
    """What dies with any of the parameters; the guards do not keep the graph alive."""
    drop = weakref.WeakMethod(graph._drop)

    def gone(_: object) -> None:
        if (call := drop()) is not None:
            call(key)

    return tuple(weakref.ref(p, gone) for p in parameters)


def _hold(parameters: Sequence[Tensor], graph: FoldedWeights) -> tuple[_Storage, ...]:
    """The storages that ``parameters`` have now, to be kept by ``graph``.

    A parameter that is met with another storage than before lets the old one go: all graphs that kept it look at it anew.
    """
    found = []
    with CACHE._lock:
        for parameter in parameters:
            now, storage = parameter.untyped_storage(), _STORAGES.get(id(parameter))
            if storage is None or storage.held._cdata != now._cdata:
                for other in () if storage is None else tuple(storage.graphs):
                    other.forget(storage=storage)
                storage = _STORAGES[id(parameter)] = _Storage(now)
            storage.graphs.add(graph)
            found.append(storage)
    return tuple(found)


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
    with CACHE._lock:
        _generation += 1
        for graph in tuple(_GRAPHS):
            graph.forget()
