"""Which kernels an op would launch: asked of it with fake tensors, so nothing runs; for ``inspect``, ``explain``, tuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .gpus import Device
from .language import recording
from .launch import Choose, asked, chosen
from .tile import Choice, Problem


@dataclass(frozen=True)
class Launch:
    """One kernel launch that was asked for: the kernel, every argument by name, tensors included; and what its tile was for."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int
    stages: int
    problem: Problem | None = None
    choice: Choice | None = None
    on: Device | None = None


def launches(run: Callable[[], object], on: Device | None = None, choose: Choose = chosen) -> list[Launch]:
    """The launches that ``run`` asks for, none of which happens; its tensors may be fake ones.

    ``on``: the device that they are for, None for the one that is here; ``choose`` picks the tile of each product.
    """
    found: list[Launch] = []
    product: tuple[Any, ...] = ()

    def remember(problem: Problem, on: Device) -> Choice:
        nonlocal product
        product = (problem, choice := choose(problem, on), on)
        return choice

    def recorder(kernel: Any) -> Any:
        class Recorder:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                def record(*values: Any, num_warps: int = 4, num_stages: int = 3, **named: Any) -> None:
                    arguments = dict(zip(kernel.arg_names, values, strict=False)) | named
                    found.append(Launch(kernel, grid, arguments, num_warps, num_stages, *product))

                return record

        return Recorder()

    tokens = recording.set(recorder), asked.set((on, remember))
    try:
        run()
    finally:
        recording.reset(tokens[0])
        asked.reset(tokens[1])
    return found


def tile_of(asked: Launch) -> str:
    """The tile of a product; of attention, queries and keys; nothing for other kernels."""
    if asked.choice is None:
        return " x ".join(str(asked.arguments[name]) for name in ("BM", "BN") if name in asked.arguments)
    return str(asked.choice)
