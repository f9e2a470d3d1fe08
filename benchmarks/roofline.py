"""What this machine can do at best, measured: bytes read from memory, and products of 8 bits by AVX512-VNNI, per second.

On a CPU with AMX, whose tiles multiply more, no rate of products is given.

    python benchmarks/roofline.py
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from measure import Flush, heading
from torch import nn

from fxquant.backend.cpu.features import has_amx, has_vnni

ROUNDS, SUMS, STEPS = 15, 16, 300_000  # so many sums hide the latency of an instruction
# All loops over the sums unrolled, so that these stay in registers.
EACH = f"#pragma GCC unroll {SUMS}\n  for (int j = 0; j < {SUMS}; j++)"
SOURCE = f"""
#include <immintrin.h>
extern "C" int products(long steps) {{
  __m512i sum[{SUMS}], x = _mm512_set1_epi32(0x01020304), w = _mm512_set1_epi32(0x04030201);
{EACH} sum[j] = _mm512_setzero_si512();
  for (long i = 0; i < steps; i++) {{
{EACH} asm volatile("vpdpbusd %2, %1, %0" : "+v"(sum[j]) : "v"(x), "v"(w));
  }}
{EACH} x = _mm512_add_epi32(x, sum[j]);
  return _mm512_reduce_add_epi32(x);
}}
"""


@dataclass(frozen=True)
class Roofline:
    """Bytes per second that all threads read, and multiply-adds of 8 bits per second, 0 where these are not measured."""

    bandwidth: float
    products: float

    def __str__(self) -> str:
        products = f", {1e-9 * self.products:.0f} G multiply-adds of 8 bits" if self.products else ""
        return f"this machine, in this run, per second: {1e-9 * self.bandwidth:.1f} GB read{products}"

    def least(self, work: "Work", cold: bool) -> float:
        """Seconds that the products of ``work`` take at least: all of them multiplied, or, ``cold``, their weights read."""
        read = work.weights / self.bandwidth if cold else 0.0
        return max(read, work.products / self.products if self.products else 0.0)


@dataclass(frozen=True)
class Work:
    """Multiply-adds of 8 bits of the linears of one call, 0 where activations are floats; and the bytes of their codes."""

    products: int
    weights: float


def work_of(model: nn.Module, call: Callable[[], object]) -> tuple[int, int]:
    """Multiply-adds of the linears in ``model`` in one call of it, and the elements of their weights, each counted once.

    A linear whose result nobody reads, such as a pooler's, is counted as well.
    """
    products, weights = 0, dict[int, int]()

    def count(layer: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor], y: torch.Tensor) -> None:
        nonlocal products
        products += y.numel() * layer.weight.shape[1]
        weights[id(layer.weight)] = layer.weight.numel()

    hooks = [m.register_forward_hook(count, with_kwargs=True) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        with torch.no_grad():
            call()
    finally:
        for hook in hooks:
            hook.remove()
    return products, sum(weights.values())


def measure_roofline() -> Roofline:
    """The best of some rounds, on as many threads as PyTorch uses."""
    flush = Flush()
    for _ in range(ROUNDS):
        flush()
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if not has_vnni() or has_amx() or not compiler:
        return Roofline(flush.bandwidth, 0.0)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(threads) as pool:
        command = [*compiler.split(), "-O3", "-mavx512f", "-mavx512vnni", "-shared", "-fPIC", "-x", "c++", "-"]
        if subprocess.run([*command, "-o", f"{folder}/products.so"], input=SOURCE.encode(), capture_output=True).returncode:
            return Roofline(flush.bandwidth, 0.0)
        run = ctypes.CDLL(f"{folder}/products.so").products
        run.argtypes = [ctypes.c_long]
        taken = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            list(pool.map(run, [STEPS] * threads))
            taken.append(time.perf_counter() - start)
    return Roofline(flush.bandwidth, threads * STEPS * SUMS * 64 / min(taken))


if __name__ == "__main__":
    print(heading())
    print(measure_roofline())
