"""From what the observers saw to ranges: one token ratio for the whole network, then scales learned on the output's error.

Outlier Suppression (Wei et al., 2022), section 4.2. The coarse stage looks for one ratio in a grid; here candidates drop out in
rounds on more and more data (successive halving) rather than all running on all of it. The fine stage learns log-scales and
zero points, so that steps are relative to the scale: at the paper's absolute rate of 1e-5 hardly anything moves. Weights are
rounded throughout, as they will be.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fxquant.numerics.observers import TokenWise

from .calibration import Maps, ObservingStage, Progress, Runner, SimulatingStage, Stage, compared
from .simulate import Quantizer

Ranges = dict[str, tuple[Tensor, Tensor]]
EPOCHS, RATE = 3, 5e-3
BATCH, LENGTH = 32, 128  # of the grid of the paper's code: ratios in steps of 0.01


def search(runner: Runner, observed: ObservingStage, maps: Maps, progress: Progress) -> tuple[Ranges, dict[str, Any]]:
    """The range of every observed edge, and notes for people: the losses of the search and of learning."""
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

    searched = [key for key in states if isinstance(r := edges[key].spec.observer, TokenWise) and r.ratio is None]
    learned = [key for key in states if (watched := edges[key].spec.observer) and watched.learned]
    notes: dict[str, Any] = {}
    if not searched and not learned:
        return ranges_at(None), notes

    runner.session.enter(Stage())
    wanted = [compared(*output) for output in runner.run("float outputs")]
    quantizers = {key: Quantizer(edges[key].spec) for key in states}
    runner.session.enter(SimulatingStage(runner.session, maps, quantizers))
    ranges = ranges_at(None)
    if searched:
        bits = min(edges[key].spec.format.bits for key in searched)
        ratio, losses = _ratio(runner, quantizers, wanted, ranges_at, TokenWise.candidates(bits, BATCH, LENGTH), progress)
        notes |= {"token ratio": ratio, "losses by ratio": losses}
        ranges = ranges_at(ratio)
    _set(quantizers, ranges)
    if learned:
        ranges, of_epochs = _learn(runner, {key: quantizers[key] for key in learned}, wanted, ranges)
        notes["losses of learning"] = of_epochs
    return ranges, notes


def _set(quantizers: Mapping[str, Quantizer], ranges: Ranges) -> None:
    for key, quantizer in quantizers.items():
        quantizer.set_range(*ranges[key])


def _loss(runner: Runner, wanted: list[Tensor], title: str, parts: int | None = None) -> float:
    """The mean squared error of the outputs over the first ``parts`` batches (None: all)."""
    error, count = 0.0, 0
    for output, target in zip(runner.run(title, parts), wanted, strict=False):  # the runner first: it cleans up at its end
        got = compared(*output)
        error += float((got - target).double().square().sum())
        count += target.numel()
    return error / max(count, 1)


def _ratio(
    runner: Runner,
    quantizers: Mapping[str, Quantizer],
    wanted: list[Tensor],
    ranges_at: Callable[[float], Ranges],
    candidates: Iterable[float],
    progress: Progress,
) -> tuple[float, dict[str, float]]:
    """The ratio of least loss: a third of the candidates goes on to three times the data; 1.0, no clipping, always does."""
    parts = max(1, runner.parts // 9)
    left = sorted(set(candidates) | {1.0}, reverse=True)
    losses: dict[float, float] = {}
    while True:
        for ratio in progress(left, f"token ratio, {parts} of {runner.parts} batches"):
            _set(quantizers, ranges_at(ratio))
            losses[ratio] = _loss(runner, wanted, "", parts)
        if parts >= runner.parts:
            break
        best = sorted(left, key=lambda r: (losses[r], -r))[: max(3, len(left) // 3)]
        left = sorted({*best, 1.0}, reverse=True)
        parts = min(runner.parts, 3 * parts)
    ratio = min(left, key=lambda r: (losses[r], -r))
    return ratio, {f"{r:.4g}": losses[r] for r in left}


def _learn(
    runner: Runner, quantizers: Mapping[str, Quantizer], wanted: list[Tensor], ranges: Ranges
) -> tuple[Ranges, list[float]]:
    """Adam on the logs of the scales and on the zero points; the best of all epochs, the start among them, is kept."""
    best, losses = dict(ranges), [_loss(runner, wanted, "before learning")]
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
        losses.append(_loss(runner, wanted, "after the epoch"))
        if losses[-1] == min(losses):
            best |= {key: quantizer.range() for key, quantizer in quantizers.items()}
    return best, losses
