"""A pattern is the Python function that computes the subgraph; ``match`` finds it however it is spelled."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from .capture import trace
from .effects import writers_between, writers_of
from .spelling import CASTS, MEMBERS, PRODUCTS, SUMS, Call, Product, Sum, Through, spell, widens
from .tidy import tidy, value

TOLERANCE = 1e-8  # relative: 0.79788456 in a model is the sqrt(2 / pi) of the pattern

_library = torch.library.Library("fxquant", "FRAGMENT")
_library.define("one_of(Tensor[] alternatives, str[] labels) -> Tensor")
_library.impl("one_of", lambda alternatives, labels: alternatives[0].clone(), "CompositeExplicitAutograd")


def one_of(*alternatives: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
    """Inside a pattern: any of these spellings. The label of a named one that was taken is in ``match.taken``.

    >>> one_of(y * weight, plain=y)                                        # doctest: +SKIP
    """
    labels = [""] * len(alternatives) + list(named)
    result: torch.Tensor = torch.ops.fxquant.one_of([*alternatives, *named.values()], labels)
    return result


@dataclass(frozen=True)
class Miss:
    """Why a pattern does not match: a sentence, the node where it ended, how many nodes agreed before. Falsy."""

    template: str
    node: fx.Node | None = None
    depth: int = 0
    details: tuple[Any, ...] = ()

    @property
    def reason(self) -> str:
        """The sentence."""
        return self.template.format(*self.details) if self.details else self.template

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class Match:
    """Where a pattern was found. ``match.x`` is the node (or the number) that the variable ``x`` stands for, or None.

    ``covered`` holds the nodes that compute the idiom, ``root`` (the result) included; ``taken`` the labels chosen by one_of;
    ``crossed`` the copies and widening casts that lie between a variable and the idiom: other readers of these are welcome.
    """

    pattern: "Pattern"
    root: fx.Node
    bindings: Mapping[str, Any]
    covered: frozenset[fx.Node]
    taken: tuple[str, ...] = ()
    crossed: frozenset[fx.Node] = frozenset()

    def __getitem__(self, name: str) -> Any:
        if name not in self.pattern.variables:
            raise KeyError(f"pattern '{self.pattern.name}' has no variable '{name}'; it has {self.pattern.variables}")
        return self.bindings.get(name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(str(error)) from None

    def __repr__(self) -> str:
        bound = ", ".join(f"{k}={v}" for k, v in self.bindings.items())
        return f"Match({self.pattern.name} at {self.root}: {bound})"


Part = tuple[Any, float]  # a term (or a number) and its power in a product, its factor in a sum


class Var(NamedTuple):
    """A variable of the pattern that stands for a tensor."""

    name: str


class Scalar(NamedTuple):
    """A variable of the pattern that stands for a number."""

    name: str


class Choice(NamedTuple):
    """Alternatives."""

    labels: tuple[str, ...]
    terms: tuple[Any, ...]


class Monoid(NamedTuple):
    """A product of powers, or a sum of multiples, in any order and association."""

    kind: type[Product] | type[Sum]
    parts: tuple[Part, ...]
    literals: tuple[Part, ...]


class Apply(NamedTuple):
    """Any other op."""

    key: Any
    operands: tuple[Any, ...]
    literals: tuple[tuple[str, Any], ...]


class State(NamedTuple):
    """What has been agreed on so far."""

    bound: dict[str, Any]
    covered: frozenset[fx.Node]
    taken: tuple[str, ...]
    crossed: frozenset[fx.Node] = frozenset()

    def bind(self, name: str, to: Any) -> "State":
        return self._replace(bound={**self.bound, name: to})

    def cover(self, node: fx.Node) -> "State":
        return self._replace(covered=self.covered | {node})

    def cross(self, nodes: list[fx.Node]) -> "State":
        return self._replace(crossed=self.crossed.union(nodes)) if nodes else self


@dataclass(frozen=True, eq=False)
class Pattern:
    """A subgraph to be found, written as the function that computes it. Made by ``@pattern(...)``."""

    fn: Callable[..., torch.Tensor]
    examples: Mapping[str, Any]
    check: Callable[[Match], Miss | None] | None = None
    shared: bool = False

    @property
    def name(self) -> str:
        return self.fn.__name__

    @cached_property
    def variables(self) -> tuple[str, ...]:
        """Names of the variables, in the order of the function's parameters."""
        return tuple(inspect.signature(self.fn).parameters)

    @cached_property
    def term(self) -> Any:
        """The traced function as a tree of terms."""
        return _compile(self)

    @cached_property
    def heads(self) -> frozenset[Any]:
        """The ops that a root may be."""
        return frozenset(_heads(self.term)) | set(CASTS)

    def match(self, node: fx.Node) -> Match | Miss:
        """The idiom that ``node`` is the result of, or the nearest miss."""
        if node.target not in self.heads:
            return Miss("'{}' is {}, which does not end a {}", node, 0, (node, node.target, self.name))
        search = _Search(self, node)
        for state in search.unify(self.term, node, State({}, frozenset(), ())):
            found = Match(self, node, state.bound, state.covered, state.taken, state.crossed)
            miss = _forbidden(found)
            if miss is None and self.check is not None:
                miss = self.check(found)
            if miss is None:
                return found
            search.note(state, miss.node, miss.template, *miss.details, bonus=1)
        return search.nearest

    def find(self, gm: fx.GraphModule) -> Iterator[Match]:
        """Every match in ``gm``, readers before what they read; a node that was covered is not a root again."""
        covered: set[fx.Node] = set()
        for node in reversed(gm.graph.nodes):
            if node in covered or node.target not in self.heads:
                continue
            found = self.match(node)
            if isinstance(found, Match):
                covered |= found.covered
                yield found


