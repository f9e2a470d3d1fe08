"""Which tile a kernel runs with: a table by bucket of rows and generation of the GPU, and the split of K that fills it.

The choice is made when the kernel is traced, not by timing it: nothing to warm up, the same kernel on every run, and a graph
whose number of tokens is symbolic is guarded on its bucket only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from .codes import Codes
from .language import INSTALLED, ceil_div, power_of_two


@dataclass(frozen=True)
class Tile:
    """One program's share of an [M, N] result, and how the compiler is asked to build it.

    ``weight_left``: the product is computed transposed, weight times activations, so that the weight's rows fill the tall side
    of the tensor core instruction and few tokens its narrow side.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    weight_left: bool = False


@dataclass(frozen=True)
class Device:
    """What the choice of a tile depends on: compute capability (80, 89, 90), processors, shared memory per block in bytes."""

    capability: int
    processors: int
    shared: int


KNOWN = (Device(80, 108, 166912), Device(86, 84, 101376), Device(89, 128, 101376), Device(90, 132, 232448))
"""A100, A10 class, Ada, Hopper; a newer GPU is treated as the last of these that is not newer."""


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


@lru_cache
def device(index: int | None = None) -> Device:
    """The device ``index``; Hopper where no GPU can be asked (tracing with fake tensors, the interpreter)."""
    if not torch.cuda.is_available():
        return KNOWN[-1]
    properties = torch.cuda.get_device_properties(index)
    capability = properties.major * 10 + properties.minor
    like = [known for known in KNOWN if known.capability <= capability] or [KNOWN[0]]
    return Device(like[-1].capability, properties.multi_processor_count, like[-1].shared)


# Rows up to the first entry take that tile. Rows are tokens.
INT8 = (
    (16, Tile(16, 64, 128, 4, 4, weight_left=True)),
    (64, Tile(64, 64, 128, 4, 3)),
    (None, Tile(128, 128, 128, 8, 3)),
)

# bk is the slice width of the packed weight, which the packer chose; see weight_only.py.
WEIGHT_ONLY = {
    90: (
        (8, Tile(8, 64, 0, 4, 4, weight_left=True)),
        (16, Tile(16, 64, 0, 4, 4, weight_left=True)),
        (32, Tile(32, 64, 0, 4, 3, weight_left=True)),
        (None, Tile(64, 64, 0, 8, 3, weight_left=True)),
    ),
    80: (  # 64 tokens spill: the product of a group and the sum of groups are both in registers
        (8, Tile(8, 64, 0, 4, 4, weight_left=True)),
        (16, Tile(16, 64, 0, 4, 4, weight_left=True)),
        (None, Tile(32, 64, 0, 4, 3, weight_left=True)),
    ),
}

# Two, three and four bits against int8 activations; bk is the slice width, as above.
LOW_BIT = (
    (8, Tile(8, 64, 0, 4, 4, weight_left=True)),
    (16, Tile(16, 64, 0, 4, 4, weight_left=True)),
    (64, Tile(32, 64, 0, 4, 3, weight_left=True)),
    (None, Tile(64, 128, 0, 8, 3, weight_left=True)),
)

MAX_PARTS = 16


def a8_tile(M: int, bits: int, width: int, products: int, on: Device) -> Tile:
    """The tile for ``M`` tokens of one or two products with int8 activations and weights of ``bits`` bits."""
    if bits == 8:
        tile = _share(_pick(INT8, M), products)
        return _fit(tile, (tile.bm + products * tile.bn) * tile.bk, on)
    codes, tile = Codes(bits), _share(_pick(LOW_BIT, M), products)
    return _fit(tile, (products * codes.words * tile.bn + codes.slices * tile.bm) * width, on)


def gemv_tile(tokens: int, bits: int, width: int) -> Tile:
    """The tile for one or two tokens: 16 bytes of the weight for each thread at a time."""
    width = width if bits < 8 else 512
    return Tile(tokens, 8192 // width // 4, width, 4, 3)


def a16_tile(M: int, slices: int, width: int, products: int, on: Device) -> Tile:
    """The tile for ``M`` tokens of one or two weight-only products whose words hold ``slices`` slices of ``width`` codes."""
    tile = _share(_pick(WEIGHT_ONLY[90 if on.capability >= 90 else 80], M), products)
    return _fit(tile, (products * tile.bn + slices * tile.bm) * width * 2, on)


def _share(tile: Tile, products: int) -> Tile:
    """Two products share the accumulators of one, where those are many."""
    return replace(tile, bn=tile.bn // products) if tile.bm * tile.bn > 2048 else tile


def _fit(tile: Tile, bytes_per_stage: int, on: Device) -> Tile:
    """``tile`` with no more stages than shared memory holds: the compiler does not check."""
    return replace(tile, stages=max(1, min(tile.stages, on.shared // bytes_per_stage)))


def parts(N: int, steps: int, tile: Tile, on: Device) -> int:
    """Into how many parts K is split: a power of two that gives every processor two programs, with two steps left to each.

    Only few tokens are split, and how many they are is known to the tile: a symbolic number of tokens is not looked at.
    """
    if not tile.weight_left or tile.bm > 16:
        return 1
    programs = ceil_div(N, tile.bn)
    wanted = power_of_two(ceil_div(2 * on.processors, programs))
    most = 1 << max(steps // 2, 1).bit_length() - 1  # the greatest power of two that is not above steps / 2
    return min(wanted, most, MAX_PARTS)


def _pick(table: tuple[tuple[int | None, Tile], ...], M: int) -> Tile:
    for limit, tile in table:
        if limit is None or limit >= M:
            return tile
    raise AssertionError("the last entry of a table has no limit")
