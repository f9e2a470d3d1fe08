"""The edges of a graph on which an activation is rounded: whose value it is, who reads it rounded, and how.

Where the ranges are static, an edge is what calibration watches and what a plan holds a range for, by the edge's ``key``:
``<weight path>:<role>``, the weight being the nearest one that the value comes from (for an input, the one that reads it).
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.graph.capture import Parameter
from fxquant.graph.effects import writers_of
from fxquant.graph.equivalence import root_of
from fxquant.graph.laws import CAT, NORMS
from fxquant.graph.ops import fake_quantize
from fxquant.graph.region import SHAPE_ONLY
from fxquant.graph.rewrite import WRITTEN, splice
from fxquant.graph.tidy import value
from fxquant.graph.weights import depends_on_parameters_only
from fxquant.numerics.ranges import Given
from fxquant.recipe import Recipe, Spec

from .attention import Attention, attentions
from .residual import residuals

aten = torch.ops.aten

Ends = tuple[float | tuple[float, ...], ...]
"""The low and the high end, numbers or one of each channel."""
Ranges = Callable[[str], Ends | None]
Products = Mapping[fx.Node, tuple[Spec, tuple[str, ...]]]
"""The sites whose input is rounded: by what, and what a rule may call them."""


@dataclass(frozen=True, eq=False)
class Edge:
    """``readers`` read ``value`` rounded by ``spec``; ``role``: input, norm, query, key, value, probabilities or residual.

    Edges of one ``key`` share a range. ``names`` are what a rule or a listed range may call it.
    """

    key: str
    role: str
    value: fx.Node
    readers: tuple[fx.Node, ...]
    spec: Spec
    names: tuple[str, ...]


def edges_of(gm: fx.GraphModule, products: Products, recipe: Recipe) -> list[Edge]:
    """Every edge of ``gm`` under ``recipe``; ``products`` are the linear sites whose input is rounded: the Spec and the names.

    Fused attention whose probabilities are rounded is written out; the graph computes what it did.
    """
    numbered: Counter[tuple[str, str]] = Counter()

    def key(path: str, role: str) -> str:
        numbered[path, role] += 1
        count = numbered[path, role]
        return f"{path}:{role}" + (f"#{count}" if count > 1 else "")  # a layer that is called twice has two ranges

    found = list(_norms(gm, products, recipe, key))
    taken = {(edge.value, reader) for edge in found for reader in edge.readers}
    for attention in list(attentions(gm)):
        found += _attention(gm, attention, recipe, key)
    found += _inputs(products, taken, key)
    found += _residuals(gm, recipe, key)
    return found


def settle(edges: Iterable[Edge], recipe: Recipe, ranges: Ranges) -> tuple[list[Edge], list[Edge]]:
    """The edges with every static Spec given its range, by the recipe's own list or else ``ranges``; and those without one."""
    settled, missing = [], []
    for edge in edges:
        if not edge.spec.is_static or _is_given(edge.spec):
            settled.append(edge)
            continue
        own = next(filter(None, map(recipe.given_range, edge.names)), None) if edge.role == "input" else None
        ends = own or ranges(edge.key)
        if ends is None:
            missing.append(edge)
        else:
            settled.append(replace(edge, spec=replace(edge.spec, range=Given(*ends))))
    return settled, missing


def insert(gm: fx.GraphModule, edges: Iterable[Edge], write: Callable[[fx.Node, Edge], fx.Node]) -> None:
    """Put ``write(value, edge)`` between the value and its readers, edge by edge, in place; equal ones of a value are one.

    A value that something writes to in place is not the same for all readers: each gets its own, right before it.
    """
    written: dict[tuple[Any, ...], fx.Node] = {}
    for edge in edges:
        changes = next(writers_of(edge.value), None) is not None
        for reader in sorted(edge.readers):
            which = (edge.value, edge.key, edge.spec, reader if changes else None)
            if which not in written:
                with gm.graph.inserting_before(reader):
                    written[which] = node = write(edge.value, edge)
                node.meta.setdefault("val", value(edge.value))
                node.meta[WRITTEN] = True
            reader.replace_input_with(edge.value, written[which])
    gm.recompile()


def rounded(gm: fx.GraphModule) -> Callable[[fx.Node, Edge], fx.Node]:
    """For ``insert``: the value rounded as the edge's Spec says."""
    return lambda x, edge: gm.graph.call_function(fake_quantize, (x, edge.spec.to_json()))


def anchor(node: fx.Node) -> str:
    """The path of the parameter (of two axes, if there is one near) that ``node`` comes from, by the shortest way back."""
    queue, seen = deque([node]), {node}
    while queue:
        here = queue.popleft()
        for operand in here.all_input_nodes:
            if depends_on_parameters_only(operand) and (root := root_of(operand)) is not None:
                parameter = Parameter.of(root)
                if parameter is not None and parameter.kind == "parameter":
                    return parameter.path
        new = [n for n in here.all_input_nodes if n not in seen]
        seen.update(new)
        queue.extend(new)
    return node.name