def pattern(
    check: Callable[[Match], Miss | None] | None = None, *, shared: bool = False, **examples: Sequence[int] | torch.Tensor
) -> Callable[[Callable[..., torch.Tensor]], Pattern]:
    """Make a Pattern of a function; the shapes (or example tensors) tell which parameters are tensors, the others are numbers.

    ``check(match)`` may refuse with a Miss; ``shared=True`` lets inner nodes have readers outside the match.

    >>> @pattern(x=(2, 8))
    ... def silu(x):
    ...     return x * torch.sigmoid(x)
    """
    return lambda fn: Pattern(fn, examples, check, shared)


@dataclass
class _Search:
    """One attempt at one root; remembers the nearest miss."""

    pattern: Pattern
    root: fx.Node
    nearest: Miss = field(default_factory=lambda: Miss("no alternative applies"))

    def note(self, state: State, node: Any, template: str, *details: Any, bonus: int = 0) -> None:
        depth = len(state.covered) + bonus
        if depth > self.nearest.depth or self.nearest.node is None:
            self.nearest = Miss(template, node, depth, details)

    def unify(self, term: Any, node: Any, state: State) -> Iterator[State]:
        """Every way in which ``term`` reads ``node``."""
        if isinstance(term, Var):
            yield from self._bind(term, node, state)
        elif term is None:
            if node is None:
                yield state
            else:
                self.note(state, node, "'{}' is given where nothing is needed", node)
        elif isinstance(term, Choice):
            for label, alternative in zip(term.labels, term.terms, strict=True):
                taken = (*state.taken, label) if label else state.taken
                yield from self.unify(alternative, node, state._replace(taken=taken))
        elif isinstance(term, tuple) and not hasattr(term, "_fields"):
            if isinstance(node, list | tuple) and len(node) == len(term):
                yield from self._all(term, tuple(node), state)
        elif not isinstance(node, fx.Node):
            self.note(state, self.root, "a tensor is needed where '{}' has {!r}", self.root, node)
        elif isinstance(term, Monoid):
            neutral = 1.0 if term.kind is Product else 0.0
            for after, literal in self._solve(term, term.parts, node, 1.0, state, neutral):
                yield from self._literal(term, literal, node, after)
        else:
            yield from self._apply(term, node, state)

    def _bind(self, term: Var, node: Any, state: State) -> Iterator[State]:
        if node is None:  # an optional operand that is absent: the variable stays unbound
            if term.name not in state.bound:
                yield state
            return
        if not isinstance(node, fx.Node) or not isinstance(value(node), torch.Tensor):
            self.note(state, self.root, "'{}' must be a tensor, it is {}", term.name, node)
            return
        crossed = []
        while widens(node):
            crossed.append(node)
            node = node.args[0]
        held = state.bound.get(term.name)
        if held is None:
            yield state.cross(crossed).bind(term.name, node)
        elif held is node:
            yield state.cross(crossed)
        else:
            self.note(state, node, "'{}' would be both '{}' and '{}'", term.name, held, node)

    def _apply(self, term: Apply, node: fx.Node, state: State) -> Iterator[State]:
        read = spell(node)
        while isinstance(read, Through):
            state, node = state.cover(node), read.source
            read = spell(node)
        if not isinstance(read, Call) or read.key != term.key or len(read.operands) != len(term.operands):
            self.note(state, node, "'{}' is {} where {} is needed", node, node.target, term.key)
            return
        state = state.cover(node)
        for (name, wanted), (_, found) in zip(term.literals, read.literals, strict=True):
            if isinstance(wanted, Scalar):
                if not isinstance(found, int | float):
                    self.note(state, node, "'{}' of '{}' is {}, a number is needed", name, node, found)
                    return
                state = state.bind(wanted.name, found)
            elif not _alike(wanted, found):
                self.note(state, node, "'{}' of '{}' is {}, {} is needed", name, node, found, wanted)
                return
        yield from self._all(term.operands, read.operands, state)

    def _all(self, terms: tuple[Any, ...], nodes: tuple[Any, ...], state: State) -> Iterator[State]:
        if not terms:
            yield state
            return
        for after in self.unify(terms[0], nodes[0], state):
            yield from self._all(terms[1:], nodes[1:], after)

    def _solve(
        self, term: Monoid, parts: tuple[Part, ...], node: fx.Node, power: float, state: State, literal: float
    ) -> Iterator[tuple[State, float]]:
        """Every way in which ``parts`` make up ``node ** power`` (in a sum: ``power * node``), with the literals met so far."""
        if len(parts) == 1 and parts[0][1] == power:
            for after in self.unify(parts[0][0], node, state):
                yield after, literal
        read = spell(node)
        if isinstance(read, Through):
            yield from self._solve(term, parts, read.source, power, state.cover(node), literal)
            return
        if not isinstance(read, term.kind) or (term.kind is Product and power % 1 and len(read.operands) > 1):
            if len(parts) > 1:
                kind = term.kind.__name__.lower()
                self.note(state, node, "'{}' is {} where a {} of {} is needed", node, node.target, kind, len(parts))
            return
        if term.kind is Product and power % 1 and read.literals:
            return  # (c x) ** 0.5 is not read as c ** 0.5 x ** 0.5
        for number, exponent in read.literals:
            if term.kind is Sum:
                literal += number * exponent * power
            elif number == 0 and exponent * power < 0:
                return
            else:
                literal *= number ** (exponent * power)
        operands = tuple((n, e * power) for n, e in read.operands)
        yield from self._share(term, parts, operands, state.cover(node), literal)

    def _share(
        self, term: Monoid, parts: tuple[Part, ...], operands: tuple[Part, ...], state: State, literal: float
    ) -> Iterator[tuple[State, float]]:
        """Every way to share ``parts`` out among ``operands``, at least one to each."""
        (node, power), rest = operands[0], operands[1:]
        if not rest:
            yield from self._solve(term, parts, node, power, state, literal)
            return
        for chosen in range(1, 2 ** len(parts) - 1):
            mine = tuple(p for i, p in enumerate(parts) if chosen >> i & 1)
            others = tuple(p for i, p in enumerate(parts) if not chosen >> i & 1)
            if len(others) < len(rest):
                continue
            for after, so_far in self._solve(term, mine, node, power, state, literal):
                yield from self._share(term, others, rest, after, so_far)

    def _literal(self, term: Monoid, found: float, node: fx.Node, state: State) -> Iterator[State]:
        """The numbers of a product (of a sum) agree, or give the scalar variable its value."""
        needed = 1.0 if term.kind is Product else 0.0
        variable: tuple[Scalar, float] | None = None
        for literal, power in term.literals:
            if isinstance(literal, Scalar):
                variable = (literal, power)
            else:
                needed = needed * literal**power if term.kind is Product else needed + literal * power
        if variable is None:
            if _alike(needed, found):
                yield state
            else:
                what = "factor" if term.kind is Product else "constant"
                self.note(state, node, "the {} at '{}' is {}, {} is needed", what, node, found, needed)
            return
        scalar, power = variable
        number = (found / needed) ** (1 / power) if term.kind is Product else (found - needed) / power
        held = state.bound.get(scalar.name)
        if held is None:
            yield state.bind(scalar.name, number)
        elif _alike(held, number):
            yield state
        else:
            self.note(state, node, "'{}' would be both {} and {}", scalar.name, held, number)


