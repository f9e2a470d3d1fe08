"""``fxquant.warmup``: everything that takes long on a first call, done before it."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .calibrate import bar
from .errors import WarmupError
from .report import Report, artifacts_of, report_on

Batch = Mapping[str, Any] | tuple[Any, ...]


@dataclass(frozen=True)
class WarmCall:
    """One batch of a warm-up: what it was, graphs compiled for it, seconds of its first call and of one after it."""

    inputs: str
    graphs: int
    first: float
    then: float


@dataclass(frozen=True)
class Warmup:
    """What ``warmup`` did: its calls, the products whose tiles were timed, and the report on the model that is now warm."""

    calls: tuple[WarmCall, ...]
    report: Report
    tuned: tuple[str, ...] = ()

    @property
    def graphs(self) -> int:
        """How many graphs were compiled."""
        return sum(call.graphs for call in self.calls)

    def __str__(self) -> str:
        total, count = sum(call.first for call in self.calls), len(self.calls)
        out = [
            f"outlierq: {self.graphs} graph{'s' * (self.graphs != 1)} compiled "
            f"for {count} batch{'es' * (count != 1)} in {total:.1f} s"
        ]
        width = max((len(call.inputs) for call in self.calls), default=0)
        for call in self.calls:
            out.append(f"  {call.inputs:{width}}  {call.graphs} compiled, {call.first:.2f} s, then {1e3 * call.then:.2f} ms")
        if self.tuned:
            out += [f"tiles timed for {len(self.tuned)} products", *(f"  {line}" for line in self.tuned)]
        return "\n".join(out)


def warmup(
    model: nn.Module,
    data: Any,
    *,
    shapes: Iterable[tuple[int, int]] = (),
    tune: bool = False,
    progress: bool = True,
) -> Warmup:
    """Compile all that the compiled ``model`` needs for ``data`` and fold its weights: no later call of these sizes waits.

    ``data``: one batch (a dict of keyword arguments, a tuple of arguments or a tensor), an iterable of batches, or a callable
    that is given the model and runs it. ``shapes``: (batch, tokens) pairs; each batch is then run in each of these sizes, its
    tensors cut or repeated along their first two axes, which must be batch and tokens. Graphs are compiled for how many tokens
    there are, so name every size that will be asked for: those of a prompt, and one token for each step of a decoder.

    The calls are made in the caller's grad mode and autocast, because graphs are compiled for these too: warm up under
    ``torch.no_grad()`` what will run under it. With ``calibration_steps`` they count as the first calls, which calibrate.

    ``tune``: on an NVIDIA GPU, time the tiles that the model of the cost ranks first for every product, instead of taking the
    first; what is fastest is kept in the user's cache folder (``FXQUANT_CACHE``) for this and all later processes. That takes
    minutes, and compiles what this process had compiled once more. ``progress``: a bar in the terminal.

    >>> with torch.no_grad():                                                                   # doctest: +SKIP
    ...     print(fxquant.warmup(model, batch, shapes=[(1, 1), (1, 128), (8, 128)]))

    Raises WarmupError for a model that is not compiled with ``backend="outlierq"`` or is in training mode, for sizes that do
    not fit the data, and for ``tune`` without a GPU.
    """
    _check(model, tune)
    batches = data if callable(data) else _batches(data)
    sizes = [_size(shape) for shape in shapes]
    if sizes:
        if callable(batches):
            raise WarmupError("shapes are for batches, and data is a callable; let it run the model in each size")
        batches = [_in_shape(batch, *size) for size in sizes for batch in batches]

    calls, tuned = _run(model, batches, progress), list[str]()
    if not artifacts_of(model):
        raise WarmupError(
            "no graph of this model was compiled with backend='outlierq' while it ran; "
            "call model.compile(backend='outlierq') first, and see torch._dynamo's logs if that was done"
        )
    if tune:
        from .backend.tuning import tune_model  # here, as in calibrate()

        tuned, better = tune_model(model, bar(progress))
        if better:
            torch.compiler.reset()  # the tiles are in the compiled code
            calls = _run(model, batches, progress)
    return Warmup(tuple(calls), report_on(model), tuple(tuned))


def _check(model: Any, tune: bool) -> None:
    if not isinstance(model, nn.Module):
        raise WarmupError(f"warmup() was given a {type(model).__name__}; the compiled model is needed")
    if not any(m._compiled_call_impl is not None or isinstance(m, torch._dynamo.OptimizedModule) for m in model.modules()):
        raise WarmupError(
            "the model is not compiled: call model.compile(backend='outlierq') first; "
            "torch.compile(model, ...) leaves model as it is and returns another, which is then the one to warm up"
        )
    if model.training:
        raise WarmupError("the model is in training mode, where nothing is quantized; call model.eval() first")
    if tune:
        where = {p.device.type for p in model.parameters()}
        if not torch.cuda.is_available():
            raise WarmupError(
                "tune=True times kernels on an NVIDIA GPU, and there is none here; without it the tiles are those that the "
                "model of their cost ranks first, or that were timed before"
            )
        if where != {"cuda"}:
            raise WarmupError(
                f"tune=True times kernels on an NVIDIA GPU, and the model is on {', '.join(sorted(where)) or 'none'}"
            )


def _batches(data: Any) -> list[Batch]:
    """One batch or many, each as keyword arguments or as a tuple of arguments."""
    if isinstance(data, Mapping | Tensor) or (isinstance(data, tuple) and data and isinstance(data[0], Tensor)):
        data = [data]
    if not isinstance(data, Iterable):
        raise WarmupError(f"data is a {type(data).__name__}; a batch, an iterable of batches or a callable is needed")
    found: list[Batch] = []
    for batch in data:
        if not isinstance(batch, Mapping | Tensor | tuple | list):
            raise WarmupError(f"a batch is a {type(batch).__name__}; a dict, a tuple of arguments or a tensor is needed")
        found.append(batch if isinstance(batch, Mapping) else (batch,) if isinstance(batch, Tensor) else tuple(batch))
    if not found:
        raise WarmupError("data is empty; at least one batch is needed")
    return found


def _size(shape: Any) -> tuple[int, int]:
    pair = isinstance(shape, Sequence) and len(shape) == 2 and all(isinstance(n, int) and n > 0 for n in shape)
    if not pair:
        raise WarmupError(f"a shape is {shape!r}; a pair (batch, tokens) of positive numbers is needed")
    return shape[0], shape[1]


def _in_shape(batch: Batch, rows: int, tokens: int) -> Batch:
    """``batch`` with tensors [B, T, ...] cut or repeated to [rows, tokens, ...]; those [B, ...] along their first axis."""
    values = list(batch.values() if isinstance(batch, Mapping) else batch)
    whole = next((v for v in values if isinstance(v, Tensor) and v.dim() >= 2), None)
    if whole is None or not whole.shape[0] or not whole.shape[1]:
        raise WarmupError(f"shapes are for batches that hold a tensor [batch, tokens, ...], and this one is {_shown(batch)}")
    B, T = whole.shape[:2]

    def fitted(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.dim() or x.shape[0] != B:
            return x
        x = _along(x, 0, rows)
        return _along(x, 1, tokens) if x.dim() >= 2 and x.shape[1] == T else x

    return {k: fitted(v) for k, v in batch.items()} if isinstance(batch, Mapping) else tuple(map(fitted, batch))


def _along(x: Tensor, dim: int, size: int) -> Tensor:
    times = [1] * x.dim()
    times[dim] = -(-size // x.shape[dim])
    part = x.repeat(times).narrow(dim, 0, size)
    # contiguous() would leave the strides of axes of one as they are, and graphs are guarded on them.
    return part.clone(memory_format=torch.contiguous_format)


def _shown(batch: Any) -> str:
    """``input_ids [8, 128], attention_mask [8, 128]``."""
    named = batch.items() if isinstance(batch, Mapping) else ((f"argument {i}", x) for i, x in enumerate(batch))
    return ", ".join(f"{name} {list(x.shape)}" for name, x in named if isinstance(x, Tensor)) or "no tensor"


def _run(model: nn.Module, batches: list[Batch] | Callable[[nn.Module], Any], progress: bool) -> list[WarmCall]:
    if callable(batches):
        return [_timed(model, "the given callable", lambda: batches(model))]
    calls = []
    for batch in bar(progress)(batches, "warming up"):

        def call(batch: Batch = batch) -> Any:
            return model(**batch) if isinstance(batch, Mapping) else model(*batch)

        calls.append(_timed(model, _shown(batch), call))
    return calls


def _timed(model: nn.Module, inputs: str, call: Callable[[], Any]) -> WarmCall:
    before = {artifact.number for artifact in artifacts_of(model)}
    seconds = [_seconds(call)]
    # CUDA graphs are recorded at the second call, and replayed from the third on.
    repeats = 3 if torch.cuda.is_available() and any(p.is_cuda for p in model.parameters()) else 1
    seconds += [_seconds(call) for _ in range(repeats)]
    graphs = {artifact.number for artifact in artifacts_of(model)} - before
    return WarmCall(inputs, len(graphs), seconds[0], seconds[-1])


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
