"""The compiler in one page: captured, canonical, equalized, annotated, quantized, lowered, folded, compiled."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.errors import GradientError
from fxquant.graph.capture import Parameter, capture, has_tensors
from fxquant.graph.fold import FoldedWeights, fold
from fxquant.graph.fuel import Fuel
from fxquant.graph.rewrite import copy_of
from fxquant.graph.stages import Stages
from fxquant.graph.tidy import tidy, value, views_that_may_copy
from fxquant.graph.weights import cone_of
from fxquant.patterns.annotate import CLIP, NO_RANGE, Clips, Site, annotate, quantize
from fxquant.patterns.canonical import canonicalize
from fxquant.patterns.edges import Edge
from fxquant.patterns.linear import parameter_products
from fxquant.patterns.transforms import equalize, read
from fxquant.plan import Plan
from fxquant.recipe import Recipe, rule_names
from fxquant.report import Artifact, GraphSite, register, rules_of

from .chain_calls import chain_calls
from .cpu import build
from .first_calls import FirstCalls
from .fuse_attention import fuse_attention
from .fuse_norms import fuse_norms
from .fuse_products import fuse_products
from .inductor import compile_runtime
from .join_products import join_gates, join_products
from .kernels import KERNELS
from .kernels.attention_cpu import lower_attention
from .kernels.attention_triton import NAME, lower_int8_attention
from .lower import Lowered, lower
from .settings import Settings
from .triton.fuse_epilogue import fuse_epilogues
from .triton.written import written


def compile_graph(gm: fx.GraphModule, settings: Settings) -> Callable[..., Any]:
    """Dynamo's graph ``gm``, quantized as ``settings.recipe`` says and compiled; one of sizes alone is handed back."""
    if not has_tensors(gm):
        return gm.forward
    graph, differentiable = tidy(capture(gm)), _differentiable(gm)
    if settings.calibration_steps:
        return FirstCalls(graph, settings, lambda settled: compile_captured(graph, settled, differentiable))
    return compile_captured(graph, settings, differentiable)


def compile_captured(graph: fx.GraphModule, settings: Settings, differentiable: Sequence[int]) -> "CompiledGraph":
    """The captured ``graph`` (changed in place) through all stages; again, without the C++ kernels, if they fail to compile."""
    spare = copy_of(graph) if build.running() else None
    compiled = _through_all_stages(graph, settings, differentiable)
    if spare is not None and build.why_not(wait=True):
        return _through_all_stages(spare, settings, differentiable)
    return compiled


def _through_all_stages(graph: fx.GraphModule, settings: Settings, differentiable: Sequence[int]) -> "CompiledGraph":
    stages, fuel, recipe, plan = Stages(settings.trace), Fuel(settings.fuel), settings.recipe, settings.plan

    inputs = graph.graph.find_nodes(op="placeholder")
    reads = {parameter.path: i for i, node in enumerate(inputs) if (parameter := Parameter.of(node)) is not None}
    stages.show("captured", graph)
    graph = canonicalize(graph, fuel)
    stages.show("canonical", graph)
    if plan is not None:
        _check(plan, graph, {path: tuple(value(inputs[i]).shape) for path, i in reads.items()})
    notes = equalize(graph, recipe.transforms, fuel, **arguments_of(plan))
    stages.show("equalized", graph, f"{len(notes)} transforms")
    annotation = annotate(graph, recipe, fuel, plan.range if plan else no_range, clips_in(plan))
    sites = annotation.sites
    stages.show("annotated", graph)
    quantize(graph, annotation)
    stages.show("quantized", graph)
    coded = lower_int8_attention(graph, fuel).coded
    kernels = lower(graph, KERNELS, fuel)
    fuse_epilogues(graph, fuel)
    fuse_norms(graph, fuel)
    fuse_products(graph, fuel)
    join_gates(graph, fuel)
    lower_attention(graph, fuel)
    fuse_attention(graph, fuel)
    join_products(graph, fuel)
    stages.show("lowered", tidy(views_that_may_copy(graph)))
    generated = written(graph, {site.key: site.path for site in sites})
    folded = fold(graph)
    stages.show("folded", folded.runtime, f"{len(folded.units)} units of weights were split off")
    chained = chain_calls(folded.runtime, fuel)
    stages.show("chained", folded.runtime, f"{chained} calls are part of others")
    stages.tell(fuel)
    run = compile_runtime(folded.runtime, settings.inductor)

    listed = [_graph_site(site, kernels.get(site.key), recipe) for site in sites]
    for edges, reason in ((annotation.edges, ""), (annotation.open, NO_RANGE)):
        listed += [_graph_edge(e, reads, reason, e.value in coded) for e in edges if e.role != "input" and e.names[0] in reads]
    artifact = Artifact(recipe, tuple(listed), tuple(notes), sorted(reads.values()), plan, generated)
    register(artifact)
    _warn_of_what_was_not_done(artifact)
    weights = FoldedWeights(folded.units, [i for site in sites for i in site.arguments], artifact.meet)
    return CompiledGraph(run, weights, folded.kept, differentiable, artifact)


