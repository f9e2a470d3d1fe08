"""Say what of a graph is quantized and how: every product with a parameter is a Site, every activation to round an Edge."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from fxquant.errors import PlanError
from fxquant.graph.capture import Parameter
from fxquant.graph.equivalence import constant, root_of
from fxquant.graph.fold import unit_of
from fxquant.graph.fuel import Fuel
from fxquant.graph.ops import fake_quantize
from fxquant.graph.rewrite import WRITTEN, splice
from fxquant.graph.tidy import operand, value
from fxquant.graph.weights import cone_of, parameter_only
from fxquant.numerics.granularity import PerChannel, PerGroup, PerToken
from fxquant.numerics.of_outputs import clipped
from fxquant.numerics.ranges import DYNAMIC
from fxquant.recipe import Recipe, Spec
from fxquant.report import sqnr

from .edges import Edge, Ranges, edges_of, insert, rounded, settle
from .linear import parameter_products

aten = torch.ops.aten
Clips = Mapping[str, tuple[Tensor, Tensor]]
"""Of weights by path: the shares of their extremes that they are clipped to."""
CLIP = "clip"  # what a plan calls them, where transforms have their names
SITE = "fxquant_site"  # the key of the site that a node computes, in its meta


@dataclass(frozen=True, eq=False)
class Site:
    """One product (or listed look-up) of a graph that reads a parameter.

    ``path`` is the parameter's name, ``names`` all that a rule may call it (a tied head has that of its module too),
    ``argument`` its position among the graph's arguments, ``arguments`` all the positions that its weight expression reads;
    ``reason`` says why it stays in floating point (empty: it is quantized). ``clips``: the shares of its extremes that its
    weight is clipped to, where calibration has found such.
    """

    key: str
    path: str
    op: str
    argument: int
    arguments: tuple[int, ...]
    elements: int
    counted: bool
    activation: Spec | None = None
    weight: Spec | None = None
    reason: str = ""
    names: tuple[str, ...] = ()
    clips: tuple[Tensor, Tensor] | None = None
    noise: Callable[[Mapping[int, Tensor]], float] | None = None

    def clip(self, w: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """``w`` [..., N, K] within the shares ``low`` and ``high`` of its extremes."""
        assert self.weight is not None
        return clipped(w, low, high, self.weight.granularity, getattr(self.weight.format, "symmetric", True))

    def round_weight(self, w: Tensor) -> Tensor:
        """``w`` [..., N, K] as it is rounded here."""
        if self.weight is None:
            return w
        w = w if self.clips is None else self.clip(w, *(share.to(w) for share in self.clips))
        return self.weight.fake_quantize(w)

    @property
    def is_stack(self) -> bool:
        """The weight is stored as [..., K, N], and its transpose is rounded."""
        return self.op not in ("linear", "embedding")

    @property
    def spelled(self) -> str:
        """The two Specs in a few letters: ``W int8 per channel, A uint8 per token``."""
        sides = (("W", self.weight), ("A", self.activation))
        return ", ".join(f"{letter} {spec.brief}" for letter, spec in sides if spec is not None)


@dataclass(frozen=True, eq=False)
class Annotation:
    """What ``annotate`` decided: the sites, quantized or with a reason, and the edges of activations that are rounded.

    ``open`` are the static edges whose range is not known; what they are for stays in floating point.
    """

    sites: tuple[Site, ...]
    edges: tuple[Edge, ...]
    open: tuple[Edge, ...] = ()


def annotate(
    gm: fx.GraphModule, recipe: Recipe, fuel: Fuel, ranges: Ranges | None = None, clips: Clips | None = None
) -> Annotation:
    """The sites and edges of ``gm`` under ``recipe``; nodes that compute a site get its key. The graph computes what it did.

    ``ranges`` gives the range of a static edge by its key, ``clips`` the shares of a weight's extremes by its path. What needs
    them stays open without, for calibration to find.
    """
    sites: dict[tuple[fx.Node, fx.Node], Site] = {}
    inputs = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    folded = parameter_only(gm)
    for number, (node, weight, kind) in enumerate([*parameter_products(gm), *_look_ups(gm, folded)]):
        reads = {n: p for n in cone_of(weight) if n in inputs and (p := Parameter.of(n)) is not None}
        if not reads or node in folded:
            continue  # a product of constants, or one that is done once per parameter version
        root = root_of(weight)
        assert root is not None  # it reads parameters
        path, arguments = reads[root].path, tuple(sorted(inputs[n] for n in reads))
        site = Site(f"{number}:{path}", path, kind, inputs[root], arguments, value(weight).numel(), _counted(kind))
        site = replace(site, names=tuple(dict.fromkeys((path, *_module_names(node)))))
        site = _decide(site, node, weight, recipe)
        if not site.reason and not fuel.take(f"quantize {path}"):
            site = replace(site, reason="out of fuel")
        sites[node, weight] = site if clips is None else settled(site, clips)
    rounded_inputs = {node: (s.activation, s.names) for (node, _), s in sites.items() if not s.reason and s.activation}
    edges = edges_of(gm, rounded_inputs, recipe)
    missing: list[Edge] = []
    if ranges is not None:
        edges, missing = settle(edges, recipe, ranges)
        without = {reader for edge in missing for reader in edge.readers}
        edges = [replace(edge, readers=kept) for edge in edges if (kept := tuple(r for r in edge.readers if r not in without))]
        sites = {key: replace(s, reason=NO_RANGE) if key[0] in without and not s.reason else s for key, s in sites.items()}
    spec_of = {reader: edge.spec for edge in edges if edge.role in ("input", "norm") for reader in edge.readers}
    for (node, weight), site in sites.items():
        if not site.reason:
            node.meta[SITE] = site.key
            site = replace(site, activation=spec_of.get(node, site.activation))
            sites[node, weight] = replace(site, noise=_noise(gm, weight, site))
    return Annotation(tuple(sites.values()), tuple(edges), tuple(missing))


NO_RANGE = "the recipe is static and no range is known for this site; calibrate, or add it to ranges"
NO_CLIPS = "the range of its weight is to be found by calibration, and no plan has it; calibrate"


def settled(site: Site, clips: Clips) -> Site:
    """The site with the range of its weight, where calibration is to find that; with the reason, if it did not."""
    if site.reason or site.weight is None or not site.weight.is_of_outputs:
        return site
    if (found := clips.get(site.path)) is None:
        return replace(site, reason=NO_CLIPS)
    return replace(site, weight=replace(site.weight, range=DYNAMIC), clips=found)


def quantize(gm: fx.GraphModule, annotation: Annotation) -> fx.GraphModule:
    """Put a fake quantization on every annotated edge and weight, in place."""
    insert(gm, annotation.edges, rounded(gm))
    quantize_weights(gm, annotation)
    return gm


def quantize_weights(gm: fx.GraphModule, annotation: Annotation) -> None:
    """The weights' half of ``quantize``: the activations stay as they are."""
    chosen = {site.key: site for site in annotation.sites}
    for node in list(gm.graph.nodes):
        site = chosen.get(node.meta.get(SITE))
        if site is not None and not site.reason and site.weight is not None:
            place = 0 if site.op == "embedding" else 1
            node.update_arg(place, _round_weight(gm, node, operand(node, place), site))
    gm.recompile()