def _alike(wanted: Any, found: Any) -> bool:
    if isinstance(wanted, list | tuple) and isinstance(found, list | tuple):
        return len(wanted) == len(found) and all(map(_alike, wanted, found))
    if type(wanted) in (int, float) and type(found) in (int, float):
        return math.isclose(wanted, found, rel_tol=TOLERANCE, abs_tol=0.0)
    return bool(wanted == found) and type(wanted) is type(found)


def _forbidden(match: Match) -> Miss | None:
    """Covered nodes are read by nobody else; nothing covered, and nothing bound or crossed meanwhile, is written in place."""
    for node in match.covered:
        for writer in writers_of(node):
            return Miss("'{}' is written in place by '{}'", node, 0, (node, writer))
    for node in match.covered:
        if node is match.root or match.pattern.shared:
            continue
        for reader in node.users:
            if reader not in match.covered:
                return Miss("'{}' is also read by '{}', outside of the {}", node, 0, (node, reader, match.pattern.name))
    first = min(match.covered | match.crossed)  # a copy has what its source held when it was made
    for node in (*match.bindings.values(), *match.crossed):
        if isinstance(node, fx.Node):
            for writer in writers_between(node, first, match.root):
                return Miss("'{}' is written in place by '{}' meanwhile", node, 0, (node, writer))
    return None


