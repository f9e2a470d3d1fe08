"""Which tile is fastest, by timing on the GPU that is here: only when ``fxquant.warmup(model, data, tune=True)`` asks for it.

Not run on a GPU yet. Times are medians of CUDA graph replays over copies of the operands that do not fit the L2 cache, so that
weights come from memory as they do in a model.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .codes import NF4, OFFSET
from .gemm import launch_a8, launch_a16
from .gpus import Device
from .language import ceil_div
from .launch import ranked
from .tables import keep, look_up
from .tile import Choice, Problem

SHORTLIST = 16  # of the model's ranking are timed: where it is wrong, it is not by so much
REPLAYS = 15

Timer = Callable[[Problem, Choice, Device], float]
"""Microseconds of a product with a choice on a device."""


def tune(problems: Iterable[Problem], on: Device, timer: Timer | None = None) -> dict[Problem, tuple[Choice, float]]:
    """Time those of ``problems`` that no table has yet, keep the fastest choices in the user's table, and return them.

    A choice that does not run (the compiler may refuse one) is passed over; a problem of which none does is left to the model.
    """
    timer, found = timer or microseconds, {}
    for problem in dict.fromkeys(problems):
        if look_up(problem, on) is not None:
            continue
        times = {}
        for choice in ranked(problem, on)[:SHORTLIST]:
            try:
                times[choice] = timer(problem, choice, on)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception:  # out of registers or of shared memory, in any of Triton's words
                continue
        if times:
            best = min(times, key=lambda choice: times[choice])
            found[problem] = best, times[best]
            keep({problem: found[problem]}, on)  # at once: what was timed stays, whatever comes
    return found


def operands(problem: Problem) -> tuple[Tensor, list[Tensor]]:
    """Random activations and weights for ``problem``, on the GPU."""
    M, N, K = problem.tokens, problem.N, problem.K
    groups = ceil_div(K, problem.group_size)
    weights: list[Tensor] = []
    for _ in range(problem.products):
        codes = problem.codes
        if codes is None:
            words = torch.randint(-128, 128, (N, K), device="cuda", dtype=torch.int8)
        else:
            size = ceil_div(K, codes.slices * problem.width) * codes.words * problem.width
            top = 1 << codes.container - 1
            kind = torch.int16 if problem.floats else torch.int8
            words = torch.randint(-top, top, (N, size), device="cuda", dtype=kind)
        if problem.floats:
            more = [torch.zeros(groups, N, device="cuda", dtype=torch.int32)] if problem.shifted else []
            weights += [words, torch.rand(groups, N, device="cuda"), *more]
        elif problem.grouped:
            weights += [words, torch.rand(groups, N, device="cuda"), torch.zeros(N, device="cuda")]
        else:
            weights += [words, torch.rand(N, device="cuda"), torch.zeros(N, device="cuda", dtype=torch.int32)]
    if problem.floats:
        return torch.randn(M, K, device="cuda", dtype=next(iter(OFFSET))), weights
    return torch.randint(-128, 128, (M, K), device="cuda", dtype=torch.int8), weights


def call(problem: Problem, choice: Choice, x: Tensor, weights: list[Tensor]) -> Tensor:
    """The product of ``problem`` with ``choice``, without anything behind it."""
    tile, parts = choice
    program, end = _program(problem), (problem.bits, problem.group_size, problem.width or 128)
    if problem.floats:
        book = NF4 if problem.codebook else None
        return launch_a16(x, weights, [], program, problem.shifted, *end, x.dtype, tile, parts, book)
    scale = torch.ones(x.shape[0], 1, device=x.device)
    return launch_a8(x, scale, None, weights, [], program, *end, torch.bfloat16, tile, parts)


def _program(problem: Problem) -> str:
    return "t0 = silu(y0); t1 = mul(t0, y1)" if problem.products == 2 else ""


def microseconds(problem: Problem, choice: Choice, on: Device) -> float:
    """The median time of ``call`` on the GPU that is here."""
    x, weights = operands(problem)
    size = sum(t.numel() * t.element_size() for t in (x, *weights))
    copies = [(x, weights)]
    copies += [(x.clone(), [w.clone() for w in weights]) for _ in range(min(31, 4 * on.cache // max(size, 1)))]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(problem, choice, *copies[0])
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in copies:
            call(problem, choice, *one)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times: list[float] = []
    for _ in range(REPLAYS):
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(copies))
    return statistics.median(times[REPLAYS // 3 :])