def _is_given(spec: Spec) -> bool:
    return isinstance(spec.range, Given) and spec.range.lo is not None


def _inputs(
    products: Products, taken: set[tuple[fx.Node, fx.Node]], key: Callable[[str, str], str]
) -> Iterator[Edge]:
    """What products read; those that read one value by one Spec are one edge."""
    groups: dict[tuple[fx.Node, Spec], list[fx.Node]] = {}
    for node, (spec, _) in products.items():
        x = node.args[0]
        assert isinstance(x, fx.Node)
        if (x, node) not in taken:
            groups.setdefault((x, spec), []).append(node)
    for (x, spec), readers in groups.items():
        names = tuple(dict.fromkeys(name for reader in readers for name in products[reader][1]))
        yield Edge(key(names[0], "input"), "input", x, tuple(readers), spec, names)


def _norms(
    gm: fx.GraphModule,
    products: Products,
    recipe: Recipe,
    key: Callable[[str, str], str],
) -> Iterator[Edge]:
    """What a norm gives, where a product with a rounded input reads it: the shortcut then starts at the rounded value."""
    for node in gm.graph.nodes:
        if node.target not in NORMS or not any(user in products for user in node.users):
            continue
        path = anchor(node)
        spec = recipe.spec("norms", (path,))
        if spec is None or recipe.ignores(path):
            continue
        reading = [user for user in node.users if user.target not in SHAPE_ONLY]
        readers = tuple(user for user in reading if user.target is not aten.linear.default or user in products)
        yield Edge(key(path, "norm"), "norm", node, readers, spec, (path,))


def _attention(gm: fx.GraphModule, found: Attention, recipe: Recipe, key: Callable[[str, str], str]) -> Iterator[Edge]:
    paths = {role: anchor(node) for role, node in (("query", found.q), ("key", found.k), ("value", found.v))}
    if any(map(recipe.ignores, paths.values())):
        return
    specs = {role: recipe.spec("attention", (path,)) for role, path in paths.items()}
    of_softmax = recipe.spec("probabilities", (paths["query"],))
    if not any(specs.values()) and of_softmax is None:
        return
    node, probabilities = found.node, None
    if of_softmax is not None:
        node, probabilities = _written_out(gm, found) if found.fused else (found.node, found.node.args[0])
    operands = {"query": found.q, "key": found.k, "value": found.v}
    for role, operand in operands.items():
        if (spec := specs[role]) is not None:
            readers = tuple(user for user in operand.users if user.target not in SHAPE_ONLY and _leads_to(user, node))
            if readers:
                yield Edge(key(paths[role], role), role, operand, readers, spec, (paths[role],))
    if of_softmax is not None and isinstance(probabilities, fx.Node):
        name = paths["query"]
        yield Edge(key(name, "probabilities"), "probabilities", probabilities, (node,), of_softmax, (name,))


def _written_out(gm: fx.GraphModule, found: Attention) -> tuple[fx.Node, fx.Node]:
    """Fused attention as a softmax between two products, in place: the second product, and the probabilities."""
    scale, causal = found.scale, found.causal
    mask = found.mask

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if k.shape[-3] != q.shape[-3]:
            k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
            v = v.repeat_interleave(q.shape[-3] // v.shape[-3], -3)
        scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if causal:
            allowed = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
            scores = scores.masked_fill(~allowed, float("-inf"))
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        probabilities = torch.ops.aten._safe_softmax(scores, -1)
        return probabilities @ v, probabilities

    result, probabilities = splice(gm, found.node, attention, found.q, found.k, found.v, mask)
    found.node.replace_all_uses_with(result)
    gm.graph.erase_node(found.node)
    return result, probabilities


def _residuals(gm: fx.GraphModule, recipe: Recipe, key: Callable[[str, str], str]) -> Iterator[Edge]:
    """The operands of residual adds and of concatenations of activations: one range for all operands of one op."""
    if recipe.residuals is None and not any(o.role == "residuals" for o in recipe.overrides):
        return
    for node in [r.node for r in residuals(gm)] + [n for n in gm.graph.nodes if n.target in CAT]:
        operands = [n for n in node.all_input_nodes if not depends_on_parameters_only(n) and _is_float(n)]
        path = anchor(node)
        spec = recipe.spec("residuals", (path,))
        if spec is None or len(operands) < 2 or recipe.ignores(path):
            continue
        shared = key(path, "residual")
        yield from (Edge(shared, "residual", operand, (node,), spec, (path,)) for operand in operands)


def _is_float(node: fx.Node) -> bool:
    return isinstance(value(node), Tensor) and value(node).is_floating_point()


def _leads_to(node: fx.Node, end: fx.Node) -> bool:
    """``end`` is reached from ``node`` by ops that move, multiply or mask (not through another product's weights)."""
    seen, queue = {node}, [node]
    while queue:
        here = queue.pop()
        if here is end:
            return True
        for user in here.users:
            if user not in seen and not end < user:
                seen.add(user)
                queue.append(user)
    return False

