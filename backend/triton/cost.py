"""How long a product would take with a tile, from what is published of the GPU and what the kernel would issue and move.

    time  =  the slowest of memory, L2 cache, instructions, products  +  a tenth of the others  +  what starts up

A model to rank tiles by, and to say what is to be expected; nothing in it was fitted to a time, and no GPU has confirmed it.
Instructions and registers are fitted to the machine code of ``inspect`` (tests/test_triton_compile.py holds them to it).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .gemv import TOKENS
from .gpus import Device
from .language import ceil_div
from .tile import Choice, Problem, Tile

# What no data sheet tells, and we assume: microseconds from asking memory to its answer, bytes that the L2 cache gives a
# processor in a clock, microseconds from one kernel to the next in a CUDA graph, the share of their peaks that memory and
# products reach at best, in which clock a warp that is alone issues its next instruction, the share of that first answer that
# a persistent program does not wait for, because it asked while the tile before ended. The last wave is as long for it as it
# is for others: tiles are dealt out beforehand.
LATENCY, CACHE_BYTES, NEXT_KERNEL, REACHED, ALONE, ASKED_BEFORE = 0.8, 36, 1.5, 0.85, 2.5, 0.5


@dataclass(frozen=True)
class Cost:
    """Microseconds of each bound and of the whole; registers of a thread, programs that a processor holds at a time."""

    memory: float
    cache: float
    issue: float
    product: float
    start: float
    registers: int
    resident: int

    @property
    def total(self) -> float:
        """Of the whole, microseconds."""
        bounds = (self.memory, self.cache, self.issue, self.product)
        return max(bounds) + 0.1 * (sum(bounds) - max(bounds)) + self.start

    @property
    def bound(self) -> str:
        """What the kernel waits for most."""
        return max(("memory", "cache", "issue", "product"), key=lambda name: float(getattr(self, name)))


@dataclass(frozen=True)
class Step:
    """What one thread has in one step of the loop: weights, their words in registers, sums, scales' chunks; bits aside."""

    threads: int
    block: int  # columns of the weight
    weights: float
    word_registers: float
    sums: float
    chunks: int

    @staticmethod
    def of(problem: Problem, tile: Tile) -> Step:
        """Of ``problem`` with ``tile``."""
        threads, block = 32 * tile.warps, problem.block(tile)
        # Warps stand along the weight's rows, 16 for each; those beyond stand along tokens, and unpack the same weights again.
        along = min(tile.warps, tile.bn // 16) if tile.weight_left else tile.warps
        weights = problem.products * tile.bn * block / (32 * along)
        group = ceil_div(problem.K, block) * block if problem.group_size >= problem.K else problem.group_size
        chunks = max(1, block // group) if problem.grouped else 0
        if tile.bm in TOKENS:  # a lane keeps its own sums
            sums = problem.products * tile.bm * tile.bn * tile.bk / 4 / threads
        else:
            sums = problem.products * tile.bm * tile.bn / threads
        return Step(threads, block, weights, weights * problem.bits / 32, sums, chunks)


def instructions(problem: Problem, tile: Tile, on: Device) -> float:
    """How many instructions one thread issues in one step of the loop."""
    step, codes = Step.of(problem, tile), problem.codes
    unpack = 0.0
    if codes:  # a shift for all but one slice, a logic operation for each plane, on a register of 4 or 2 weights
        shifted = 1 - 1 / codes.slices if codes.container == 16 else 0.5 if len(codes.planes) == 1 else 0.6
        unpack = step.weights * len(codes.planes) * (1 + shifted) * codes.container / 32
        if codes.container == 16 and codes.bits == 8:
            unpack *= 2 if problem.shifted else 1.7  # two logic operations and an addition
    if problem.codebook:
        unpack = step.weights * 37 / 8
    scaling = 2 * step.sums * step.chunks
    if tile.bm in TOKENS:
        loads = step.word_registers / 4 + tile.bm * step.block / tile.bk
        return unpack + step.weights * tile.bm / 4 + scaling + loads + 15 + (6 * codes.slices if codes and step.chunks else 0)
    size, depth = (2, 16) if problem.floats else (1, 32)
    rows, columns = (tile.bn * problem.products, tile.bm) if tile.weight_left else (tile.bm, tile.bn * problem.products)
    products = rows * columns * step.block / (16 * 8 * depth) / tile.warps  # of the tensor core instructions before Hopper
    x_bytes, w_bytes = tile.bm * step.block * size, problem.products * tile.bn * step.block * problem.bits / 8
    loads = w_bytes / 16 / step.threads + step.word_registers / 4 + x_bytes / 16 / step.threads
    if tile.weight_left:
        fragments = x_bytes / 512 * min(1, tile.bn / 16 / tile.warps)  # each warp reads all its activations
    else:
        fragments = (x_bytes + w_bytes) / 512 / max(tile.warps // 4, 1) ** 0.5
    if by_groups(tile, on):
        tall = problem.products * (tile.bn if tile.weight_left else tile.bm)
        groups = tall * step.block / (64 * depth) / (tile.warps / 4)
        products, fragments = (4 if codes else 7) * groups, 0.0
        loads -= 0 if codes else step.word_registers / 4
    around = 55
    if not codes and tile.stages == 2 and on.capability < 90:
        around -= 25  # one stage is loaded ahead, and no place in a ring of them is counted
    elif tile.persistent and tile.stages > 2 and on.capability >= 90:
        around += 35  # whether the loads begin another tile
    return unpack + products + loads + fragments + scaling + around + 15 * step.chunks


def by_groups(tile: Tile, on: Device) -> bool:
    """Products are Hopper's, of four warps together, who read shared memory by descriptors; their tall side is 64."""
    return on.capability >= 90 and (tile.bn if tile.weight_left else tile.bm) >= 64


def registers(problem: Problem, tile: Tile, on: Device) -> int:
    """How many registers a thread needs, about."""
    step = Step.of(problem, tile)
    if tile.bm in TOKENS:
        return int(24 + 2 * step.sums + step.word_registers)
    sums = step.sums * (1 + (step.chunks > 0) + problem.floats)
    words = step.word_registers if problem.codes else 8 if by_groups(tile, on) else 24
    return int(1.35 * (30 + sums + words + (25 if tile.persistent else 0)))


@lru_cache(4096)
def cost(problem: Problem, choice: Choice, on: Device) -> Cost:
    """What ``problem`` costs on the device ``on`` with ``choice``."""
    (tile, parts), M, N, K = choice, problem.tokens, problem.N, problem.K
    used = registers(problem, tile, on)
    threads, shared = 32 * tile.warps, problem.shared(tile)
    by_registers = 65536 // (-(-used // 8) * 8 * threads)
    by_shared = on.shared_all // (shared + 1024) if shared else 32
    resident = max(1, min(by_registers, by_shared, on.warps // tile.warps, 32))

    rows, columns = ceil_div(M, tile.bm), ceil_div(N, tile.bn)
    programs, block = rows * columns * parts, problem.block(tile)
    steps, busiest = ceil_div(ceil_div(K, block), parts), ceil_div(programs, on.processors)  # of the processor that has most
    started = tile.persistent or busiest  # programs of a processor
    at_once = min(busiest, started, resident)
    cycles = busiest * steps / (on.clock * 1e3)  # times clocks of a step: microseconds

    per_scheduler = at_once * tile.warps / 4
    issue = cycles * instructions(problem, tile, on) * tile.warps / 4 * max(1.0, ALONE / per_scheduler)
    rate = (on.floats if problem.floats else on.integers) * 1e6 / on.processors / (on.clock * 1e3)  # operations in a clock
    operations = 2 * tile.bm * problem.products * tile.bn * block
    product = 0.0 if tile.bm in TOKENS else cycles * operations / rate / REACHED

    size = 2 if problem.floats else 1
    weight, x = problem.products * N * K * problem.bits / 8, M * K * size
    scales = problem.products * N * 4.0 * (ceil_div(K, problem.group_size) * (1 + problem.shifted) if problem.grouped else 2)
    partial = 4.0 * parts * problem.products * M * N if parts > 1 else 0.0
    stays = partial <= on.cache / 2  # partial sums are read again from the L2 cache
    memory = (weight + x + scales + 2 * M * N + (0 if stays else 2 * partial)) / (on.bandwidth * 1e3 * REACHED)
    # Little's law: what a processor has asked for and not got yet, over the time an answer takes; and what its port lets by.
    stage = (weight / N / K * tile.bn + tile.bm * size) * block
    waiting = at_once * stage * (1 if tile.bm in TOKENS else max(tile.stages - 1, 1))
    port = CACHE_BYTES * on.clock * 1e3  # bytes a microsecond
    cache = (
        busiest
        * (steps * stage + tile.bm * tile.bn * (4 * problem.products if parts > 1 else 2))
        / min(port, waiting / LATENCY)
    )
    cache += partial / port / on.processors
    waits, more = ceil_div(started, resident), ceil_div(busiest, at_once)
    start = LATENCY * (waits + (1 - ASKED_BEFORE) * (more - waits)) + (NEXT_KERNEL + LATENCY if parts > 1 else 0)
    return Cost(memory, cache, issue, product, start, used, resident)


def least(problem: Problem, on: Device) -> float:
    """The roofline, microseconds: memory or products at their published peaks, whichever is slower, and nothing else."""
    M, N, K = problem.tokens, problem.N, problem.K
    weight, x = problem.products * N * K * problem.bits / 8, M * K * (2 if problem.floats else 1)
    rate = on.floats if problem.floats else on.integers
    return max((weight + x + 2 * M * N) / on.bandwidth / 1e3, 2 * M * N * K * problem.products / rate / 1e6)
