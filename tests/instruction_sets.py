"""The C++ kernels on each instruction set that this CPU has."""

from collections.abc import Callable
from typing import Any

import pytest

from fxquant.backend.cpu import build

needs_library = pytest.mark.skipif(bool(build.why_not()), reason=f"no C++ kernels here: {build.why_not()}")
ISAS = ("vnni",) if build.why_not() else ("avx2",) if build.isa() == "avx2" else tuple(dict.fromkeys(("vnni", build.isa())))


def on(isa: str, op: Callable[..., Any], *args: Any) -> Any:
    """``op`` of ``args`` on the instruction set ``isa``."""
    with build.using(isa):
        return op(*args)