class CompiledGraph:
    """What Dynamo calls: checks the folded weights, runs the runtime graph, and answers a gradient with an error.

    ``differentiable`` numbers the outputs that would have a gradient in the model as it was.
    """

    def __init__(
        self,
        run: Callable[..., Sequence[Any]],
        weights: FoldedWeights,
        kept: Sequence[int],
        differentiable: Sequence[int],
        artifact: Artifact,
    ) -> None:
        self._run = run
        self._weights = weights
        self._kept = tuple(kept)
        self._differentiable = tuple(differentiable)
        self.artifact = artifact  # alive as long as the graph is, so that explain() finds it

    def __call__(self, *args: Any) -> Any:
        folded = self._weights(args)
        wants_gradients = torch.is_grad_enabled()
        with torch.no_grad():
            out = self._run(*[args[i] for i in self._kept], *folded)
        anchor = next((a for a in args if isinstance(a, Tensor) and a.requires_grad), None) if wants_gradients else None
        if anchor is not None:
            given = {id(a) for a in args}
            return _InferenceOnly.guard(anchor, out, [i for i in self._differentiable if id(out[i]) not in given])
        return out


def _differentiable(gm: fx.GraphModule) -> list[int]:
    """The outputs of Dynamo's graph that require a gradient."""
    (outputs,) = gm.graph.output_node().args
    examples = [o.meta.get("example_value") if isinstance(o, fx.Node) else None for o in outputs]  # type: ignore[union-attr]  # a tuple
    return [i for i, e in enumerate(examples) if isinstance(e, Tensor) and e.is_floating_point() and e.requires_grad]


class _InferenceOnly(torch.autograd.Function):
    """The identity, whose backward says that there is none."""

    @staticmethod
    def guard(anchor: Tensor, out: Sequence[Any], positions: Sequence[int]) -> Sequence[Any]:
        """``out`` with the tensors at ``positions`` guarded; ``anchor`` is any tensor that requires gradients."""
        if not positions:
            return out
        result = list(out)
        for i, o in zip(positions, _InferenceOnly.apply(anchor, [out[i] for i in positions]), strict=True):
            result[i] = o
        return tuple(result)

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, outputs: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(outputs)  # no arguments of the function, so they are not views of any

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise GradientError(
            "a gradient was asked of a model compiled with an inference recipe, whose rounded weights have none; call it under "
            "torch.no_grad(), or train it uncompiled (quantization-aware training will be fxquant.prepare_qat_)"
        )


def no_range(edge: str) -> None:
    """Without a plan no static range is known but those that the recipe lists."""


def arguments_of(plan: Plan | None) -> dict[str, dict[str, Any]]:
    """What the plan's transforms write, by transform and need; nothing where calibration found nothing to do."""
    if plan is None:
        return {}
    found = {t: plan.maps(t.name) for t in read(plan.recipe.transforms) if t.needs}
    return {t.name: {need: maps.get(need, {}) for need in t.needs} for t, maps in found.items()}


def clips_in(plan: Plan | None) -> Clips:
    """What the plan has of the ranges of weights."""
    found = plan.maps(CLIP) if plan is not None else {}
    return {path: (low, found["high"][path]) for path, low in found.get("low", {}).items()}


def _check(plan: Plan, graph: fx.GraphModule, weights: dict[str, tuple[int, ...]]) -> None:
    """Raise PlanError if a product of this graph has a weight that the plan has not met, or not so; a graph may be a part."""
    read = {p.path for product in parameter_products(graph) for n in cone_of(product.weight) if (p := Parameter.of(n))}
    if any(plan.sites.get(path) != weights[path] for path in read if path in weights):
        plan.check(weights)


def _graph_edge(edge: Edge, reads: dict[str, int], reason: str = "", coded: bool = False) -> GraphSite:
    """An activation that is rounded beside the products: listed, not counted; ``coded``: attention reads its codes."""
    path = edge.names[0]
    return GraphSite(
        path=path,
        op=edge.key.removeprefix(f"{path}:"),
        argument=reads[path],
        elements=0,
        counted=False,
        spec=f"A {edge.spec.brief}",
        kernel="" if reason else NAME if coded else "rounded in floating point",
        reason=reason,
    )


def _graph_site(site: Site, lowered: Lowered | None, recipe: Recipe) -> GraphSite:
    return GraphSite(
        path=site.path,
        op=site.op,
        argument=site.argument,
        elements=site.elements,
        counted=site.counted,
        spec=site.spelled,
        kernel=lowered.kernel if lowered else "",
        reason=site.reason or ("" if lowered else "no kernel took it"),
        named_by=tuple(rule for rule in rules_of(recipe) if any(_names(rule, name) for name in site.names)),
        noise=site.noise,
    )


def _names(rule: str, site: str) -> bool:
    return rule_names(rule, site) or rule.removesuffix(".weight") == site.removesuffix(".weight")


def _warn_of_what_was_not_done(artifact: Artifact) -> None:
    missed = [s for s in artifact.sites if s.counted and s.reason and not s.reason.startswith("ignored")]
    if missed:
        shown = "; ".join(f"{s.path} ({s.op}): {s.reason}" for s in missed[:3])
        more = f"; and {len(missed) - 3} more, see fxquant.explain(model)" if len(missed) > 3 else ""
        total = sum(s.counted for s in artifact.sites)
        warnings.warn(f"outlierq left {len(missed)} of {total} products in floating point: {shown}{more}", stacklevel=2)
