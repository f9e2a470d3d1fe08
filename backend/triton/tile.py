"""The tiles that a product may run with: few, each one compiled and looked at (tests/test_triton_compile.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .codes import Codes
from .gemv import TOKENS
from .gpus import Device
from .language import ceil_div


@dataclass(frozen=True)
class Tile:
    """One program's share of an [M, N] result, and how the compiler is asked to build it.

    ``weight_left``: the product is computed transposed, weight times activations, so that the weight's rows fill the tall side
    of the tensor core instruction and few tokens its narrow side. ``persistent``: so many programs for each processor, which
    take one tile after the other; 0 is a program for each tile.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    weight_left: bool = False
    persistent: int = 0


class Choice(NamedTuple):
    """A tile, and into how many parts K is split."""

    tile: Tile
    parts: int = 1

    def __str__(self) -> str:
        """``16 x 64, K in 4``; ``128 x 128, persistent``; ``128 x 64, 2 persistent`` on each processor."""
        n = self.tile.persistent
        walks = f", {n} persistent" if n > 1 else ", persistent" if n else ""
        return f"{self.tile.bm} x {self.tile.bn}{walks}" + (f", K in {self.parts}" if self.parts > 1 else "")


@dataclass(frozen=True)
class Problem:
    """What the choice of a tile depends on: ``products`` weights of [N, K] against ``tokens`` rows, a bucket's upper end.

    ``width`` is that of a slice of packed codes, 0 for int8 codes as they are. ``group_size`` of K or more is one scale
    for each output. ``words``: rows of activations and weights are whole words, so that one or two tokens can be multiplied by
    dp4a. ``codebook``: codes are looked up. What follows the product is the same work in any tile, and not asked about.
    """

    tokens: int
    N: int
    K: int
    bits: int
    floats: bool = False
    shifted: bool = False
    width: int = 0
    group_size: int = 1 << 30
    products: int = 1
    words: bool = True
    codebook: bool = False

    @property
    def codes(self) -> Codes | None:
        """How its codes are packed."""
        return Codes(self.bits, 16 if self.floats else 8, not self.shifted) if self.width else None

    @property
    def grouped(self) -> bool:
        """Partial sums have scales of their own; with 16-bit activations always."""
        return self.floats or self.group_size < self.K

    def block(self, tile: Tile) -> int:
        """How many columns of the weight a step takes."""
        return self.codes.slices * self.width if self.codes else tile.bk

    def shared(self, tile: Tile) -> int:
        """Bytes of shared memory of a program; the compiler does not check that they fit."""
        if tile.bm in TOKENS:
            return 0
        # What a tile ends with goes through shared memory, up to 4 bytes a number, and the next one's stages are there already.
        end = 4 * tile.bm * tile.bn if tile.persistent else 0
        if self.codes is None:
            return tile.stages * (tile.bm + self.products * tile.bn) * tile.bk + end
        size = 2 if self.floats else 1
        rows = self.products * self.codes.words * tile.bn + self.codes.slices * tile.bm
        return tile.stages * rows * self.width * size + end

    def __str__(self) -> str:
        kind = f"W{self.bits}A{16 if self.floats else 8}{' shifted' * self.shifted}{' codebook' * self.codebook}"
        kind += " pair" * (self.products == 2)
        packed = f", slices of {self.width}" if self.width else ", unaligned" * (not self.words)
        group = f", groups of {self.group_size}" if self.group_size < self.K else ""
        return f"{kind}{group}{packed}, {self.tokens} x {self.N} x {self.K}"


BUCKETS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
GUARDED = (8, 16, 64, 512)
"""Upper ends, for a number of tokens that is known and for a symbol: with MOST and TOKENS seven graphs, and Dynamo allows 8."""
MOST = 4096


def bucket(M: Any, ends: tuple[int, ...] | None = None) -> int:
    """The upper end of the bucket of ``M`` tokens, of GUARDED for a symbol, which is guarded on its bucket alone."""
    limit = next((end for end in ends or (BUCKETS if isinstance(M, int) else GUARDED) if end >= M), MOST)
    exact = next((t for t in TOKENS if t == M), 0) if limit <= 8 else 0
    return exact or limit


