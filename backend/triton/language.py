"""Triton if it is installed, and a stand-in that only speaks up when a kernel is launched if it is not."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from importlib import import_module
from typing import Any

import torch

from fxquant.errors import FxquantError


class KernelError(FxquantError, ValueError):
    """A tensor handed to a kernel has a shape, dtype or place that the kernel cannot take."""


class _Absent:
    """Takes every decorator and annotation at import time; refuses to launch."""

    def __getattr__(self, name: str) -> _Absent:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> _Absent:
        return self

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        raise KernelError(
            "a CUDA tensor reached a Triton kernel, and triton is not installed here; "
            "`pip install triton`, or move the model to the CPU, where fxquant has other kernels"
        )


triton: Any
tl: Any
wrap_triton: Any
try:
    triton, tl, wrap_triton = import_module("triton"), import_module("triton.language"), torch.library.wrap_triton
    INSTALLED = True
    INTERPRETED: bool = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: no inline assembly, no bfloat16 arithmetic
except ImportError:
    triton = tl = wrap_triton = _Absent()
    INSTALLED = INTERPRETED = False


def define(name: str, implementation: Callable[..., Any]) -> Any:
    """Define ``fxquant::<name>``: Inductor inlines its Triton kernels on a GPU and its torch meaning elsewhere.

    ``implementation`` is also the fake implementation: it must be traceable, so it only asks for shapes.
    """
    if INSTALLED:
        return torch.library.triton_op(f"fxquant::{name}", implementation, mutates_args=())
    op = torch.library.custom_op(f"fxquant::{name}", implementation, mutates_args=())
    op.register_fake(inspect.unwrap(implementation))
    return op


def launches(x: torch.Tensor) -> bool:
    """True where a kernel is launched for ``x``; everywhere else the plain meaning of the op runs."""
    return x.device.type == "cuda" or (INTERPRETED and x.device.type == "cpu")


recording: ContextVar[Callable[[Any], Any] | None] = ContextVar("recording", default=None)
"""What stands for ``wrap_triton`` in this thread, if anything does: see ``recording.py``."""


def launcher(kernel: Any) -> Any:
    """What ``[grid](...)`` launches ``kernel``, so that Inductor sees it."""
    return (recording.get() or wrap_triton)(kernel)


def require(condition: bool, sentence: str) -> None:
    """Raise KernelError with ``sentence`` unless ``condition``."""
    if not condition:
        raise KernelError(sentence)


def rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself if its rows are contiguous (any distance apart), else a copy; kernels take one stride per matrix."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def ceil_div(a: int, b: int) -> int:
    """The least number of blocks of ``b`` that hold ``a``; also for SymInts."""
    return (a + b - 1) // b


def power_of_two(n: int) -> int:
    """The least power of two that is not below ``n``."""
    return 1 << max(n - 1, 0).bit_length()
