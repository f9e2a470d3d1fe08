"""What quantization does to each site, measured on data: ranges, channels before and after transforms, noise, sensitivity."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import linear

from fxquant.graph.equivalence import site_name
from fxquant.graph.fuel import Fuel
from fxquant.graph.laws import LINEAR
from fxquant.graph.observe import mask_for, tokens
from fxquant.graph.tidy import value
from fxquant.patterns.annotate import SITE, Site, annotate
from fxquant.patterns.inputs import linear_inputs
from fxquant.patterns.transforms import equalize
from fxquant.plan import Plan
from fxquant.recipe import Recipe

from .calibration import Progress, Runner, Session, Stage, compared, measure, reads_decoder
from .pipeline import arguments_of, clips_in, no_range

ROWS = 512  # tokens of a batch on which the noise of a site is measured


@dataclass(eq=False)
class Measurement:
    """One site: the range and the largest magnitude per channel [K] of its input, and powers of signals and their noise."""

    low: float = 0.0
    high: float = 0.0
    before: Tensor | None = None
    after: Tensor | None = None
    input: list[float] = field(default_factory=lambda: [0.0, 0.0])  # of the signal, of the noise
    output: list[float] = field(default_factory=lambda: [0.0, 0.0])
    sensitivity: float | None = None


class _Examined(nn.Module):
    """A linear that can be run rounded or not, and measures what rounding does."""

    def __init__(self, stage: "ExaminingStage", site: Site, decoder: bool) -> None:
        super().__init__()
        self._stage, self._path, self._decoder = stage, site.path, decoder
        self._activation, self._round_weight = site.activation, site.round_weight
        self._rounded: Tensor | None = None

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self._stage.active == self._path:
            x = x if self._activation is None else self._activation.fake_quantize(x)
            return linear(x, self._rounded_weight(weight), bias)
        if self._stage.active is None:
            self._measure(x, weight, bias)
        else:
            self._rounded = None
        return linear(x, weight, bias)

    def _rounded_weight(self, weight: Tensor) -> Tensor:
        if self._rounded is None:
            self._rounded = self._round_weight(weight)
        return self._rounded

    def _measure(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        found = self._stage.found.setdefault(self._path, Measurement())
        rows = tokens(x, mask_for(self._stage.session.masks, self._decoder), merge_heads=False)
        if not rows.numel():
            return
        largest = rows.abs().amax(0).float()
        found.after = largest if found.after is None else torch.maximum(found.after, largest)
        found.low, found.high = min(found.low, rows.min().item()), max(found.high, rows.max().item())
        rows = rows[:: -(-len(rows) // ROWS)]
        rounded = rows if self._activation is None else self._activation.fake_quantize(rows)
        _add(found.input, rows, rounded)
        _add(found.output, linear(rows, weight, bias), linear(rounded, self._rounded_weight(weight), bias))


def _add(powers: list[float], signal: Tensor, approximation: Tensor) -> None:
    powers[0] += signal.double().square().sum().item()
    powers[1] += (signal - approximation).double().square().sum().item()


class ExaminingStage(Stage):
    """The transformed graphs, every linear site an ``_Examined``; ``active`` is the path of the one to round, None: measure."""

    def __init__(self, session: Session, plan: Plan | None) -> None:
        self.session, self._plan = session, plan
        self.found: dict[str, Measurement] = {}
        self.active: str | None = None

    def build(self, gm: fx.GraphModule, args: Sequence[Any]) -> Callable[..., Any]:
        recipe = self.session.recipe
        equalize(gm, recipe.transforms, Fuel(), **arguments_of(self._plan))
        annotation = annotate(gm, recipe, Fuel(), self._plan.range if self._plan else no_range, clips_in(self._plan))
        sites = {site.key: site for site in annotation.sites if not site.reason}
        for node in list(gm.graph.find_nodes(op="call_function", target=LINEAR[0])):
            site = sites.get(node.meta.get(SITE))
            if site is None:
                continue
            name = f"examined_{len(self.found)}_{node.name}"
            gm.add_module(name, _Examined(self, site, reads_decoder(node.args[0])))
            with gm.graph.inserting_before(node):
                examined = gm.graph.call_module(name, node.args)
            examined.meta["val"] = value(node)
            node.replace_all_uses_with(examined)
            gm.graph.erase_node(node)
        gm.recompile()
        return self.session.runnable(gm, args)


def examine(model: nn.Module, data: Any, recipe: Recipe, plan: Plan | None, progress: Progress) -> Mapping[str, Measurement]:
    """The measurements of every linear site of ``model`` by its weight's path, on ``data`` as for ``calibrate``."""
    session = Session(recipe)
    runner = Runner(model, data, session, progress)
    before = measure(runner, (), {}, 0, "before the transforms")
    first = {site_name(n): site_name(ns[0]) for g in session.graphs for ns in linear_inputs(g.gm).values() for n in ns}

    stage = ExaminingStage(session, plan)
    session.enter(stage)
    wanted = [compared(*output) for output in runner.run("after the transforms")]
    for path in progress(list(stage.found), "each site alone"):
        stage.active = path
        error = power = 0.0
        for output, target in zip(runner.run("", parts=1), wanted, strict=False):
            error += (compared(*output) - target).double().square().sum().item()
            power += target.double().square().sum().item()
        stage.found[path].sensitivity = (error / power) ** 0.5 if power else None
    for path, found in stage.found.items():
        seen = before.seen.get(first.get(path, path))
        if seen is not None and seen.low is not None and seen.high is not None:
            found.before = torch.maximum(-seen.low, seen.high)
    return stage.found