def _decide(site: Site, node: fx.Node, weight: fx.Node, recipe: Recipe) -> Site:
    """The Specs of a site, or the reason why it has none."""

    def refuse(reason: str) -> Site:
        return replace(site, reason=reason)

    if rule := next(filter(None, map(recipe.ignores, site.names)), None):
        return refuse(f"ignored by {rule!r}")
    if site.op == "embedding":
        table = recipe.spec("embeddings", site.names)
        if table is None:
            return refuse("a look-up reads one row per token and multiplies nothing")
        reason = table.granularity.refusal(value(weight).shape)
        return refuse(reason) if reason else replace(site, weight=table)
    if site.op == "convolution":
        return refuse("a convolution that is no patch embedding; only matrix products are quantized")
    w = value(weight)
    if w.ndim < 2:
        return refuse(f"the weight has shape {list(w.shape)}, a matrix is needed")
    if not w.is_floating_point():
        return refuse(f"the parameter has dtype {w.dtype}, a floating-point one is needed")
    if not isinstance(node.args[0], fx.Node) or not isinstance(node.args[1], fx.Node) or node.args[1] is not weight:
        return refuse(f"{node.target} is quantized only where its operands are an activation and then a weight")
    weight_spec, activation = recipe.spec("weights", site.names), recipe.spec("activations", site.names)
    if weight_spec is None and activation is None:
        return refuse("ignored: the recipe asks for nothing here")
    if weight_spec is not None and site.op != "linear" and isinstance(weight_spec.granularity, PerChannel):
        weight_spec = replace(weight_spec, granularity=PerToken())  # a stack of matrices: one scale per row of each
    shape = list(w.shape) if site.op == "linear" else [*w.shape[:-2], w.shape[-1], w.shape[-2]]
    if weight_spec is not None and isinstance(weight_spec.granularity, PerGroup):
        weight_spec = replace(weight_spec, granularity=weight_spec.granularity.fitted(shape[-1]))
    if weight_spec is not None and (reason := weight_spec.granularity.refusal(shape)):
        return refuse(reason)
    if activation is not None:
        if not value(node.args[0]).is_floating_point():
            return refuse(f"the activation has dtype {value(node.args[0]).dtype}")
        if reason := activation.granularity.refusal(value(node.args[0]).shape):
            return refuse(reason)
    return replace(site, weight=weight_spec, activation=activation)


