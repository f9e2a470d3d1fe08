"""On AVX2 every op gives the numbers that it gives on AVX512, to the last bit but where it sums floats.

A process has one library of kernels, so AVX2 has a process of its own, which runs this file.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from instruction_sets import ISAS, needs_library
from torch import Tensor

from fxquant.backend.cpu import build, low_bit, ops

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (1, 2, 5, 6, 7, 97)  # of which the first four are multiplied as their weights are read
Found = dict[str, tuple[Tensor, ...]]


def draw(*shape: int) -> Callable[[int], Tensor]:
    return lambda seed: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.randint(-127, 128, (n, k), generator=torch.Generator().manual_seed(n), dtype=torch.int8)
    return ops.pack_panels(codes), draw(n)(1).abs() / 500, codes.sum(1, dtype=torch.int32)


def integers() -> Found:
    """What is exact up to an epilogue, number by number in one order."""
    found: Found = {}
    for dtype in FLOATS:
        for m in ROWS:
            for k, n in ((40, 70), (700, 128)):
                x, bias = draw(m, k)(m).to(dtype), draw(n)(2).to(dtype)
                codes = ops.quantize_rows(x, 8, m % 2 == 0)
                found[f"codes {dtype} {m} {k}"] = codes
                applied = ops.ACTIVATIONS[m % len(ops.ACTIVATIONS)]
                found[f"linear {dtype} {m} {k} {applied}"] = (ops.linear(*codes, *packed(n, k), bias, n, applied, dtype),)
                norm = (("none", "layer", "rms")[m % 3], draw(n)(4), draw(n)(5), 1e-5)
                passed = (draw(m, n)(3).to(dtype), None, *norm, 7, False, True, True)
                found[f"rows {dtype} {m} {k}"] = ops.linear_rows(*codes, *packed(n, k), bias, n, applied, dtype, *passed)
            both, parts, one = packed(256, 40), packed(64, 40), ops.quantize_rows(draw(1, 40)(m), 8, False)
            codes = (ops.quantize_rows(draw(m, 40)(8), 8, False)[0], one[1].flatten(), one[2].flatten())  # one scale for all
            found[f"gated {dtype} {m}"] = ops.linear_gated(*codes, *both, None, 128, "silu", dtype, 8, False)
            x = ops.quantize_rows(draw(2, m, 40)(9), 8, False)
            weights = ([t] * 3 for t in parts)
            found[f"attend {dtype} {m}"] = ops.attend(*x, *weights, [None] * 3, 2, dtype, None, False, 0.2, 8, False)
        wide = torch.randint(0, 256, (7, 33024), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
        told = (torch.ones(7, 1), torch.full((7, 1), 99, dtype=torch.int32), *packed(5, 33024), None, 5, "none", dtype)
        found[f"many inputs {dtype}"] = (ops.linear(wide, *told),)
        for bits in (1, 2, 3, 4, 8):
            half, generator = 2 ** (bits - 1), torch.Generator().manual_seed(bits)
            weight = torch.randint(-half, half, (70, 96), generator=generator, dtype=torch.int8)
            low = low_bit.pack(weight, draw(70, 3)(6).abs(), None, bits, 32)
            decoded = torch.empty(96, 70, dtype=dtype)
            low_bit.decode(*low, bits, 32, decoded)
            found[f"decoded {dtype} {bits}"] = (decoded,)
            for m in ROWS:
                x = draw(m, 96)(m).to(dtype)
                told = (*low, draw(70)(7), bits, 32, 70, "gelu", dtype)
                found[f"low {dtype} {bits} {m}"] = (low_bit.linear_u8(*ops.quantize_rows(x, 8, False), *told),)
    return found


def attentions() -> Found:
    """Scores of few queries are summed in another order."""
    found: Found = {}
    for queries in (1, 5, 70):
        for causal in (False, True):
            q, k, v = draw(2, 4, queries, 40)(1), draw(2, 2, 70, 40)(2), draw(2, 2, 70, 40)(3)
            seen = torch.arange(70).view(1, 1, 1, 70) < torch.tensor([70, 31]).view(2, 1, 1, 1)
            mask = None if causal else seen
            found[f"{queries} {causal}"] = (ops.attention(q, k, v, mask, causal and queries == 70, 0.2),)
    return found


@needs_library
@pytest.mark.skipif("avx2" in ISAS, reason="there is nothing but AVX2 here")
def test_avx2_gives_the_same_numbers(tmp_path: Path) -> None:
    env = {**os.environ, "FXQUANT_CPU_ISA": "avx2"}
    command = [sys.executable, __file__, str(tmp_path / "found")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    exact, near = torch.load(tmp_path / "found")
    with build.using("vnni"):  # what comes after it rounds attention to bfloat16
        here, also_near = integers(), attentions()
    assert here.keys() == exact.keys() and len(here) > 100
    different = [name for name, tensors in here.items() if not all(map(torch.equal, tensors, exact[name]))]
    assert different == []
    for name, tensors in also_near.items():
        torch.testing.assert_close(near[name], tensors, rtol=1e-5, atol=1e-6, msg=name)


@needs_library
@pytest.mark.skipif("avx2" in ISAS, reason="there is nothing but AVX2 here")
def test_avx2_multiplies_floats_within_their_bound() -> None:
    """As floats, where AVX512 makes integers of them: tests/test_low_bit.py, on AVX2."""
    chosen = ["-k", "float_product or any_number or neither_threads or gated or decoded", "-n", "0", "-q"]
    command = [sys.executable, "-m", "pytest", *chosen, str(Path(__file__).with_name("test_low_bit.py"))]
    done = subprocess.run(command, env={**os.environ, "FXQUANT_CPU_ISA": "avx2"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout and "failed" not in done.stdout


if __name__ == "__main__":
    assert build.isa() == "avx2"
    torch.save((integers(), attentions()), sys.argv[1])