def _heads(term: Any) -> Iterator[Any]:
    if isinstance(term, Choice):
        for alternative in term.terms:
            yield from _heads(alternative)
    elif isinstance(term, Monoid):
        yield from PRODUCTS if term.kind is Product else SUMS
    elif isinstance(term, Apply):
        yield from MEMBERS.get(term.key, (term.key,))


def _compile(p: Pattern) -> Any:
    """Trace the function on its examples and read the graph as terms."""
    mode = FakeTensorMode()
    numbers = {name: 0.0137 + 0.00731 * i for i, name in enumerate(n for n in p.variables if n not in p.examples)}
    with mode:
        tensors = {
            name: torch.empty(e.shape, dtype=e.dtype) if isinstance(e, torch.Tensor) else torch.empty(e)
            for name, e in p.examples.items()
        }

    def on_tensors(*given: torch.Tensor) -> torch.Tensor:
        return p.fn(**dict(zip(tensors, given, strict=True)), **numbers)

    graph = tidy(trace(on_tensors, list(tensors.values()), mode)).graph
    names = dict(zip(graph.find_nodes(op="placeholder"), tensors, strict=True))
    scalars = {number: Scalar(name) for name, number in numbers.items()}

    def read(node: Any) -> Any:
        if node is None:
            return None
        if isinstance(node, list | tuple):
            return tuple(read(n) for n in node)
        if node in names:
            return Var(names[node])
        if node.target is torch.ops.fxquant.one_of.default:
            alternatives, labels = node.args
            return Choice(tuple(labels), tuple(map(read, alternatives)))
        spelled = spell(node)
        if isinstance(spelled, Through):
            return read(spelled.source)
        if isinstance(spelled, Call):
            literals = tuple((k, scalars.get(v, v) if isinstance(v, float) else v) for k, v in spelled.literals)
            return Apply(spelled.key, read(spelled.operands), literals)
        return _flat(spelled, read, scalars)

    (result,) = graph.output_node().args
    return read(result)


def _flat(spelled: Product | Sum, read: Callable[[Any], Any], scalars: Mapping[float, Scalar]) -> Monoid:
    kind = type(spelled)
    parts: list[tuple[Any, float]] = []
    literals: list[tuple[Any, float]] = [(scalars.get(n, n), e) for n, e in spelled.literals]
    for node, power in spelled.operands:
        term = read(node)
        if isinstance(term, Monoid) and term.kind is kind and (kind is Sum or power % 1 == 0 or len(term.parts) == 1):
            parts += [(inner, e * power) for inner, e in term.parts]
            literals += [(n, e * power) for n, e in term.literals]
        else:
            parts.append((term, power))
    return Monoid(kind, tuple(parts), tuple(literals))


__all__ = ["Match", "Miss", "Pattern", "one_of", "pattern"]
