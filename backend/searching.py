"""From what the observers saw to ranges: one token ratio for the whole network, then a range of each site's own.

Outlier Suppression (Wei et al., 2022), section 4.2. The coarse stage looks for one ratio in the paper's grid, here from coarse
to fine and on a part of the data first. The fine stage there learns scales, by Adam on the output's error; here each site takes
the range that is best for the output to first order (sensing.py), if all of them are better. LSQ and LSQ+ learn by Adam.
Weights are rounded throughout, as they will be.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from fxquant.numerics.granularity import PerTensor
from fxquant.numerics.observers import TokenWise
from fxquant.patterns.annotate import Clips
from fxquant.recipe import Recipe

from .calibration import COMPARED, Maps, ObservingStage, Progress, Ranges, Runner, SimulatingStage, compared
from .sensing import PIECES, sensed
from .simulate import Quantizer

EPOCHS, RATE = 3, 5e-3
BATCH, LENGTH = 32, 128  # of the grid of the paper's code: ratios in steps of 0.01


def search(
    runner: Runner,
    observed: ObservingStage,
    maps: Maps,
    clips: Clips,
    wanted: list[Tensor],
    progress: Progress,
    seed: int,
) -> tuple[Ranges, dict[str, Any]]:
    """The range of every observed edge, and notes for people: the losses of the search and of learning.

    ``clips``: those of weights that calibration has found. ``wanted`` is what the float model answers to each batch, of
    which nothing is needed where ``searches(recipe)`` is False.
    """
    edges, states = observed.edges, observed.states

    def ranges_at(ratio: float | None) -> Ranges:
        found: Ranges = {}
        for key, state in states.items():
            spec = edges[key].spec
            observer = spec.observer
            assert observer is not None  # the edge was observed
            if isinstance(observer, TokenWise) and observer.ratio is None:
                observer = observer.with_ratio(1.0 if ratio is None else ratio)
            found[key] = observer.range(state, spec.format, spec.granularity)
        return found

    watched = {key: edges[key].spec.observer for key in states}
    searched = [key for key, observer in watched.items() if isinstance(observer, TokenWise) and observer.ratio is None]
    learned = [key for key, observer in watched.items() if observer and observer.learned]
    fine = {key: edges[key] for key in learned if isinstance(watched[key], TokenWise)}
    notes: dict[str, Any] = {}
    ranges, loss = ranges_at(None), None
    if not searched and not learned:
        return ranges, notes

    quantizers = {key: Quantizer(edges[key].spec) for key in states}
    divisible = runner.divisible(PIECES)
    pieces = divisible if _by_sample(runner.session.recipe, wanted) else 1
    simulating = SimulatingStage(runner.session, maps, quantizers, clips)
    runner.session.enter(simulating)
    if searched:
        bits = min(edges[key].spec.format.bits for key in searched)
        candidates = TokenWise.candidates(bits, BATCH, LENGTH)
        ratio, by_ratio = _ratio(runner, quantizers, wanted, ranges_at, candidates, progress, pieces)
        notes |= {"token ratio": ratio, "losses by ratio": {f"{r:.4g}": by_ratio[r] for r in sorted(by_ratio, reverse=True)}}
        ranges, loss = ranges_at(ratio), by_ratio[ratio]
    if learned:
        _set(quantizers, ranges)
        losses = [_loss(runner, wanted, "before learning", pieces=pieces) if loss is None else loss]
        if fine:
            own = sensed(runner, maps, fine, ranges, seed, divisible)
            runner.session.enter(simulating)
            _set(quantizers, ranges | own)
            losses.append(_loss(runner, wanted, "ranges of each site", most=losses[0], pieces=pieces))
            ranges = ranges | own if losses[1] < losses[0] else ranges
        if others := [key for key in learned if key not in fine]:
            _set(quantizers, ranges)
            ranges = _learn(runner, {key: quantizers[key] for key in others}, wanted, ranges, losses)
        notes["losses of learning"] = losses
    return ranges, notes


def searches(recipe: Recipe) -> bool:
    """Whether ``search`` will run the data: something of ``recipe`` is looked for, or learned, by the output."""
    observers = [spec.observer for _, spec in recipe.specs()]
    return any(o is not None and (o.learned or (isinstance(o, TokenWise) and o.ratio is None)) for o in observers)


def _set(quantizers: Mapping[str, Quantizer], ranges: Ranges) -> None:
    for key, quantizer in quantizers.items():
        quantizer.set_range(*ranges[key])


def _by_sample(recipe: Recipe, wanted: Sequence[Tensor]) -> bool:
    """What is rounded of a sample does not depend on the others, and nothing of ``wanted`` was left out for its size."""
    specs = [spec for role, spec in recipe.specs() if role not in ("weights", "embeddings")]
    together = any(isinstance(spec.granularity, PerTensor) and not spec.is_static for spec in specs)
    return not together and all(target.numel() <= COMPARED // 2 for target in wanted)


def _loss(
    runner: Runner,
    wanted: Sequence[Tensor],
    title: str,
    parts: int | None = None,
    most: float = math.inf,
    pieces: int = 1,
) -> float:
    """The mean squared error of the outputs over the first ``parts`` batches (None: all), each run in ``pieces``.

    Once it is certain to be above ``most`` the rest of the batches is left out, and a bound from below is returned.
    """
    error, count = 0.0, sum(target.numel() for target in wanted[:parts])
    targets, target = iter(wanted), torch.empty(0)
    with closing(runner.run(title, parts, pieces=pieces)) as outputs:
        for rows in (compared(*output) for output in outputs):
            if not len(rows):  # all of it is padding
                continue
            while not len(target):
                target = next(targets)
            error += float((rows - target[: len(rows)]).double().square().sum())
            target = target[len(rows) :]
            if error > most * count:
                break
    return error / max(count, 1)


def _ratio(
    runner: Runner,
    quantizers: Mapping[str, Quantizer],
    wanted: list[Tensor],
    ranges_at: Callable[[float], Ranges],
    candidates: Iterable[float],
    progress: Progress,
    pieces: int,
) -> tuple[float, dict[float, float]]:
    """The ratio of least loss, and the losses of those that were tried on all data; 1.0, no clipping, always is.

    On a ninth of the batches: ratios far apart, then all between the neighbours of the best. The two best and 1.0 go on to all
    batches, the most promising first; a later one drops out as soon as its loss is above the least.
    """
    grid = sorted(set(candidates) | {1.0}, reverse=True)
    few, step = max(1, runner.parts // 9), math.isqrt(len(grid))

    def tried(ratios: Sequence[float], parts: int) -> dict[float, float]:
        losses: dict[float, float] = {}
        for ratio in progress(ratios, f"token ratio, {parts} of {runner.parts} batches"):
            _set(quantizers, ranges_at(ratio))
            losses[ratio] = _loss(runner, wanted, "", parts, min(losses.values(), default=math.inf), pieces)
        return losses

    losses = tried(grid[::step], few)
    best = grid.index(min(losses, key=lambda r: (losses[r], -r)))
    near = grid[max(0, best - step + 1) : best + step]
    losses |= tried([ratio for ratio in near if ratio not in losses], few)
    promising = sorted(losses, key=lambda r: (losses[r], -r))
    if few < runner.parts:
        losses = tried(list(dict.fromkeys([*promising[:2], 1.0])), runner.parts)
    return min(losses, key=lambda r: (losses[r], -r)), losses


def _learn(
    runner: Runner, quantizers: Mapping[str, Quantizer], wanted: list[Tensor], ranges: Ranges, losses: list[float]
) -> Ranges:
    """Adam on the logs of the scales and on the zero points; the best of all epochs, or the start, is kept.

    The loss after each epoch is added to ``losses``.
    """
    best, least = dict(ranges), min(losses)
    groups = []
    for quantizer in quantizers.values():
        log_scale, *zero_point = quantizer.learn()
        groups += [{"params": [log_scale], "lr": RATE}, {"params": zero_point, "lr": RATE * quantizer.levels}]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(wanted))
    for epoch in range(EPOCHS):
        for output, target in zip(runner.run(f"learning, epoch {epoch + 1}", gradients=True), wanted, strict=True):
            # Not backward(): the model's own gains and biases would be given gradients.
            gradients = torch.autograd.grad((compared(*output) - target).square().mean(), parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
        losses.append(_loss(runner, wanted, "after the epoch", most=least))
        if losses[-1] < least:
            least = losses[-1]
            best |= {key: quantizer.range() for key, quantizer in quantizers.items()}
    return best
