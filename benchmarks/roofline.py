"""What this machine can do at best, measured: bytes read from memory, and products of 8 bits by AVX512-VNNI, per second.

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

from fxquant.backend.cpu.features import has_vnni

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
    """Bytes per second that all threads read, and multiply-adds of 8 bits per second, 0 where there is no VNNI."""

    bandwidth: float
    products: float

    def __str__(self) -> str:
        products = f"{1e-9 * self.products:.0f} G multiply-adds of 8 bits" if self.products else "no VNNI"
        return f"this machine, in this run: {1e-9 * self.bandwidth:.1f} GB read, {products} per second"

    def least(self, work: "Work", cold: bool) -> float:
        """Seconds that the products of ``work`` take at least: all of them multiplied, or, ``cold``, their weights read."""
        read = work.weights / self.bandwidth if cold else 0.0
        return max(read, work.products / self.products if self.products else 0.0)


@dataclass(frozen=True)
class Work:
    """Multiply-adds of the linears of one call, and the bytes of their codes."""

    products: int
    weights: float


def work_of(model: nn.Module, call: Callable[[], object], bits: int) -> Work:
    """What the linears in ``model`` do in one call of it, with weights of ``bits`` bits; scales and norms are not counted."""
    products, elements = 0, 0

    def count(layer: nn.Module, inputs: tuple[torch.Tensor, ...], _: object) -> None:
        nonlocal products, elements
        products += inputs[0].numel() // inputs[0].shape[-1] * layer.weight.numel()
        elements += layer.weight.numel()

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        call()
    for hook in hooks:
        hook.remove()
    return Work(products, elements * bits / 8)


def measure_roofline() -> Roofline:
    """The best of some rounds, on as many threads as PyTorch uses."""
    flush = Flush()
    for _ in range(ROUNDS):
        flush()
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if not has_vnni() or not compiler:
        return Roofline(flush.bandwidth, 0.0)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(threads) as pool:
        command = [*compiler.split(), "-O3", "-mavx512f", "-mavx512vnni", "-shared", "-fPIC", "-x", "c++", "-"]
        subprocess.run([*command, "-o", f"{folder}/products.so"], input=SOURCE.encode(), check=True)
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
