"""What was done to a model, site by site: ``print(fxquant.explain(model))``."""

import itertools
import math
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .errors import SiteError, nearest
from .graph.equivalence import Note
from .page import Row, lines, page
from .plan import Plan
from .recipe import Recipe


@dataclass(frozen=True)
class SiteReport:
    """One product of an activation with a parameter (or one listed look-up): what became of it.

    ``spec`` names the formats ("int8 x int8"), ``elements`` counts the parameter's elements (0: it is an activation that is
    rounded beside the products), ``sqnr`` is the signal to quantization noise ratio of the weight in dB (None where nothing was
    quantized).
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

    def row(self) -> Row:
        """This site as a row of the page, nothing measured but the weight."""
        return Row(
            name=self.name, op=self.op, spec=self.spec, kernel=self.kernel, status=self.status, reason=self.reason,
            sqnr_weight=self.sqnr, elements=self.elements, counted=self.counted,
        )  # fmt: skip


class Written(Protocol):
    """The generated kernels of one call in a compiled graph; ``sites`` are the weights of the sites that it is for."""

    @property
    def sites(self) -> tuple[str, ...]: ...

    def texts(self, tokens: int | None = None) -> tuple[tuple[str, str], ...]: ...  # a line about each kernel, and its source


@dataclass(frozen=True)
class Kernels:
    """The generated kernels of a model, in the order of its graphs; ``str`` prints the source of each, once.

    ``calls`` holds, for each, the names of the sites that it is for. Sources are written when they are asked for.
    """

    calls: tuple[tuple[tuple[str, ...], Written], ...] = ()

    def __len__(self) -> int:
        return len(self.calls)

    def of(self, site: str, tokens: int | None = None) -> str:
        """The sources of the kernels for the site, in the order in which they run; empty if it has none."""
        texts = [text for sites, call in self.calls if site in sites for text in call.texts(tokens)]
        return "\n\n".join(f"# {title}\n{source.rstrip()}" for title, source in texts)

    def __str__(self) -> str:
        if not self.calls:
            return "no kernel of this model was generated: kernels for NVIDIA GPUs are, those for CPUs are not"
        found: dict[tuple[str, str], list[str]] = {}
        for sites, call in self.calls:
            for text in call.texts():
                found.setdefault(text, []).extend(sites)
        out = []
        for (title, source), named in found.items():
            groups = _grouped(dict.fromkeys(named), lambda name: (_layers(name),))
            names = ", ".join(_counted_name(name, group, group[0]) for (name,), group in groups)
            out.append(f"# {title}\n# for {names}\n{source.rstrip()}")
        return "\n\n\n".join(out)


@dataclass(frozen=True)
class Report:
    """What one model's compiled graphs do; ``str(report)`` is for reading, with equal layers on one line.

    ``unmet`` names the weights (of two axes or more) that no compiled graph has met: their modules ran uncompiled, or not.
    ``measured`` are the sites as ``explain(model, data)`` found them on data.
    ``unused`` are the recipe's rules (of ignore, overrides and ranges) that name no site.
    ``kernels`` are those that were generated for it, on an NVIDIA GPU: ``print(report.kernels)``, or ``source`` for one site.
    """

    recipe: str
    graphs: int
    sites: tuple[SiteReport, ...]
    transforms: tuple[Note, ...]
    note: str = ""
    unmet: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    measured: tuple[Row, ...] = ()
    kernels: Kernels = field(default=Kernels(), compare=False, repr=False)

    def source(self, site: str, tokens: int | None = None) -> str:
        """The source of the kernels generated for ``site``: what quantizes its input, and the product with what follows it.

        ``tokens``: rows of the input, because the kernel depends on how many they are; None for those it was compiled for.

        >>> print(fxquant.explain(model).source("model.layers.0.mlp.up_proj"))       # doctest: +SKIP

        Raises SiteError for a name that is no site, or a site that has no generated kernel; the message says why.
        """
        if tokens is not None and (not isinstance(tokens, int) or tokens < 1):
            raise SiteError(f"tokens is {tokens!r}; how many rows the input has, 1 or more, is needed, or None")
        named = {name: s for s in self.sites for name in (s.name, s.name.removesuffix(".weight"))}
        if site not in named:
            known = [s.name for s in self.sites]
            raise SiteError(f"there is no site {site!r}; " + (nearest(site, known) if known else self.note or "no site at all"))
        found = named[site]
        if text := self.kernels.of(found.name, tokens):
            return text
        if found.status != "quantized":
            raise SiteError(f"site {found.name!r} stays in floating point ({found.reason}), so no kernel was generated for it")
        raise SiteError(f"site {found.name!r} runs {found.kernel!r}, which is not generated; kernels for NVIDIA GPUs are")

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the report as one page that needs nothing else: every site, worst first, with what was measured of it."""
        rows = self.measured or tuple(site.row() for site in self.sites)
        moved = [f"{note.transform} at {note.where}: {note.outcome}, {note.reason}" for note in self.transforms]
        text = page(f"outlierq: recipe {self.recipe}", rows, recipe=self.recipe, notes=moved)
        Path(path).write_text(text, encoding="utf-8")

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
        out = [
            f"outlierq: recipe {self.recipe}, {self.graphs} graph{'s' * (self.graphs != 1)}, "
            f"{quantized} of {products} products quantized, {100 * self.coverage:.1f}% of their weight elements",
        ]
        if self.unmet:
            shown = ", ".join(dict.fromkeys(map(_layers, self.unmet)))
            count = len(self.unmet)
            out.append(f"{count} weights were met by no compiled graph, so they ran uncompiled or not at all: {shown}")
        if self.unused:
            out.append(f"rules that name no site: {', '.join(map(repr, self.unused))}")
        done = [s for s in self.sites if s.status == "quantized"]
        if done:
            out += ["", *_table([("site", "op", "spec", "kernel", "weight SQNR"), *_rows(done)])]
        skipped = [s for s in self.sites if s.status != "quantized"]
        if skipped:
            out += ["", "in floating point", *_table(_skipped(skipped), indent="  ")]
        if self.transforms:
            out += ["", "transforms", *_table(_moved(self.transforms), indent="  ")]
        if self.measured:
            out += ["", "measured, worst first", lines([row for row in self.measured if row.status == "quantized"])]
        return "\n".join(out)


