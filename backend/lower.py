"""From quantize/dequantize pairs to kernels: each quantized product is claimed by the first kernel that supports it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from fxquant.graph.fuel import Fuel
from fxquant.graph.match import Miss
from fxquant.graph.ops import fake_quantize, read_spec
from fxquant.graph.rewrite import replace, splice
from fxquant.graph.spelling import FAMILIES
from fxquant.graph.tidy import operand, tidy, value
from fxquant.patterns.annotate import SITE
from fxquant.recipe import Spec

from .kernels import packed_rows
from .kernels.kernel import SITES, Claim, Kernel, Product
from .kernels.simulated import SimulatedLinear

aten = torch.ops.aten


@dataclass(frozen=True)
class Lowered:
    """Which kernel took a site, or why each one declined (the declines are for the curious: the last kernel takes all)."""

    kernel: str
    declined: tuple[str, ...]


def lower(gm: fx.GraphModule, kernels: Sequence[Kernel], fuel: Fuel) -> dict[str, Lowered]:
    """Replace every quantized ``linear`` by its kernel, in place; what is left of fake quantization runs as plain PyTorch.

    Returns what happened by the site's key (``node.meta["fxquant_site"]``).
    """
    outcome: dict[str, Lowered] = {}
    prepared: Prepared = {}
    for node in list(gm.graph.find_nodes(op="call_function", target=aten.linear.default)):
        operands = _operands(node)
        if operands is None:
            continue
        kernel, declined = _choose(kernels, operands.product)
        if not fuel.take(f"lower {operands.site}"):
            outcome[operands.site] = Lowered(f"{SimulatedLinear.name}: out of fuel", ())
            continue
        _write(gm, node, kernel, operands, prepared)
        outcome[operands.site] = Lowered(kernel.name, declined)
    _lower_look_ups(gm, fuel, outcome)
    for node in gm.graph.nodes:
        if (site := node.meta.get(SITE)) is not None and site not in outcome:
            outcome[site] = Lowered("simulated (float product of rounded operands)", ("only linears have kernels",))
    for node in [n for n in gm.graph.find_nodes(op="call_function", target=fake_quantize) if n.users]:
        replace(gm, node, lambda x, spec: read_spec(spec).fake_quantize(x), *node.args, memo="fake_quantize")
    tidy(gm)
    return outcome


def _lower_look_ups(gm: fx.GraphModule, fuel: Fuel, outcome: dict[str, Lowered]) -> None:
    """Look-ups in rounded tables become look-ups in packed ones."""
    for node in list(gm.graph.find_nodes(op="call_function", target=aten.embedding.default)):
        site = node.meta.get(SITE)
        table, spec = _unquantized(operand(node, 0))
        if site is None or spec is None or not packed_rows.supports(value(table), spec) or not fuel.take(f"lower {site}"):
            continue
        width, dtype = value(table).shape[1], value(node).dtype

        packed = splice(gm, node, partial(packed_rows.pack, spec=spec), table, memo=("packed rows", spec))
        replace(gm, node, partial(packed_rows.look_up, spec=spec, width=width, dtype=dtype), packed, operand(node, 1))
        outcome[site] = Lowered(packed_rows.NAME, ())


@dataclass(frozen=True)
class _Operands:
    """The nodes of one quantized product: ``x`` and ``weight`` as they were before rounding."""

    site: str
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    product: Product


def _operands(node: fx.Node) -> _Operands | None:
    """Read ``linear(fake_quantize(x), fake_quantize(weight), bias)``, either side optional; None if nothing is quantized."""
    site = node.meta.get(SITE)
    if site is None:
        return None
    x, activation = _unquantized(operand(node, 0))
    weight, weight_spec = _unquantized(operand(node, 1))
    if activation is None and weight_spec is None:
        return None
    bias = operand(node, 2) if len(node.args) > 2 and node.args[2] is not None else None
    product = Product(value(x), value(weight), value(bias), activation, weight_spec, value(node).dtype)
    return _Operands(site, x, weight, bias, product)


def _unquantized(node: fx.Node) -> tuple[fx.Node, Spec | None]:
    """What was rounded to form ``node``, and how; ``node`` itself if it is no rounding."""
    return (operand(node, 0), read_spec(str(node.args[1]))) if node.target is fake_quantize else (node, None)


def _choose(kernels: Sequence[Kernel], product: Product) -> tuple[Kernel, tuple[str, ...]]:
    declined: list[str] = []
    for kernel in kernels:
        answer: Claim | Miss = kernel.supports(product)
        if answer:
            return kernel, tuple(declined)
        assert isinstance(answer, Miss)
        declined.append(f"{kernel.name}: {answer.reason}")
    raise AssertionError("the last kernel supports every product")


Prepared = dict[tuple[str, fx.Node], tuple[fx.Node, ...]]
"""(kernel, rounded input) -> the prepared input. An input that is written to in place has a rounding per reader."""


def _write(gm: fx.GraphModule, node: fx.Node, kernel: Kernel, o: _Operands, prepared: Prepared) -> None:
    packed, spec = (o.weight,), o.product.weight_spec
    if spec is not None:
        packed = splice(gm, node, lambda w: kernel.pack(w, spec), o.weight, memo=(kernel.name, "pack", spec))
    x = _prologue(gm, node, kernel, o, prepared)
    last, epilogue = _epilogue(node, kernel)
    p = dataclasses.replace(o.product, epilogue=epilogue)
    memo = (kernel.name, "product", p.activation, p.weight_spec, epilogue, str(p.weight.shape), p.x.dtype, p.out_dtype)
    # Where the product stood, not where its activation did: the input may be written to between the two.
    result = splice(gm, node, lambda x, w, b: kernel.product(x, w, b, p), x, packed, o.bias, memo=memo)
    _behind_views(result).meta[SITES] = (o.site,)
    last.replace_all_uses_with(result)
    gm.graph.erase_node(last)
    if last is not node:
        gm.graph.erase_node(node)


def _behind_views(node: fx.Node) -> fx.Node:
    """What ``node`` shows in another shape."""
    while FAMILIES.get(node.target) == "view":
        node = operand(node, 0)
    return node


def _prologue(gm: fx.GraphModule, node: fx.Node, kernel: Kernel, o: _Operands, prepared: Prepared) -> tuple[fx.Node, ...]:
    """The prepared input, written once for all products that read it: the first reader comes first in the graph."""
    spec = o.product.activation
    if spec is None:
        return (o.x,)
    key = (kernel.name, operand(node, 0))
    if key not in prepared:
        prepared[key] = tuple(splice(gm, node, lambda x: kernel.prologue(x, spec), o.x, memo=(kernel.name, "prologue", spec)))
    return prepared[key]


def _epilogue(node: fx.Node, kernel: Kernel) -> tuple[fx.Node, str]:
    """The node that the kernel computes: the function of the product, if that is all that reads it, else the product itself."""
    if len(node.users) == 1:
        (reader,) = node.users
        name = EPILOGUES.get((reader.target, reader.kwargs.get("approximate", "none")), "")
        if name in kernel.epilogues and reader.args == (node,):
            return reader, name
    return node, ""


# Functions of one value that a kernel may apply to its result, by op and ``approximate``.
EPILOGUES: dict[tuple[Any, Any], str] = {
    (aten.gelu.default, "none"): "gelu",
    (aten.gelu.default, "tanh"): "gelu_tanh",
    (aten.silu.default, "none"): "silu",
    (aten.relu.default, "none"): "relu",
}