def _module_names(node: fx.Node) -> list[str]:
    """The weight's name as the module calls it that computes the product: ``lm_head.weight``, though the table is tied."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return []
    path = list(stack.values())[-1][0]
    path = re.sub(r"\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", path.removeprefix("L['self']"))
    path = re.sub(r"\._modules(?=\.)", "", path).strip(".")
    return [f"{path}.weight"] if path else []


def _counted(kind: str) -> bool:
    return kind not in ("convolution", "embedding")


def _look_ups(gm: fx.GraphModule, tables: set[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node, str]]:
    for node in gm.graph.find_nodes(op="call_function", target=aten.embedding.default):
        table = operand(node, 0)
        if table in tables:
            yield node, table, "embedding"


def _round(gm: fx.GraphModule, before: fx.Node, x: fx.Node, spec: Spec) -> fx.Node:
    with gm.graph.inserting_before(before):
        node = gm.graph.call_function(fake_quantize, (x, spec.to_json()))
    node.meta["val"] = value(x)
    node.meta[WRITTEN] = True
    return node


def _round_weight(gm: fx.GraphModule, before: fx.Node, weight: fx.Node, site: Site) -> fx.Node:
    """A weight [N, K] of a linear is rounded along K; of a stack [..., K, N] the transpose is."""
    assert site.weight is not None
    turned = splice(gm, before, _transpose, weight) if site.is_stack else weight
    if site.clips is not None:
        fake, granularity = value(turned), site.weight.granularity
        needed, found = granularity.reduce(torch.amin, granularity.split(fake)).shape, site.clips[0].shape
        if found != needed:
            shapes = f"of shape {list(found)}, {list(needed)} is needed"
            raise PlanError(f"the plan has ranges for the weight of '{site.path}' {shapes}; calibrate this model as it is")
        shares = [constant(gm, share.to(fake.device, fake.dtype), "clip") for share in site.clips]
        turned = splice(gm, before, site.clip, turned, *shares, memo=("clip", site.weight))
    rounded = _round(gm, before, turned, site.weight)
    return splice(gm, before, _transpose, rounded) if site.is_stack else rounded


def _transpose(w: Tensor) -> Tensor:
    return w.transpose(-2, -1)


def _noise(gm: fx.GraphModule, weight: fx.Node, site: Site) -> Callable[[Mapping[int, Tensor]], float] | None:
    """The weight's SQNR as a function of the graph's arguments, evaluated when a report is asked for."""
    if site.weight is None:
        return None
    unit = unit_of(gm, weight)

    def noise(args: Mapping[int, Tensor]) -> float:
        (w,) = unit().fold([args[i] for i in unit().inputs])
        w = _transpose(w) if site.is_stack else w
        return sqnr(w, site.round_weight(w))

    return noise