def _layers(name: str) -> str:
    """``encoder.layer.3.up.weight`` -> ``encoder.layer.*.up.weight``: the name that equal layers share."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _grouped(items: Iterable[Any], key: Callable[[Any], tuple[str, ...]]) -> Iterator[tuple[tuple[str, ...], list[Any]]]:
    groups: dict[tuple[str, ...], list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    yield from groups.items()


def _counted_name(name: str, sites: Sequence[Any], own: str) -> str:
    return own if len(sites) == 1 else f"{name} ({len(sites)})"


def _rows(sites: Sequence[SiteReport]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for (name, op, spec, kernel), group in _grouped(sites, lambda s: (_layers(s.name), s.op, s.spec, s.kernel)):
        noise = sorted(s.sqnr for s in group if s.sqnr is not None)
        ends = [f"{n:.1f}" for n in (noise[:1] + noise[-1:])]
        decibel = f"{' to '.join(dict.fromkeys(ends))} dB" if noise else ""
        rows.append((_counted_name(name, group, group[0].name), op, spec, kernel, decibel))
    return rows


def _skipped(sites: Sequence[SiteReport]) -> list[tuple[str, ...]]:
    groups = _grouped(sites, lambda s: (_layers(s.name), s.op, s.reason))
    return [(_counted_name(name, group, group[0].name), op, reason) for (name, op, reason), group in groups]


def _moved(notes: Sequence[Note]) -> list[tuple[str, ...]]:
    groups = _grouped(notes, lambda n: (n.transform, _layers(n.where), n.outcome, _layers(_unnumbered(n.reason))))
    return [(t, _counted_name(where, g, g[0].where), outcome, g[0].reason) for (t, where, outcome, _), g in groups]


def _unnumbered(reason: str) -> str:
    return re.sub(r"_\d+(?=')", "", reason)


def _table(rows: Sequence[tuple[str, ...]], indent: str = "") -> list[str]:
    widths = [min(60, max(len(r[i]) for r in rows)) for i in range(len(rows[0]))]
    return [(indent + "  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True))).rstrip() for r in rows]


@dataclass(eq=False)
class GraphSite:
    """A site of one compiled graph, before it is known whose parameters it reads.

    ``argument`` is the position of the parameter among the graph's arguments, ``path`` its name below what was compiled;
    ``named_by`` are the recipe's rules and listed ranges that name it;
    ``noise`` maps the graph's arguments, by position and no more than the
    unit reads, to the weight's SQNR in dB.
    """

    path: str
    op: str
    argument: int
    elements: int
    counted: bool = True
    spec: str = ""
    kernel: str = ""
    reason: str = ""
    named_by: tuple[str, ...] = ()
    noise: Callable[[Mapping[int, Tensor]], float] | None = None


@dataclass(eq=False)
class Artifact:
    """One compiled graph: its sites, its transforms, and the parameters that it has met.

    ``reads`` are the positions of the parameters (and buffers) among its arguments; ``number`` grows with every graph.
    """

    recipe: Recipe
    sites: tuple[GraphSite, ...]
    transforms: tuple[Note, ...]
    reads: Sequence[int]
    plan: Plan | None = None
    written: Sequence[Written] = ()
    met: dict[tuple[int, ...], dict[int, "weakref.ref[Tensor]"]] = field(default_factory=dict)
    number: int = field(default_factory=itertools.count().__next__)

    def meet(self, args: Sequence[Any]) -> None:
        """Remember, weakly, the parameters of this call."""
        key = tuple(id(args[i]) for i in self.reads)
        self.met[key] = {i: weakref.ref(args[i], lambda _: self.met.pop(key, None)) for i in self.reads}

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


def report_on(model: nn.Module) -> Report:
    """What the compiled graphs do to ``model``: ``fxquant.explain`` without data."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain() was given a {type(model).__name__}; the model that was compiled is needed")
    tensors = _named_tensors(model)
    names = {id(p): name for name, p in tensors}
    with _lock:
        artifacts = sorted(_artifacts, key=lambda artifact: artifact.number)
    sites: dict[tuple[str, str], tuple[Artifact, SiteReport]] = {}
    for artifact in artifacts:  # a later compilation replaces an earlier one, site by site
        for args in artifact.parameters():
            known = {names.get(id(t)) for t in args.values()}
            sites = {key: found for key, found in sites.items() if found[1].elements or key[0] not in known}
            for site in artifact.sites:
                if (name := names.get(id(args[site.argument]))) is not None:
                    sites[name, site.op] = artifact, _site_report(site, name, args)
    if not sites:
        bare = type(model).__module__.startswith("torch.nn")
        return Report("none", 0, (), (), _NOTHING + (_BARE.format(type(model).__name__) if bare else ""))
    order = {name: i for i, (name, _) in enumerate(tensors)}
    found = sorted((site for _, site in sites.values()), key=lambda s: order.get(s.name, len(order)))
    alive = sorted({artifact for artifact, _ in sites.values()}, key=lambda artifact: artifact.number)
    rules = {rule for artifact in alive for rule in rules_of(artifact.recipe)}
    used = {rule for artifact in alive for site in artifact.sites for rule in site.named_by}
    met = {id(t) for artifact in alive for args in artifact.parameters() for t in args.values()}
    kernels = tuple(_kernels(sites, names))
    unmet = tuple(name for name, t in tensors if isinstance(t, nn.Parameter) and t.ndim > 1 and id(t) not in met)
    return Report(
        recipe=" and ".join(dict.fromkeys(artifact.recipe.name for artifact in alive)),
        graphs=len(alive),
        sites=tuple(found),
        transforms=tuple(dict.fromkeys(note for artifact in alive for note in artifact.transforms)),
        unmet=unmet,
        unused=tuple(sorted(rules - used)),
        kernels=Kernels(kernels),
    )


