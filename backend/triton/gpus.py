"""What is published of NVIDIA's GPUs, as far as the cost of a kernel depends on it; nothing here was measured by us."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Device:
    """One GPU: compute capability (80, 86, 89, 90), processors, and what they reach.

    ``shared``: bytes of shared memory that one program may ask for; ``shared_all``: that a processor has for all of them;
    ``warps``: the most that a processor holds; ``clock``: GHz; ``bandwidth``: of the memory, GB/s; ``cache``: L2, bytes;
    ``floats`` and ``integers``: dense products of bfloat16 (summed in float32) and of int8, 1e12 operations/s.
    """

    capability: int
    processors: int
    shared: int
    name: str
    shared_all: int
    warps: int
    clock: float
    bandwidth: float
    cache: int
    floats: float
    integers: float


MB = 1 << 20
A100 = Device(80, 108, 166912, "A100-SXM4-80GB", 167936, 64, 1.41, 2039, 40 * MB, 312, 624)
A40 = Device(86, 84, 101376, "A40", 102400, 48, 1.74, 696, 6 * MB, 149.7, 299.3)
RTX4090 = Device(89, 128, 101376, "RTX 4090", 102400, 48, 2.52, 1008, 72 * MB, 165.2, 660.6)
L40S = Device(89, 142, 101376, "L40S", 102400, 48, 2.52, 864, 96 * MB, 362, 733)
H100 = Device(90, 132, 232448, "H100 80GB HBM3", 233472, 64, 1.83, 3350, 50 * MB, 989.4, 1978.9)
H200 = Device(90, 132, 232448, "H200", 233472, 64, 1.83, 4800, 50 * MB, 989.4, 1978.9)

KNOWN = (A100, A40, RTX4090, L40S, H100, H200)
"""In the order of their compute capability. NVIDIA's data sheets and white papers; clocks are those that the rates go with."""
COMPILED = (A100, RTX4090, H200)
"""One for each machine code that differs: what ``inspect`` compiles for."""


def described(properties: Any) -> Device:
    """The Device of what ``torch.cuda.get_device_properties`` gives.

    A GPU that is not in KNOWN is taken for the last of those that are not newer, as many times as fast as it has processors;
    its memory's bandwidth, where the driver tells clock and width, is its own.
    """
    for known in KNOWN:
        if known.name in properties.name and known.processors == properties.multi_processor_count:
            return replace(known, name=properties.name)
    capability = properties.major * 10 + properties.minor
    like = ([known for known in KNOWN if known.capability <= capability] or [KNOWN[0]])[-1]
    share = properties.multi_processor_count / like.processors
    clock, width = getattr(properties, "memory_clock_rate", 0), getattr(properties, "memory_bus_width", 0)  # kHz, bits
    return replace(
        like,
        name=properties.name,
        processors=properties.multi_processor_count,
        bandwidth=2 * clock * width / 8e6 if clock and width else like.bandwidth * share,
        cache=getattr(properties, "L2_cache_size", 0) or int(like.cache * share),
        floats=like.floats * share,
        integers=like.integers * share,
    )
