"""What is pointwise behind a product becomes the end of its kernel: bias, activation, residual, gate, rounding to codes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.graph.capture import fake_mode_of
from fxquant.graph.effects import writers_of
from fxquant.graph.fuel import Fuel
from fxquant.graph.rewrite import WRITTEN, splice
from fxquant.graph.spelling import CASTS, FAMILIES
from fxquant.graph.tidy import value
from fxquant.patterns.linear import same_sizes

from ..kernels.kernel import SITES
from . import gemm  # noqa: F401  (defines the ops)
from .halves import halves_of
from .program import Program, Step, kind_of, number_of

aten = torch.ops.aten
GEMMS = (torch.ops.fxquant.a8_gemm.default, torch.ops.fxquant.a16_gemm.default)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LONGEST = 48  # steps; whatever is longer is no epilogue, and its operands would not fit the registers

UNARY = {
    aten.neg.default: "neg", aten.abs.default: "abs", aten.square.default: "square", aten.reciprocal.default: "reciprocal",
    aten.sqrt.default: "sqrt", aten.rsqrt.default: "rsqrt", aten.exp.default: "exp", aten.erf.default: "erf",
    aten.tanh.default: "tanh", aten.sigmoid.default: "sigmoid", aten.round.default: "round", aten.relu.default: "relu",
    aten.silu.default: "silu",
}  # fmt: skip
BINARY = {
    aten.add.Tensor: "add", aten.add.Scalar: "add", aten.sub.Tensor: "sub", aten.sub.Scalar: "sub",
    aten.mul.Tensor: "mul", aten.mul.Scalar: "mul", aten.div.Tensor: "div", aten.div.Scalar: "div",
    aten.maximum.default: "maximum", aten.minimum.default: "minimum",
    aten.clamp_min.default: "maximum", aten.clamp_max.default: "minimum",
}  # fmt: skip
POWERS = {2: "square", 3: "cube", 0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}
Spelled = list[tuple[str, tuple[Any, ...]]]
"""Ops of a program in their order; an argument is a node, a number, or LAST, the result of the op before."""
LAST = object()


def spelled(node: fx.Node) -> Spelled | None:
    """``node`` in ops of a program, or None if it is not pointwise, or not known to be."""
    target, args, kwargs = node.target, node.args, dict(node.kwargs)
    if target in UNARY:
        return [(UNARY[target], args)]
    if target is aten.gelu.default:
        return [("gelu" if kwargs.get("approximate", "none") == "none" else "gelu_tanh", args)]
    if target in (aten.rsub.Scalar, aten.rsub.Tensor) and kwargs.get("alpha", 1) == 1 and len(args) == 2:
        return [("sub", (args[1], args[0]))]
    if target is aten.pow.Tensor_Scalar and args[1] in POWERS:
        return [(POWERS[args[1]], args[:1])]  # type: ignore[index]  # a number, it is in the table
    if target in (aten.clamp.default, aten.clamp.Tensor):
        lo, hi = (args[i] if len(args) > i else kwargs.get(name) for i, name in ((1, "min"), (2, "max")))
        steps: Spelled = [] if lo is None else [("maximum", (args[0], lo))]
        return steps if hi is None else [*steps, ("minimum", (LAST if steps else args[0], hi))]
    if target in BINARY and kwargs.get("rounding_mode") is None:
        alpha = args[2] if len(args) > 2 else kwargs.get("alpha", 1)
        if alpha != 1:
            return [("mul", (args[1], alpha)), (BINARY[target], (args[0], LAST))]
        return [(BINARY[target], args[:2])]
    return None


def fuse_epilogues(gm: fx.GraphModule, fuel: Fuel) -> list[str]:
    """Grow every product over what is pointwise behind it, in place; returns the programs that were written.

    A product reaches as far as one value leaves the region; a second product of the same activations joins as its gated half,
    and one whose result is cut in halves that meet again is two (``halves.py``).
    A graph without products for a GPU, as every graph on a CPU is, stays as it is.
    """
    written = []
    for product in [node for node in gm.graph.nodes if node.target in GEMMS]:
        if product._erased:
            continue
        halves = halves_of(gm, product, arguments(product))
        region = grown(halves.products[0] if halves else product)
        if halves and (region is None or len(region.products) < 2):  # two products that stay two read the activations twice
            halves.undo()
            halves, region = None, grown(product)
        if region is None:
            continue
        if fuel.take(f"fuse {region.result.name} with {product.name}"):
            _write(gm, region)
            written.append(str(Program(tuple(region.steps))))
        elif halves:
            halves.undo()
    if written:
        gm.graph.eliminate_dead_code()  # what cut the halves
        gm.recompile()
    return written


@dataclass
class Region:
    """What one kernel will compute: ``names`` tells where each covered node is in its program."""

    product: fx.Node
    steps: list[Step] = field(default_factory=list)
    names: dict[fx.Node, str] = field(default_factory=dict)
    operands: list[tuple[fx.Node, str]] = field(default_factory=list)  # with their kinds
    products: list[fx.Node] = field(default_factory=list)

    def copy(self) -> Region:
        """One that can be grown while this one stays."""
        return Region(self.product, list(self.steps), dict(self.names), list(self.operands), list(self.products))

    @property
    def result(self) -> fx.Node:
        """The node whose value the program ends with."""
        return next(reversed(self.names))

    def open(self) -> list[fx.Node]:
        """The covered nodes that somebody outside reads; their sizes can be told without them."""
        return [n for n in self.names if any(u not in self.names and not self.asks_size(u) for u in n.users)]

    def asks_size(self, user: fx.Node) -> bool:
        """``user`` wants a size that a covered view was given."""
        return user.target is aten.sym_size.int and self.size(user) is not None

    def size(self, user: fx.Node) -> Any:
        """The node or number that ``user``, a sym_size, stands for; None if no view of that shape tells."""
        source, dim = user.args
        view = self.view_like(value(source).shape)
        return None if view is None else view.args[1][dim]  # type: ignore[index]

    def view_like(self, shape: Any) -> fx.Node | None:
        """A covered view to ``shape`` that names all its sizes."""
        views = (n for n in self.names if FAMILIES.get(n.target) == "view" and same_sizes(value(n).shape, shape))
        return next((n for n in views if -1 not in [s for s in n.args[1] if isinstance(s, int)]), None)  # type: ignore[union-attr]

    def fresh(self) -> str:
        """A name for the next step."""
        return f"t{len(self.steps)}"

    def add_product(self, node: fx.Node) -> None:
        """The product ``node`` with the program and operands that it has."""
        given = arguments(node)
        program, here = Program.parse(given["program"]), f"y{len(self.products)}"
        names = {"y0": here}
        for name in program.operands:
            names[name] = self.operand(given["inputs"][number_of(name)], kind_of(name))
        for step in program.steps:
            names[step.name] = self.fresh()
            self.steps.append(Step(names[step.name], step.op, tuple(names.get(a, a) for a in step.args)))
        self.products.append(node)
        self.names[node] = names[program.result]

    def operand(self, node: fx.Node, kind: str) -> str:
        """The name of an operand, which is read once however often it occurs."""
        if (node, kind) not in self.operands:
            self.operands.append((node, kind))
        return f"{kind}{self.operands.index((node, kind))}"

    def take(self, node: fx.Node) -> bool:
        """Cover ``node``, which reads covered nodes, if a program can compute it."""
        y, source = value(node), next(iter(node.all_input_nodes), node)  # the first argument, where the op has one
        if node.op != "call_function" or not isinstance(y, Tensor) or any(True for _ in writers_of(node)):
            return False
        sources = [a for a in node.all_input_nodes if a in self.names]
        if any(value(a).dtype not in FLOATS for a in sources):
            return False
        width = value(self.product).shape[-1]
        if FAMILIES.get(node.target) == "view" and source in self.names:
            if same_sizes(y.shape[-1:], (width,)):
                self.names[node] = self.names[source]
                return True
            return False
        if not all(same_sizes(value(a).shape, y.shape) for a in sources):
            return False
        if node.target in CASTS and source in self.names and y.dtype in (*FLOATS, torch.int8):
            self.names[node] = self.names[source]
            return True
        ops = spelled(node) if y.dtype in FLOATS else None
        return bool(ops) and len(self.steps) < LONGEST and self._take_ops(node, ops or [])

    def _take_ops(self, node: fx.Node, ops: Spelled) -> bool:
        for op, args in ops:
            read = [self.steps[-1].name if a is LAST else self.spelling(a, node) for a in args]
            if None in read:
                return False
            self.steps.append(Step(self.fresh(), op, tuple(filter(None, read))))
        self.names[node] = self.steps[-1].name
        return True

    def spelling(self, argument: Any, node: fx.Node) -> str | None:
        """The argument of a step: a covered value, a number, or an operand that is broadcast to ``node``."""
        if isinstance(argument, int | float) and not isinstance(argument, bool):
            return repr(float(argument)) if math.isfinite(argument) else None
        if not isinstance(argument, fx.Node) or not isinstance(value(argument), Tensor):
            return None
        if argument not in self.names and not self._join(argument):
            kind = kind_of_operand(value(argument), value(node).shape)
            if kind is None or any(True for _ in writers_of(argument)):
                return None
            return self.operand(argument, kind)
        return self.names[argument]

    def _join(self, end: fx.Node) -> bool:
        """Cover the chain from a second product of the same activations to ``end``, read by nobody else, if there is one."""
        chain = [end]
        while chain[-1].target not in GEMMS:
            here = chain[-1]
            if len(here.users) != 1 or not here.args or not isinstance(here.args[0], fx.Node):
                return False
            chain.append(here.args[0])
        if len(chain[-1].users) != 1 or len(self.products) != 1 or not _alike(self.product, chain[-1]):
            return False
        before = self.copy()
        self.add_product(chain.pop())
        if all(self.take(node) for node in reversed(chain)):
            return True
        self.steps, self.names, self.operands, self.products = before.steps, before.names, before.operands, before.products
        return False


def grown(product: fx.Node) -> Region | None:
    """The largest region from ``product`` on that one value leaves; None if it is the product alone."""
    region, best = Region(product), None
    region.add_product(product)
    own = len(region.steps)
    while True:
        for user in sorted({u for n in region.names for u in n.users if u not in region.names}):
            trial = region.copy()
            if trial.take(user):
                region = trial
                break
        else:
            return best
        worth = len(region.steps) > own or value(region.result).dtype is not value(product).dtype
        if worth and region.open() == [region.result]:
            best = region.copy()


def kind_of_operand(x: Tensor, shape: Any) -> str | None:
    """How ``x`` is broadcast to ``shape`` [..., N], as a program names it; None if in no way that the kernels know."""
    ones = [isinstance(size, int) and size == 1 for size in x.shape]
    if all(ones):
        return "scalar" if x.dtype in (*FLOATS, torch.int32) else None
    if x.dtype not in FLOATS:
        return None
    if same_sizes(x.shape, shape):
        return "full"
    if all(ones[:-1]) and same_sizes(x.shape[-1:], shape[-1:]):
        return "column"
    return "row" if ones[-1] and same_sizes(x.shape[:-1], shape[:-1]) else None


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of ``node`` by name, defaults too."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]  # an op
    return {
        a.name: node.args[i] if i < len(node.args) else node.kwargs.get(a.name, a.default_value) for i, a in enumerate(schema)
    }


def _alike(a: fx.Node, b: fx.Node) -> bool:
    """Two products of the same activations, of the same form."""
    if a.target is not b.target:
        return False
    x, y = arguments(a), arguments(b)
    same = all(_same(x[name], y[name]) for name in x if name not in ("weights", "inputs", "program"))
    shapes = [[(value(w).shape, value(w).dtype) for w in given["weights"]] for given in (x, y)]
    return a is not b and same and shapes[0] == shapes[1]


def _same(a: Any, b: Any) -> bool:
    """Equal literals, one node, or views that are spelled alike: each product flattens the activations for itself."""
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return bool(a == b) if not isinstance(a, list | tuple) else len(a) == len(b) and all(map(_same, a, b))
    if a is b:
        return True
    alike = a.target is b.target and (FAMILIES.get(a.target) == "view" or a.target is aten.sym_size.int)
    return alike and len(a.args) == len(b.args) and all(map(_same, a.args, b.args))


def _write(gm: fx.GraphModule, region: Region) -> None:
    result, product = region.result, region.product
    given, width = arguments(product), value(product).shape[-1]
    weights = [w for node in region.products for w in arguments(node)["weights"]]
    kinds, text, dtype = [kind for _, kind in region.operands], str(Program(tuple(region.steps))), value(result).dtype
    shapes = {"full": (-1, width), "column": (width,), "row": (-1, 1), "scalar": ()}
    fixed = {name: v for name, v in given.items() if name not in ("weights", "inputs", "program", "out_dtype")}
    leading = {name: v for name, v in fixed.items() if isinstance(v, fx.Node)}
    literals = {name: v for name, v in fixed.items() if name not in leading}

    def fused(leading: dict[str, Tensor], weights: list[Tensor], operands: list[Tensor]) -> Tensor:
        inputs = [x.reshape(shapes[kind]) for x, kind in zip(operands, kinds, strict=True)]
        y: Tensor = product.target(**leading, **literals, weights=weights, inputs=inputs, program=text, out_dtype=dtype)  # type: ignore[operator]
        return y

    new = splice(gm, result, fused, leading, weights, [node for node, _ in region.operands])
    new.meta[SITES] = tuple(dict.fromkeys(site for node in region.products for site in node.meta.get(SITES, ())))
    if not same_sizes(value(new).shape, value(result).shape):
        view = region.view_like(value(result).shape)
        assert view is not None
        sizes = view.args[1]
        with gm.graph.inserting_before(result):
            shown = gm.graph.call_function(aten.reshape.default, (new, sizes))
        with fake_mode_of(gm):
            shown.meta = {"val": value(new).view(fx.map_arg(sizes, value)), WRITTEN: True}
        new = shown
    for node in region.names:
        for user in [u for u in node.users if u not in region.names and region.asks_size(u)]:
            size = region.size(user)
            user.replace_all_uses_with(size)
            gm.graph.erase_node(user)
    result.replace_all_uses_with(new)
    for node in sorted(region.names, reverse=True):
        gm.graph.erase_node(node)
