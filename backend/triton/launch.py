"""Which tile a kernel runs with: what was timed on this GPU if anything was, else what the model of the cost ranks first.

The choice is made when the kernel is traced. Nothing is timed unless ``fxquant.warmup(model, data, tune=True)`` asks for it, so
nothing stalls and every run has the same kernel; a graph whose number of tokens is symbolic is guarded on its bucket only.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import lru_cache

import torch

from . import tables
from .cost import cost
from .gpus import KNOWN, Device, described
from .language import INSTALLED
from .tile import Choice, Problem, candidates


def why_not(where: torch.device) -> str:
    """Why no kernel can be launched for tensors on ``where``, in a sentence; empty if one can."""
    if where.type != "cuda":
        return f"the site is on {where.type}, this kernel is for NVIDIA GPUs"
    if not INSTALLED:
        return "triton is not installed here, and this kernel is written in it (pip install triton)"
    if torch.version.hip:
        return "this is PyTorch for ROCm, and this kernel was written for NVIDIA GPUs"
    if torch.cuda.is_available() and (capability := torch.cuda.get_device_capability(where)) < (8, 0):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, 8.0 or newer is needed"
    return ""


Choose = Callable[[Problem, Device], Choice]
asked: ContextVar[tuple[Device | None, Choose] | None] = ContextVar("asked", default=None)
"""The GPU that this thread asks for, None for the one that is here, and who chooses: see ``recording.py``."""


def device(index: int | None = None) -> Device:
    """The device ``index``; an H200 where no GPU can be asked (tracing with fake tensors, the interpreter)."""
    given = asked.get()
    return given[0] if given and given[0] else _device(index)


@lru_cache
def _device(index: int | None) -> Device:
    return described(torch.cuda.get_device_properties(index)) if torch.cuda.is_available() else KNOWN[-1]


def choose(problem: Problem, on: Device) -> Choice:
    """What ``problem`` runs with on the device ``on``."""
    given = asked.get()
    return given[1](problem, on) if given else chosen(problem, on)


def chosen(problem: Problem, on: Device) -> Choice:
    """What was timed to be the fastest, else what the model has it to be."""
    return tables.look_up(problem, on) or untimed(problem, on)


def untimed(problem: Problem, on: Device) -> Choice:
    """What the model ranks first, but no persistent tile: these gain less than the model may be off, and have to be timed."""
    return next(choice for choice in ranked(problem, on) if not choice.tile.persistent)


@lru_cache(4096)
def ranked(problem: Problem, on: Device) -> tuple[Choice, ...]:
    """All that ``problem`` may run with, the cheapest first; of equal ones the first in ``tile.py``."""
    return tuple(sorted(candidates(problem, on), key=lambda choice: cost(problem, choice, on).total))