def _kernels(
    sites: Mapping[tuple[str, str], tuple[Artifact, SiteReport]], names: Mapping[int, str]
) -> Iterator[tuple[tuple[str, ...], Written]]:
    """Each generated call of the artifacts that ``sites`` come from, with the names of those sites that it is for."""
    for artifact in sorted({artifact for artifact, _ in sites.values()}, key=lambda artifact: artifact.number):
        mine = {name for (name, _), (other, _) in sites.items() if other is artifact}
        for args in artifact.parameters():
            named = {site.path: names.get(id(args[site.argument]), "") for site in artifact.sites}
            for call in artifact.written:
                read = tuple(named[path] for path in call.sites if named.get(path) in mine)
                if read:
                    yield read, call


def artifacts_of(model: nn.Module) -> list[Artifact]:
    """The graphs that have run with parameters of ``model``, in the order of their compilation."""
    mine = {id(t) for _, t in _named_tensors(model)}
    with _lock:
        artifacts = sorted(_artifacts, key=lambda artifact: artifact.number)
    return [a for a in artifacts if any(id(t) in mine for args in a.parameters() for t in args.values())]


_NOTHING = (
    "outlierq: nothing of this model has run compiled. Call model.compile(backend='outlierq') and then the model; "
    "note that torch.compile(model).generate runs the uncompiled model."
)
_BARE = " A bare {} is never captured by model.compile(), whatever the backend: put it in a module of your own."


def rules_of(recipe: Recipe) -> tuple[str, ...]:
    """What a recipe says of sites by name: rules, and the sites whose ranges it lists."""
    return (*recipe.ignore, *(override.rule for override in recipe.overrides), *(site for site, _, _ in recipe.ranges))


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
