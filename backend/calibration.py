"""Calibration in one page: capture once, then run the data through one stage of the graphs after another.

    measured    once per transform that needs data: what the inputs of linears look like, from which it chooses its map
                and once more, after all transforms, where the range of a weight is that of least error of its product
    observed    the transforms written, an observer on every static edge; its outputs are those to stay close to
    simulated   everything rounded, the ranges adjustable: the search for one token ratio, then learning (searching.py)
    sensed      in floating point and back: what the output makes of every value, for a range of each site's own (sensing.py)

Weights are folded in every stage, so that a pass costs what the float model costs and a little more.
"""

import ctypes
import inspect
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from fxquant.errors import CalibrationError
from fxquant.graph.capture import Parameter, capture, has_tensors
from fxquant.graph.equivalence import site_name
from fxquant.graph.fold import fold, unit_of
from fxquant.graph.fuel import Fuel
from fxquant.graph.observe import mask_for, observe, tokens, watching
from fxquant.graph.rewrite import copy_of
from fxquant.graph.tidy import tidy, value
from fxquant.graph.weights import cone_of
from fxquant.numerics.affine import IntAffine, check_finite
from fxquant.numerics.granularity import PerTensor
from fxquant.numerics.of_outputs import clips_of
from fxquant.patterns.annotate import CLIP, SITE, Clips, Site, annotate, quantize_weights, settled
from fxquant.patterns.canonical import canonicalize
from fxquant.patterns.edges import Edge, insert, rounded
from fxquant.patterns.inputs import absorbs, linear_inputs
from fxquant.patterns.measured import Measured, standing_for_all
from fxquant.patterns.transforms import Transform, equalize, read
from fxquant.plan import Plan
from fxquant.recipe import Recipe

from .simulate import Quantizer

ROWS = 512  # tokens that are kept of a linear's input, by chance
FAR = 32  # and those that reach farthest
COMPARED = 1 << 22  # numbers of an output that are compared
APART = 1e-3  # how far outputs of samples run apart may be from those of the batch, relative: sums in another order
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
MASKS = ("attention_mask", "decoder_attention_mask")

Maps = dict[str, dict[str, dict[str, Tensor]]]
"""transform -> need -> site -> what it writes."""
Ranges = dict[str, tuple[Tensor, Tensor]]
"""key of an edge -> its low and high end."""


class Stage:
    """What is run in place of each captured graph; ``build`` is called once per graph, with a copy of its own."""

    def build(self, gm: fx.GraphModule, args: Sequence[Any]) -> Callable[..., Any]:
        """The function of the graph's arguments that stands for ``gm`` in this stage."""
        return gm


class Graph:
    """One captured graph: runs whatever the active session's stage makes of it, itself if there is none."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.parameters = [i for i, n in enumerate(gm.graph.find_nodes(op="placeholder")) if Parameter.of(n) is not None]

    def __call__(self, *args: Any) -> Any:
        session: Session | None = getattr(_active, "session", None)
        return self.gm(*args) if session is None else session.run(self, args)


_active = threading.local()


def _capturing(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """A backend that only captures; one function for all sessions, so that Dynamo keeps what it has captured already."""
    return Graph(canonicalize(tidy(capture(gm)), Fuel())) if has_tensors(gm) else gm.forward


@dataclass(eq=False)
class Session:
    """The graphs that have run so far, the stage they are in, and the padding masks of the call at hand."""

    recipe: Recipe
    stage: Stage = field(default_factory=Stage)
    masks: dict[str, Tensor] = field(default_factory=dict)
    _met: dict[Graph, tuple[int, ...]] = field(default_factory=dict)
    _built: dict[Graph, Callable[..., Any]] = field(default_factory=dict)
    _folded: dict[tuple[Any, ...], tuple[Tensor, ...]] = field(default_factory=dict)

    @property
    def graphs(self) -> list[Graph]:
        """Every graph that has run, in the order of their first calls."""
        return list(self._met)

    def enter(self, stage: Stage) -> None:
        """Go on to ``stage``; what was built for the one before is freed."""
        self._built.clear()
        self._folded.clear()
        if (trim := getattr(_library(), "malloc_trim", None)) is not None:
            trim(0)
        self.stage = stage

    def run(self, graph: Graph, args: Sequence[Any]) -> Any:
        """``graph`` as the stage has it. Raises CalibrationError where one graph serves several layers."""
        met = tuple(id(args[i]) for i in graph.parameters)
        if self._met.setdefault(graph, met) != met:
            raise CalibrationError(
                "one captured graph serves several layers, so its sites cannot be told apart; compile the model as a whole, "
                "without graph breaks inside its layers (fullgraph=True shows where they are)"
            )
        if graph not in self._built:
            self._built[graph] = self.stage.build(copy_of(graph.gm), args)
        return self._built[graph](*args)

    def runnable(self, gm: fx.GraphModule, args: Sequence[Any]) -> Callable[..., Any]:
        """``gm`` as a function of its arguments whose weight algebra is done once, for the parameters in ``args``.

        What graphs of one stage have in common, such as those of two lengths, is kept once.
        """
        folded, weights = fold(tidy(gm)), list[Tensor]()
        for unit in folded.units:
            parameters = [args[i] for i in unit.inputs]
            key = unit.key, *map(id, parameters)
            if key not in self._folded:
                with torch.no_grad():
                    self._folded[key] = unit.fold(parameters)
            weights += self._folded[key]
        return lambda *args: folded.runtime(*(args[i] for i in folded.kept), *weights)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Graphs called by this thread run in this session."""
        before = getattr(_active, "session", None)
        _active.session = self
        try:
            yield
        finally:
            _active.session = before


