"""What was done to a model, site by site: ``print(fxquant.explain(model))``."""

import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .graph.equivalence import Note
from .recipe import Recipe


@dataclass(frozen=True)
class SiteReport:
    """One product of an activation with a parameter (or one listed look-up): what became of it.

    ``spec`` names the formats ("int8 x int8"), ``elements`` counts the parameter's elements, ``sqnr`` is the signal to
    quantization noise ratio of the weight in dB (None where nothing was quantized).
    """

    name: str
    op: str
    spec: str
    kernel: str
    status: str  # "quantized" or "skipped"
    reason: str
    elements: int
    counted: bool = True
    sqnr: float | None = None


@dataclass(frozen=True)
class Report:
    """What one model's compiled graphs do; ``str(report)`` is for reading."""

    recipe: str
    graphs: int
    sites: tuple[SiteReport, ...]
    transforms: tuple[Note, ...]
    note: str = ""

    @property
    def coverage(self) -> float:
        """Share (0..1) of the weight elements in matrix products that run quantized; 1.0 for a model without any."""
        total = sum(s.elements for s in self.sites if s.counted)
        done = sum(s.elements for s in self.sites if s.counted and s.status == "quantized")
        return done / total if total else 1.0

    def __str__(self) -> str:
        if self.note:
            return self.note
        quantized = sum(s.status == "quantized" and s.counted for s in self.sites)
        products = sum(s.counted for s in self.sites)
        lines = [
            f"outlierq: recipe {self.recipe}, {self.graphs} graph{'s' * (self.graphs != 1)}, "
            f"{quantized} of {products} products quantized, {100 * self.coverage:.1f}% of their weight elements",
            "",
        ]
        lines += _table([("site", "op", "spec", "kernel", "weight SQNR")] + [_row(s) for s in self.sites])
        if self.transforms:
            lines += ["", "transforms"]
            lines += _table([(n.transform, n.where, n.outcome, n.reason) for n in self.transforms], indent="  ")
        return "\n".join(lines)


def _row(site: SiteReport) -> tuple[str, ...]:
    if site.status != "quantized":
        return (site.name, site.op, "-", f"skipped: {site.reason}", "")
    return (site.name, site.op, site.spec, site.kernel, "" if site.sqnr is None else f"{site.sqnr:.1f} dB")


def _table(rows: Sequence[tuple[str, ...]], indent: str = "") -> list[str]:
    widths = [min(60, max(len(r[i]) for r in rows)) for i in range(len(rows[0]))]
    return [(indent + "  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True))).rstrip() for r in rows]


@dataclass(eq=False)
class GraphSite:
    """A site of one compiled graph, before it is known whose parameters it reads.

    ``argument`` is the position of the parameter among the graph's arguments, ``path`` its name below what was compiled;
    ``noise`` maps the graph's arguments, by position and no more than the unit reads, to the weight's SQNR in dB.
    """

    path: str
    op: str
    argument: int
    elements: int
    counted: bool = True
    spec: str = ""
    kernel: str = ""
    reason: str = ""
    noise: Callable[[Mapping[int, Tensor]], float] | None = None


@dataclass(eq=False)
class Artifact:
    """One compiled graph: its sites, its transforms, and the parameters that it has met."""

    recipe: Recipe
    sites: tuple[GraphSite, ...]
    transforms: tuple[Note, ...]
    watched: tuple[int, ...]
    met: dict[tuple[int, ...], dict[int, "weakref.ref[Tensor]"]] = field(default_factory=dict)

    def meet(self, args: Sequence[Any]) -> None:
        """Remember, weakly, the parameters of this call."""
        refs = {i: weakref.ref(args[i]) for i in self.watched}
        self.met[tuple(id(args[i]) for i in self.watched)] = refs

    def parameters(self) -> Iterator[dict[int, Tensor]]:
        """The parameters met so far that are still alive, one mapping (argument -> tensor) per set."""
        for refs in list(self.met.values()):
            alive = {i: t for i, r in refs.items() if (t := r()) is not None}
            if len(alive) == len(refs):
                yield alive


_artifacts: "weakref.WeakSet[Artifact]" = weakref.WeakSet()
_lock = threading.Lock()


def register(artifact: Artifact) -> None:
    """Make a compiled graph known to ``explain``; it is forgotten when the graph is."""
    with _lock:
        _artifacts.add(artifact)


def explain(model: nn.Module) -> Report:
    """What was quantized in ``model``, by which kernel, what was not and why.

    Covers every graph compiled with ``backend="outlierq"`` that has run with parameters of ``model``, whole or regional.

    >>> model.compile(backend="outlierq"); model(**batch); print(fxquant.explain(model))     # doctest: +SKIP
    """
    names = {id(p): name for name, p in _named_tensors(model)}
    with _lock:
        artifacts = list(_artifacts)
    sites: dict[tuple[str, str], SiteReport] = {}
    notes: list[Note] = []
    recipes: list[str] = []
    graphs = 0
    for artifact in artifacts:
        mine = [args for args in artifact.parameters() if any(id(t) in names for t in args.values())]
        graphs += bool(mine)
        if mine:
            recipes.append(artifact.recipe.name)
            notes += artifact.transforms
        for args in mine:
            for site in artifact.sites:
                name = names.get(id(args[site.argument]), site.path)
                sites[name, site.op] = _site_report(site, name, args)
    if not graphs:
        note = (
            "outlierq: nothing of this model has run compiled. Call model.compile(backend='outlierq') and then the model; "
            "note that torch.compile(model).generate runs the uncompiled model."
        )
        return Report("none", 0, (), (), note)
    order = {name: i for i, (name, _) in enumerate(_named_tensors(model))}
    found = sorted(sites.values(), key=lambda s: order.get(s.name, len(order)))
    unique = tuple(dict.fromkeys(notes))
    return Report(" and ".join(dict.fromkeys(recipes)), graphs, tuple(found), unique)


def _named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    first: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in named:
        first.setdefault(id(tensor), (name.replace("_orig_mod.", ""), tensor))
    return list(first.values())


def _site_report(site: GraphSite, name: str, args: dict[int, Tensor]) -> SiteReport:
    done = not site.reason
    sqnr = site.noise(args) if done and site.noise else None
    status = "quantized" if done else "skipped"
    return SiteReport(name, site.op, site.spec, site.kernel, status, site.reason, site.elements, site.counted, sqnr)


def sqnr(signal: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise ratio in dB, ``10 log10(|x|^2 / |x - q|^2)``; infinite for an exact approximation."""
    signal = signal.detach().to(torch.float64)
    noise = (signal - approximation.detach().to(torch.float64)).square().sum().item()
    power = signal.square().sum().item()
    return math.inf if noise == 0 else 10 * math.log10(power / noise) if power else -math.inf