MAX_PARTS = 16
EIGHT_BIT = (
    *(Tile(16, bn, bk, 4, stages, weight_left=True) for bn in (64, 128) for bk in (128, 256) for stages in (4, 3)),
    *(Tile(32, bn, 128, 4, 3, weight_left=True) for bn in (64, 128)),
    *(Tile(bm, bn, 128, 4, stages) for bm in (32, 64) for bn in (64, 128) for stages in (4, 3)),
    *(Tile(bm, bn, 128, 8, stages) for bm, bn in ((64, 128), (128, 64), (128, 128)) for stages in (4, 3, 2)),
)
PERSISTENT = tuple(replace(tile, persistent=n) for n in (1, 2) for tile in EIGHT_BIT if tile.warps == 8)
LONG = 512  # tokens from which there are persistent tiles, where each program has two at least
# bk is the slice width of the packed weight, which the packer chose.
FEW_BITS = (
    *(Tile(bm, bn, 0, 4, stages, weight_left=True) for bm in (8, 16) for bn in (64, 128) for stages in (4, 3, 2)),
    *(Tile(32, 64, 0, 4, stages, weight_left=True) for stages in (3, 2)),
    *(Tile(bm, bn, 0, 8, stages, weight_left=True) for bm in (32, 64) for bn in (64, 128) for stages in (3, 2)),
)
FLOATS = (
    *(Tile(bm, 64, 0, 4, stages, weight_left=True) for bm in (8, 16) for stages in (4, 3, 2)),
    *(Tile(32, 64, 0, 4, stages, weight_left=True) for stages in (3, 2)),
    *(Tile(bm, 128, 0, 8, stages, weight_left=True) for bm in (16, 32) for stages in (3, 2)),
)
FLOATS_HOPPER = tuple(Tile(64, 64, 0, 8, stages, weight_left=True) for stages in (3, 2))
"""On older GPUs 64 tokens spill: the product of a group and the sum of groups are both in registers."""


def gemv_tile(problem: Problem) -> Tile:
    """The tile of one or two tokens: 16 bytes of the weight for each thread at a time."""
    width = problem.width or 512
    return Tile(problem.tokens, 8192 // width // 4, width, 4, 3)


def _walks(problem: Problem, tile: Tile, on: Device) -> bool:
    """Whether a processor holds all programs of a persistent tile at a time, and each has two tiles at least."""
    fits = tile.persistent * (problem.shared(tile) + 1024) <= on.shared_all
    return fits and 2 * on.processors * tile.persistent <= ceil_div(problem.tokens, tile.bm) * ceil_div(problem.N, tile.bn)


def candidates(problem: Problem, on: Device) -> Iterator[Choice]:
    """What ``problem`` may run with on the device ``on``: what fits its shared memory, and is not far too large for it."""
    if problem.tokens in TOKENS and problem.words and not problem.floats:
        yield Choice(gemv_tile(problem))
    # Sums of a thread: beyond so many, with those of a group and what floats need beside, registers spill.
    most = 16 if problem.floats else 32 if problem.width else 64
    if problem.floats:
        tiles: tuple[Tile, ...] = FLOATS + (FLOATS_HOPPER if on.capability >= 90 else ())
    else:
        tiles = FEW_BITS if problem.width else EIGHT_BIT + (PERSISTENT if problem.tokens >= LONG else ())
    least = min(tile.bm for tile in tiles)
    for tile in tiles:
        # Before Hopper, warps beyond one for each 16 rows of packed weights hold the same ones again: half the sums.
        twice = on.capability < 90 and problem.width and tile.warps > tile.bn // 16
        if problem.products * tile.bm * tile.bn > (most // 2 if twice else most) * 32 * tile.warps:
            continue
        if tile.bm >= 2 * max(problem.tokens, least) or problem.shared(tile) > on.shared:
            continue
        if tile.persistent and not _walks(problem, tile, on):
            continue
        yield Choice(tile)
        parts, steps = 2, ceil_div(problem.K, problem.block(tile))
        while problem.tokens <= 64 and parts <= MAX_PARTS and 2 * parts <= steps:  # two steps are left to each
            yield Choice(tile, parts)
            parts *= 2