@contextmanager
def returning_memory() -> Iterator[None]:
    """The memory of a large tensor goes back to the system with the tensor.

    glibc keeps it else, from the second tensor of a size on, and before 2.38 aligned memory does not fit the hole that its like
    has left: with layers of one shape the process grows to twice what is alive. Nothing happens where the library is another.
    """
    adjust = getattr(_library(), "mallopt", None)
    if adjust is None:
        yield
        return
    adjust(M_MMAP_THRESHOLD, 2 << 20)
    try:
        yield
    finally:
        adjust(M_MMAP_THRESHOLD, 32 << 20)  # where glibc's own adjustment, which is off by now, ends up, and twice that
        adjust(M_TRIM_THRESHOLD, 64 << 20)


def _library() -> Any:
    """The C library of this process, None where it cannot be had."""
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):
        return None


# ---- measured -----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Seen:
    """Statistics of one linear's input; ``rows`` is a sample in which every token is as likely as any other."""

    low: Tensor | None = None
    high: Tensor | None = None
    total: Tensor | None = None
    count: int = 0
    rows: Tensor | None = None
    lots: Tensor | None = None  # a random number per row kept: the rows with the smallest ones stay
    far: Tensor | None = None  # the rows of the largest magnitudes

    def add(self, x: Tensor, generator: torch.Generator) -> None:
        if not x.numel():
            return
        x = x.float()
        low, high, total = x.amin(0), x.amax(0), x.abs().sum(0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        self.total = total if self.total is None else self.total + total
        self.count += len(x)
        far = x if self.far is None else torch.cat([self.far, x])
        self.far = far[far.abs().amax(1).topk(min(FAR, len(far))).indices]
        lots = torch.rand(len(x), generator=generator)
        kept = lots.topk(min(ROWS, len(x)), largest=False).indices
        rows, lots = x[kept.to(x.device)], lots[kept]
        if self.rows is not None and self.lots is not None:
            rows, lots = torch.cat([self.rows, rows]), torch.cat([self.lots, lots])
        kept = lots.topk(min(ROWS, len(lots)), largest=False).indices
        self.rows, self.lots = rows[kept.to(rows.device)], lots[kept]


class MeasuringStage(Stage):
    """The graphs after some transforms, every linear's input watched: ``choices`` then asks the next transform for its maps."""

    def __init__(self, session: Session, done: Sequence[str], maps: Maps, seed: int) -> None:
        self._session, self._done, self._maps = session, tuple(done), maps
        self._generator = torch.Generator().manual_seed(seed)
        self.seen: dict[str, _Seen] = {}
        self._decoder: dict[str, bool] = {}
        self._linears: dict[str, Callable[[_Seen], Measured]] = {}
        self._clipped: dict[str, _Clipped] = {}

    def build(self, gm: fx.GraphModule, args: Sequence[Any]) -> Callable[..., Any]:
        equalize(gm, self._done, Fuel(), **self._maps)
        annotation = annotate(gm, self._session.recipe, Fuel())
        site_of = {site.key: site for site in annotation.sites if not site.reason}
        observers: dict[fx.Node, str] = {}
        watched: set[str] = set()  # in this graph, where a layer may run twice; one for other lengths has the same sites
        for x, linears in linear_inputs(gm).items():
            where = site_name(linears[0])
            quantized = [site_of[key] for n in linears if (key := n.meta.get(SITE)) in site_of]
            if not quantized or where in watched:
                continue
            watched.add(where)
            if where not in self._linears:
                specs = quantized[0].activation, quantized[0].weight
                operands = [(_evaluated(gm, n.args[1], args), _evaluated(gm, _bias(n), args)) for n in linears]
                self._linears[where] = _measured(where, operands, *specs, absorbs(gm, linears[0]))
                self._decoder[where] = reads_decoder(x)
            with gm.graph.inserting_before(min(linears)):
                observed = gm.graph.call_function(observe, (x, where))
            observed.meta["val"] = value(x)
            for linear in linears:
                linear.replace_input_with(x, observed)
                observers[linear] = where
        for node in gm.graph.nodes:
            site = site_of.get(node.meta.get(SITE))
            if site is not None and site.weight is not None and site.weight.is_of_outputs and site.path not in self._clipped:
                self._clipped[site.path] = _Clipped(site, observers.get(node, ""), _evaluated(gm, node.args[1], args))
        gm.recompile()
        return self._session.runnable(gm, args)

    def see(self, key: str, x: Tensor) -> None:
        rows = tokens(x, mask_for(self._session.masks, self._decoder[key]), merge_heads=False)
        self.seen.setdefault(key, _Seen()).add(rows, self._generator)

    def choices(self, transform: Transform, notes: dict[str, str], progress: "Progress") -> dict[str, dict[str, Tensor]]:
        """need -> site -> tensor, as the transform chooses for each site; ``notes`` gets the reasons of those left alone."""
        chosen: dict[str, dict[str, Tensor]] = {}
        choose = transform.choose
        assert choose is not None
        for where in progress(list(self._linears), f"choosing: {transform.name}"):
            seen = self.seen.get(where)
            answer = choose(self._linears[where](seen)) if seen and seen.count else "no token came by in the calibration data"
            if isinstance(answer, str):
                notes[f"{transform.name}: {where}"] = answer
                continue
            for need, tensor in answer.items():
                chosen.setdefault(need, {})[where] = tensor
        return chosen

    def clips(self, notes: dict[str, str], progress: "Progress") -> Clips:
        """Of every weight that is to have the range of least error of its product, by path; ``notes``: those without data.

        Of a layer that runs several times, the first run counts. Raises FxquantError for a weight, and CalibrationError for an
        input, that holds NaN or infinity.
        """
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for path in progress(list(self._clipped), "ranges of weights"):
            site, where, evaluated = self._clipped[path]
            weight = evaluated().transpose(-2, -1) if site.is_stack else evaluated()
            check_finite(path, weight)
            seen = self.seen.get(where)
            if seen is None or seen.rows is None or seen.far is None:
                notes[f"clip: {path}"] = "no input of it was seen; all of its channels count alike"
                inputs = torch.eye(weight.shape[-1], device=weight.device)
            else:
                inputs = standing_for_all(seen.rows, seen.far, seen.count)
            if not bool(inputs.isfinite().all()):
                raise CalibrationError(f"'{path}': its input holds NaN or infinity; repair the model or the data, or ignore it")
            assert site.weight is not None
            form = site.weight.format
            assert isinstance(form, IntAffine)
            low, high = clips_of(weight, inputs, form, site.weight.granularity)
            found[path] = low.cpu(), high.cpu()
        return found


class _Clipped(NamedTuple):
    """A weight whose range is looked for: its site, the key of what its input shows (none: nothing is watched), itself."""

    site: Site
    where: str
    weight: Callable[[], Any]


def _evaluated(gm: fx.GraphModule, node: Any, args: Sequence[Any]) -> Callable[[], Any]:
    """What a weight or a bias is after the transforms so far, for the parameters in ``args``; computed when it is asked for."""
    if not isinstance(node, fx.Node):
        return lambda: None
    unit = unit_of(gm, node)()
    parameters = [args[i] for i in unit.inputs]
    return lambda: unit.fold(parameters)[0].detach()


def _bias(linear: fx.Node) -> Any:
    return linear.args[2] if len(linear.args) > 2 else None


def _measured(where: str, operands: Any, activation: Any, weight: Any, absorbed: bool) -> Callable[[_Seen], Measured]:
    def measured(seen: _Seen) -> Measured:
        assert seen.low is not None and seen.high is not None and seen.total is not None and seen.rows is not None
        weights, biases = tuple(w() for w, _ in operands), tuple(b() for _, b in operands)
        low, high, mean, far = seen.low, seen.high, seen.total / seen.count, seen.far
        sides = {"activation": activation, "weight": weight}
        return Measured(
            where, low, high, mean, seen.rows, weights, biases, absorbed=absorbed, far=far, tokens=seen.count, **sides
        )

    return measured


def reads_decoder(node: fx.Node) -> bool:
    """The value has the decoder's tokens: it comes from an input of the decoder."""
    inputs = (n for n in cone_of(node) if n.op == "placeholder" and Parameter.of(n) is None)
    return any("decoder" in str(n.meta.get("dynamo_name", "")) for n in inputs)


# ---- observed -----------------------------------------------------------------------------------------------------------


class ObservingStage(Stage):
    """The transformed graphs with an observer on every static edge; ``states`` is what they have seen, by the edge's key."""

    def __init__(self, session: Session, maps: Maps) -> None:
        self._session, self._maps = session, maps
        self.edges: dict[str, Edge] = {}
        self.states: dict[str, Any] = {}
        self._decoder: dict[str, bool] = {}

    def build(self, gm: fx.GraphModule, args: Sequence[Any]) -> Callable[..., Any]:
        recipe = self._session.recipe
        equalize(gm, recipe.transforms, Fuel(), **self._maps)
        edges = [edge for edge in annotate(gm, recipe, Fuel()).edges if edge.spec.observer is not None]
        for edge in edges:
            self.edges.setdefault(edge.key, edge)
            self._decoder.setdefault(edge.key, reads_decoder(edge.value))
        insert(gm, edges, lambda x, edge: gm.graph.call_function(observe, (x, edge.key)))
        return self._session.runnable(gm, args)

    def see(self, key: str, x: Tensor) -> None:
        spec = self.edges[key].spec
        whole = isinstance(spec.granularity, PerTensor)
        rows = tokens(x, mask_for(self._session.masks, self._decoder[key]), merge_heads=whole)
        assert spec.observer is not None  # as for every edge that was kept
        state = self.states[key] if key in self.states else spec.observer.start()
        self.states[key] = spec.observer.update(state, rows, spec.granularity)


# ---- simulated ----------------------------------------------------------------------------------------------------------


class SimulatingStage(Stage):
    """The transformed graphs with everything rounded; each static edge by a Quantizer whose range can be set and learned."""

    def __init__(self, session: Session, maps: Maps, quantizers: Mapping[str, Quantizer], clips: Clips) -> None:
        self._session, self._maps, self.quantizers, self._clips = session, maps, quantizers, clips

    def build(self, gm: fx.GraphModule, args: Sequence[Any]) -> Callable[..., Any]:
        recipe = self._session.recipe
        equalize(gm, recipe.transforms, Fuel(), **self._maps)
        annotation = annotate(gm, recipe, Fuel())
        round_now = rounded(gm)

        def write(x: fx.Node, edge: Edge) -> fx.Node:
            if edge.key not in self.quantizers:
                return round_now(x, edge)
            name = "quantizer_" + "".join(c if c.isalnum() else "_" for c in edge.key)
            if not hasattr(gm, name):
                gm.add_module(name, self.quantizers[edge.key])
            return gm.graph.call_module(name, (x,))

        known = [edge for edge in annotation.edges if not edge.spec.is_observed or edge.key in self.quantizers]
        insert(gm, known, write)
        quantize_weights(gm, replace(annotation, sites=tuple(settled(s, self._clips) for s in annotation.sites)))
        return self._session.runnable(gm, args)


# ---- running the data ---------------------------------------------------------------------------------------------------

Progress = Callable[[Sequence[Any], str], Iterable[Any]]
Output = tuple[Any, dict[str, Tensor]]
"""What the model returned, and the padding masks of the call."""


class Runner:
    """Runs the user's batches through his model in any stage, and hands over what comes out."""

    def __init__(self, model: nn.Module, data: Any, session: Session, progress: Progress) -> None:
        self.session, self._model, self._progress = session, model, progress
        self._data = data if callable(data) else _batches(data)
        self._compiled = torch.compile(model._call_impl, backend=_capturing)
        self._names = _parameter_names(model)

    @property
    def parts(self) -> int:
        """Into how many parts the data can be cut: the number of batches, 1 for a callable."""
        return 1 if callable(self._data) else len(self._data)

    def divisible(self, most: int) -> int:
        """Into how many pieces, at most ``most``, a batch may be cut: in which the first one answers what it answers whole.

        That is tried in floating point, on some of the outputs; 1 if it does not, or cannot be cut.
        """
        pieces = 1 if callable(self._data) else len(_cut(self._data[0], most))
        if pieces == 1:
            return 1
        self.session.enter(Stage())
        whole, apart = self._sampled(1), self._sampled(most)
        same = whole.shape == apart.shape and float((whole - apart).norm()) <= APART * float(whole.norm())
        return pieces if same else 1

    def _sampled(self, pieces: int, step: int = 7) -> Tensor:
        """Every seventh row of what is compared of the first batch, for the logits of a vocabulary are large."""
        rows, seen = [], 0
        for output in self.run("", 1, pieces=pieces):
            of_piece = compared(*output, most=0)
            rows.append(of_piece[-seen % step :: step].clone())
            seen += len(of_piece)
        return torch.cat(rows)

    def run(
        self, title: str, parts: int | None = None, gradients: bool = False, pieces: int = 1
    ) -> Generator[Output, None, None]:
        """Yields every output of the model with the padding masks of its call; the first ``parts`` batches alone if given.

        Each batch is run in up to ``pieces`` pieces, whose outputs come one by one.
        """
        seen: list[tuple[Any, dict[str, Tensor]]] = []

        def call(*args: Any, **kwargs: Any) -> Any:
            self.session.masks = self._masks(args, kwargs)
            output = self._compiled(*args, **kwargs)
            seen.append((output, self.session.masks))
            return output

        before = self._model._compiled_call_impl
        # All models that share code (those of one library, perhaps) count against one limit, beyond which nothing is captured.
        limits = torch._dynamo.config.patch(recompile_limit=1 << 16, accumulated_recompile_limit=1 << 16)
        with torch.set_grad_enabled(gradients), self.session.active(), limits:
            try:
                self._model._compiled_call_impl = call  # what Module.__call__ runs, as Module.compile() sets it
                if callable(self._data):
                    self._data(self._model)
                    yield from seen
                    return
                for batch in self._progress(self._data[:parts], title):
                    for piece in _cut(batch, pieces):
                        self._call(piece)
                        while seen:
                            yield seen.pop(0)
            finally:
                self._model._compiled_call_impl = before

    def _call(self, batch: Any) -> None:
        if isinstance(batch, Mapping):
            self._model(**batch)
        elif isinstance(batch, list | tuple):
            self._model(*batch)
        else:
            self._model(batch)

    def _masks(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        return {name: m for name in MASKS if isinstance(m := given.get(name), Tensor) and m.ndim == 2}


def _batches(data: Any) -> list[Any]:
    """The batches as a list, for they are gone through more than once; raises CalibrationError for what is none."""
    if isinstance(data, Tensor | Mapping | str) or not isinstance(data, Iterable):
        raise CalibrationError(
            f"calibration data is a {type(data).__name__}; an iterable of batches is needed (dicts, tuples or tensors), or a "
            "callable that runs the model: [batch] if it is one batch"
        )
    batches = list(data)
    if not batches:
        raise CalibrationError("the calibration data holds no batch; an iterator that was used up before gives none")
    for number, batch in enumerate(batches):
        if not isinstance(batch, Tensor | Mapping | list | tuple):
            kind = type(batch).__name__
            raise CalibrationError(f"batch {number} of the calibration data is a {kind}; a dict, a tuple or a tensor is needed")
    return batches


def _cut(batch: Any, pieces: int) -> list[Any]:
    """``batch`` along the first axis of its tensors in up to ``pieces`` pieces; whole if they differ there, or hold lists.

    >>> [x.shape for x in _cut(torch.ones(32, 128), 16)][:2]   # doctest: +SKIP
    [torch.Size([2, 128]), torch.Size([2, 128])]
    """
    listed = batch if isinstance(batch, list | tuple) else [batch]
    named = dict(batch) if isinstance(batch, Mapping) else dict(enumerate(listed))
    lengths = {len(v) if v.ndim else None for v in named.values() if isinstance(v, Tensor)}
    length = lengths.pop() if len(lengths) == 1 else None
    if pieces == 1 or not length or not all(isinstance(v, Tensor | bool | int | float | str | None) for v in named.values()):
        return [batch]

    def piece(start: int, size: int) -> Any:
        some = {name: v[start : start + size] if isinstance(v, Tensor) else v for name, v in named.items()}
        return some if isinstance(batch, Mapping) else tuple(some.values())

    size = -(-length // pieces)
    return [piece(start, size) for start in range(0, length, size)]


def _parameter_names(model: nn.Module) -> list[str]:
    try:
        return [name for name in inspect.signature(model.forward).parameters if name != "self"]
    except (TypeError, ValueError):
        return []


def compared(output: Any, masks: Mapping[str, Tensor], most: int = COMPARED) -> Tensor:
    """What of a model's output is compared with the float model's: [rows, features], float32, padding left out.

    The logits if there are such, else the last hidden state, else the first tensor of floats. Of very wide outputs (the logits
    of a vocabulary) evenly spaced rows, so that no more than ``most`` numbers are kept.
    """
    chosen = next((t for name in ("logits", "last_hidden_state") if isinstance(t := _field(output, name), Tensor)), None)
    if chosen is None:
        floats = (t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point())
        chosen = next(floats, None)
    if chosen is None:
        kind = type(output).__name__
        raise CalibrationError(f"the model returned {kind} without a tensor of floats, so nothing can be compared; return one")
    mask = next((m for m in reversed(list(masks.values())) if m.shape == chosen.shape[:2] and chosen.ndim > 2), None)
    rows = tokens(chosen, mask, merge_heads=True)
    step = -(-rows.numel() // most) if most else 1
    return rows[::step].float()


def _field(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


# ---- the whole ----------------------------------------------------------------------------------------------------------


def measure(runner: Runner, done: Sequence[str], maps: Maps, seed: int, title: str) -> MeasuringStage:
    """What all data shows at the inputs of linears, the transforms ``done`` written."""
    stage = MeasuringStage(runner.session, done, maps, seed)
    runner.session.enter(stage)
    with watching(stage):
        for _ in runner.run(title):
            pass
    return stage


@returning_memory()
def find_plan(runner: Runner, recipe: Recipe, progress: Progress, seed: int) -> Plan:
    """Run all stages and put together what they found."""
    from .searching import search, searches  # they need the stages above

    session = runner.session
    notes: dict[str, str] = {}
    transforms = read(recipe.transforms)
    maps: Maps = {t.name: {need: {} for need in t.needs} for t in transforms if t.needs}
    for position, transform in enumerate(transforms):
        if transform.choose is None:
            continue
        stage = measure(runner, recipe.transforms[:position], maps, seed, f"measuring for {transform.name}")
        maps[transform.name] |= stage.choices(transform, notes, progress)

    clips: Clips = {}
    if any(spec.is_of_outputs for _, spec in recipe.specs()):
        stage = measure(runner, recipe.transforms, maps, seed, "measuring for the ranges of weights")
        clips = stage.clips(notes, progress)

    observing = ObservingStage(session, maps)
    session.enter(observing)
    wanted, keep = [], searches(recipe)
    with watching(observing):
        # Where nothing is static, the data has shown all that it has to show to the transforms.
        for output in runner.run("observing") if observes(recipe) or not session.graphs else ():
            if keep:  # the transforms are exact, so these are the outputs of the model as it was
                wanted.append(compared(*output))
    if not session.graphs:
        raise CalibrationError(
            "the model ran and no graph of it was captured; is it inside torch.compiler.disable()? A bare Sequential is never "
            "captured: put it in a module of your own"
        )
    ranges, found = search(runner, observing, maps, clips, wanted, progress, seed)
    tensors = {f"{need}/{name}/{site}": t for name, m in maps.items() for need, sites in m.items() for site, t in sites.items()}
    for key, (low, high) in ranges.items():
        tensors |= {f"low/{key}": low, f"high/{key}": high}
    for path, (low, high) in clips.items():
        tensors |= {f"low/{CLIP}/{path}": low, f"high/{CLIP}/{path}": high}
    return Plan(recipe, tensors, _sites(session), {**found, "left alone": notes} if notes else found)


def observes(recipe: Recipe) -> bool:
    """Whether a range of ``recipe`` may be one that data is watched for."""
    return any(spec.observer is not None for _, spec in recipe.specs())


def _sites(session: Session) -> dict[str, tuple[int, ...]]:
    """The parameters that the graphs read, with their shapes."""
    inputs = [node for graph in session.graphs for node in graph.gm.graph.find_nodes(op="placeholder")]
    named = {node: parameter for node in inputs if (parameter := Parameter.of(node)) is not None}
    return {p.path: tuple(value(node).shape) for node, p in named.items() if p.kind == "parameter"}
