"""Is each GPU kernel right, and how fast is it beside Inductor in bfloat16? One command, on a machine with an NVIDIA GPU.

    python benchmarks/gpu.py [--out build/gpu.json] [--budget 500]

Sections run in order and are written to the JSON file as they end; a second run skips what is there. Correctness comes first:
integers bit for bit, floats against the kernel's plain meaning in float64. Times are medians of CUDA graph replays over copies
of the operands that do not fit the L2 cache, so that weights come from memory as they do in a model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fxquant.backend.kernels.attention_triton import codes_of
from fxquant.backend.triton import attention, gemm, launch, row, tune
from fxquant.backend.triton.codes import Codes
from fxquant.backend.triton.cost import cost
from fxquant.backend.triton.tile import Problem, Tile
from fxquant.numerics.affine import IntAffine
from fxquant.numerics.granularity import PerToken
from fxquant.recipe import Spec

LAYERS = {"768 to 3072": (3072, 768), "4096 to 4096": (4096,) * 2, "4096 to 14336": (14336, 4096), "8192 to 8192": (8192,) * 2}
COLD = 256 << 20  # bytes of operands that a timing walks through; the L2 of an H200 holds 50 MB


def relative(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """The norm of the error over that of the truth."""
    return float((ours.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30))


def microseconds(make: Callable[[], Callable[[], Any]], bytes_read: int) -> float:
    """The median time of one call; ``make`` returns a call on fresh operands, and enough are made to leave the cache cold."""
    calls = [make() for _ in range(max(1, min(64, COLD // max(bytes_read, 1))))]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(25):
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[5:])


def check_rows() -> list[dict[str, Any]]:
    """Codes, scales and zero points bit for bit, from the kernel's own normalised rows; the norm against float64."""
    found = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for T, D in ((1, 1), (3, 63), (7, 384), (33, 768), (5, 4096), (2, 16384), (3, 20000)):
            x = (torch.randn(T, D, device="cuda") * torch.logspace(-3, 3, T, device="cuda")[:, None]).to(dtype)
            r, (w, b) = torch.randn_like(x), torch.randn(2, D, device="cuda", dtype=dtype)
            for symmetric in (True, False):
                plain = row.quantize_rows(x, symmetric)
                q, scale, zero, total, y = row.layer_norm_quantize(x, r, w, b, 1e-5, symmetric, True, True)
                truth = F.layer_norm((x + r).double(), (D,), w.double(), b.double(), 1e-5)
                exact = all(map(torch.equal, plain, row.reference_quantize(x, symmetric)))
                exact &= all(map(torch.equal, (q, scale, zero), row.reference_quantize(y, symmetric)))
                exact &= torch.equal(total, x + r)
                found.append({"dtype": str(dtype), "T": T, "D": D, "symmetric": symmetric, "integers exact": exact,
                              "norm error": relative(y, truth)})  # fmt: skip
    return found


def packed_a8(codes: torch.Tensor, bits: int, group: int, scale: torch.Tensor) -> list[torch.Tensor]:
    """A weight as ``a8_gemm`` takes it, in slices of 32; scale: [N], or [G, N] for groups."""
    words = codes if bits == 8 else Codes(bits).pack(codes, 32)
    if group >= codes.shape[1]:
        return [words, scale, codes.sum(1, dtype=torch.int32)]
    sums = torch.stack([part.sum(1) for part in codes.float().split(group, 1)])
    return [words, scale, (sums * scale).sum(0)]


PROGRAMS = {
    "": lambda y, y1, bias, full: y,
    "t0 = add(y0, column0); t1 = gelu(t0); t2 = add(t1, full1)": lambda y, y1, bias, full: F.gelu(y + bias) + full,
    "t0 = silu(y0); t1 = mul(t0, y1)": lambda y, y1, bias, full: F.silu(y) * y1,
}


def check_a8() -> list[dict[str, Any]]:
    """With scales of one the product is an integer, and must be the exact one; then programs against float64."""
    found = []
    shapes = ((1, 1, 1), (1, 4096, 4096), (2, 100, 256), (16, 1001, 768), (17, 96, 100), (64, 3072, 768), (65, 129, 513))
    for M, N, K in (*shapes, (1000, 2304, 768)):
        for bits, group in ((8, K), (4, K), (4, 128), (3, K), (3, 256), (2, K)):
            if K % min(group, K):
                continue
            top, i8, groups = 1 << bits - 1, dict(device="cuda", dtype=torch.int8), max(K // group, 1)
            q, w = torch.randint(-128, 128, (M, K), **i8), torch.randint(-top, top, (N, K), **i8)
            zero = torch.randint(-128, 128, (M, 1), device="cuda", dtype=torch.int32)
            one, scale = torch.ones(M, 1, device="cuda"), torch.ones((groups, N) if groups > 1 else (N,), device="cuda")
            size = group if groups > 1 else gemm.ONE_GROUP
            weight, truth = packed_a8(w, bits, size, scale), (q.double() - zero) @ w.double().T
            y = gemm.a8_gemm(q, one, zero, weight, [], "", bits, size, 32)
            scale_x, full = torch.rand(M, 1, device="cuda") / K, torch.randn(M, N, device="cuda")
            bias = torch.randn(N, device="cuda")
            errors = {}
            for program, meaning in PROGRAMS.items():
                inputs, pair = [bias, full] if "full1" in program else [], 2 if "y1" in program else 1
                ours = gemm.a8_gemm(q, scale_x, zero, weight * pair, inputs, program, bits, size, 32)
                t = truth * scale_x.double()
                errors[program] = relative(ours, meaning(t, t, bias.double(), full.double()))
            found.append({"M": M, "N": N, "K": K, "bits": bits, "group": group, "integers exact": torch.equal(y, truth.float()),
                          "errors": errors})  # fmt: skip
    return found


PERSISTENT = tuple(Tile(bm, bn, 128, 8, stages, persistent=1) for bm, bn, stages in ((128, 128, 2), (128, 64, 2), (64, 128, 3)))


def check_persistent() -> list[dict[str, Any]]:
    """The persistent int8 products: exact integers and, for each program, the bits of the plain kernel with the same tile."""
    found = []
    on = launch.device()
    for M, N, K in ((1, 1, 1), (513, 1001, 768), (1000, 2304, 96), (4096, 4096, 4096)):
        q, w = (torch.randint(-128, 128, (rows, K), device="cuda", dtype=torch.int8) for rows in (M, N))
        zero, bias = torch.randint(-128, 128, (M, 1), device="cuda", dtype=torch.int32), torch.randn(N, device="cuda")
        weight, full = packed_a8(w, 8, gemm.ONE_GROUP, torch.ones(N, device="cuda")), torch.randn(M, N, device="cuda")
        scale_x, one = torch.rand(M, 1, device="cuda") / K, torch.ones(M, 1, device="cuda")
        truth = ((q.double() - zero) @ w.double().T).float()
        for tile in PERSISTENT:

            def product(tile: Tile, scale: torch.Tensor, program: str) -> torch.Tensor:
                inputs, pair = [bias, full] if "full1" in program else [], 2 if "y1" in program else 1  # noqa: B023
                end = (program, 8, gemm.ONE_GROUP, 32, torch.float32, tile, 1)
                return gemm.launch_a8(q, scale, zero, weight * pair, inputs, *end)  # noqa: B023

            for program in PROGRAMS:
                pair = 2 if "y1" in program else 1
                if pair * tile.bm * tile.bn > 128 * 128 or Problem(M, N, K, 8, products=pair).shared(tile) > on.shared:
                    continue
                exact = torch.equal(product(tile, one, ""), truth)
                ours, plain = product(tile, scale_x, program), product(replace(tile, persistent=0), scale_x, program)
                found.append({"M": M, "N": N, "K": K, "tile": str(tile), "program": program,
                              "integers exact": exact and torch.equal(ours, plain)})  # fmt: skip
    return found


def check_a16() -> list[dict[str, Any]]:
    """Small integers and powers of two, for which the answer is exact in any order; then ordinary numbers against float64."""
    found = []
    shapes = ((1, 4096, 4096, 128), (9, 35, 260, 128), (16, 96, 512, 64), (33, 130, 1000, 1 << 30), (70, 64, 256, 256))
    for dtype in (torch.float16, torch.bfloat16):
        for bits, shifted in ((4, False), (4, True), (8, False), (8, True)):
            for M, N, K, group in shapes:
                groups, top = -(K // -group), 1 << bits
                codes = torch.randint(0, top, (N, K), device="cuda") - (0 if shifted else top // 2)
                codes = codes.to(torch.uint8 if shifted else torch.int8)
                scale = 2.0 ** torch.randint(-3, 1, (groups, N), device="cuda")
                zero = torch.randint(0, top, (groups, N), device="cuda", dtype=torch.int32) if shifted else None
                packed = [Codes(bits, 16, not shifted).pack(codes, 64), scale, *([] if zero is None else [zero])]
                group_of_k = torch.arange(K, device="cuda") // group
                weight = (codes.double() - (0 if zero is None else zero.double()[group_of_k].T)) * scale.double()[group_of_k].T
                x = torch.zeros(M, K, device="cuda", dtype=dtype)
                x[:, torch.randperm(K, device="cuda")[:8]] = 1  # so few that the sums are exact in 16 bits up to a rounding
                y = gemm.a16_gemm(x, packed, [], "", shifted, bits, group)
                exact = torch.equal(y, (x.double() @ weight.T).float().to(dtype))
                x = torch.randn(M, K, device="cuda").to(dtype)
                error = relative(gemm.a16_gemm(x, packed, [], "", shifted, bits, group), x.double() @ weight.T)
                found.append({"dtype": str(dtype), "bits": bits, "zero points": shifted, "M": M, "N": N, "K": K, "group": group,
                              "integers exact": exact, "error": error})  # fmt: skip
    return found


def attention_operands(B: int, H: int, G: int, L: int, T: int, D: int, E: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Codes, values and scales, token by token as projections leave them; scores have a deviation of about 3."""
    i8 = dict(device="cuda", dtype=torch.int8)
    q, k = (torch.randint(-127, 128, (B, n, h, D), **i8).transpose(1, 2) for n, h in ((L, H), (T, G)))
    v = torch.randn(B, T, G, E, device="cuda", dtype=dtype).transpose(1, 2)
    return q, k, v, torch.rand(B, H, L, device="cuda") * 0.05, torch.rand(B, G, T, device="cuda") * 0.05


def check_attention() -> list[dict[str, Any]]:
    """Against float64. With one key that is seen the answer is its value, exactly: a wrong index or mask is no small error."""
    found = []
    square, few = ((1, 4, 4, 128, 128, 64, 64), (1, 2, 1, 1024, 1024, 128, 128)), (1, 4, 1, 1, 1000, 80, 96)
    for dtype in (torch.float16, torch.bfloat16):
        for B, H, G, L, T, D, E in (*square, few, (2, 8, 2, 100, 333, 128, 128), (1, 2, 2, 70, 70, 256, 16)):
            for kind in ("none", "keys", "bool", "float", "causal"):
                operands = attention_operands(B, H, G, L, T, D, E, dtype)
                q, k, v, scale_q, scale_k = operands
                rows = 1 if kind == "keys" else L
                mask = None if kind in ("none", "causal") else torch.rand(B, 1, rows, T, device="cuda") > 0.5
                if kind == "float":
                    mask = torch.randn(B, 1, L, T, device="cuda", dtype=dtype)
                y = attention.int8_attention(*operands, mask, kind == "causal")
                wide = [t.double() for t in (q * scale_q[..., None].double(), k * scale_k[..., None].double(), v)]
                wide[1:] = [t.repeat_interleave(H // G, 1) for t in wide[1:]]
                scores = wide[0] @ wide[1].mT / D**0.5
                if kind == "causal":
                    scores = scores.masked_fill(~torch.ones(L, T, device="cuda", dtype=torch.bool).tril(), -torch.inf)
                elif mask is not None:
                    scores = scores + mask if kind == "float" else scores.masked_fill(~mask, -torch.inf)
                truth = torch.ops.aten._safe_softmax(scores, -1) @ wide[2]
                one = torch.randint(0, T, (L,), device="cuda")
                alone = torch.zeros(L, T, device="cuda", dtype=torch.bool).scatter_(1, one[:, None], True)
                exact = torch.equal(attention.int8_attention(*operands, alone), v.repeat_interleave(H // G, 1)[:, :, one])
                found.append({"dtype": str(dtype), "B, H, G, L, T, D, Dv": [B, H, G, L, T, D, E], "mask": kind,
                              "integers exact": exact, "error": relative(y, truth)})  # fmt: skip
    return found


def check_compiled() -> list[dict[str, Any]]:
    """The same ops inside torch.compile, which inlines the kernels: two token counts, one of them never compiled for."""
    w = torch.randint(-127, 128, (3072, 768), device="cuda", dtype=torch.int8)
    scale, sums = torch.rand(3072, device="cuda") / 1000, w.sum(1, dtype=torch.int32)

    def layer(x: torch.Tensor) -> torch.Tensor:
        q, scale_x, _, total, _ = torch.ops.fxquant.layer_norm_quantize(x * 2, x, None, None, 1e-5, True, True, False)
        y = torch.ops.fxquant.a8_gemm(q, scale_x, None, [w, scale, sums], [], "t0 = gelu(y0)", out_dtype=x.dtype)
        return y + total.sum()

    compiled = torch.compile(layer, fullgraph=True)
    found = []
    for T in (100, 200, 300, 8):
        x = torch.randn(T, 768, device="cuda", dtype=torch.bfloat16)
        found.append({"T": T, "integers exact": None, "error": relative(compiled(x), layer(x))})
    return found


def time_rows() -> list[dict[str, Any]]:
    """Residual + LayerNorm + per-token quantization beside the same in Inductor, and beside its bytes over the bandwidth."""
    found = []
    for T in (16, 512, 8192):
        for D in (768, 4096, 8192):
            bf16 = dict(device="cuda", dtype=torch.bfloat16)
            w, b = torch.randn(D, **bf16), torch.randn(D, **bf16)

            def ours(x: torch.Tensor, r: torch.Tensor) -> Any:
                return row.layer_norm_quantize(x, r, w, b, 1e-5, True, True, False)  # noqa: B023

            def plain(x: torch.Tensor, r: torch.Tensor) -> Any:
                total, y = row.reference_normalize(x, r, w, b, 1e-5, True)  # noqa: B023
                return *row.reference_quantize(y, True), total

            inductor = torch.compile(plain, dynamic=False)

            def make(f: Callable[..., Any]) -> Callable[[], Callable[[], Any]]:
                def operands() -> Callable[[], Any]:
                    x, r = torch.randn(T, D, **bf16), torch.randn(T, D, **bf16)  # noqa: B023
                    return lambda: f(x, r)

                return operands

            size = T * D * 7
            a, c = microseconds(make(ours), size), microseconds(make(inductor), size)
            found.append({"T": T, "D": D, "us": a, "inductor us": c, "ratio": c / a, "GB/s": size / a / 1e3})
    return found


def time_attention() -> list[dict[str, Any]]:
    """int8 attention alone, and with the rounding of queries and keys, beside PyTorch's fused attention in bfloat16."""
    found = []
    for L, T in ((1024, 1024), (4096, 4096), (16384, 16384), (1, 4096)):
        for D in (64, 128, 256):
            for causal in (False, True) if L == T else (False,):
                B, H, G = max(1, 4096 // T), 32, 8

                def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
                    codes = [codes_of(t, Spec(IntAffine(8), PerToken())) for t in (q, k)]
                    return attention.int8_attention(codes[0][0], codes[1][0], v, codes[0][1], codes[1][1], None, causal)  # noqa: B023

                whole = torch.compile(ours, dynamic=False)

                def make(which: str) -> Callable[[], Callable[[], Any]]:
                    def operands() -> Callable[[], Any]:
                        codes = attention_operands(B, H, G, L, T, D, D, torch.bfloat16)  # noqa: B023
                        q, k = (c.bfloat16() / 64 for c in codes[:2])
                        if which == "op":
                            return lambda: attention.int8_attention(*codes, None, causal)  # noqa: B023
                        if which == "whole":
                            return lambda: whole(q, k, codes[2])  # noqa: B023
                        attend = F.scaled_dot_product_attention
                        return lambda: attend(q, k, codes[2], is_causal=causal, enable_gqa=True)  # noqa: B023

                    return operands

                size = B * (H * L + G * T) * D * 4
                op, rounded, base = (microseconds(make(which), size) for which in ("op", "whole", "sdpa"))
                found.append({"L": L, "T": T, "D": D, "B": B, "causal": causal, "op us": op, "with rounding us": rounded,
                              "bf16 us": base, "op ratio": base / op, "ratio": base / rounded,
                              "TOP/s": 4 * B * H * L * T * D * (0.5 if causal else 1) / op / 1e6})  # fmt: skip
                torch._dynamo.reset()
    return found


def time_tiles() -> list[dict[str, Any]]:
    """How far the model of the cost is off: its ten best tiles of some products, as predicted and as they are."""
    found = []
    on = launch.device()
    for form in (dict(bits=8), dict(bits=4, width=128, group_size=128), dict(bits=4, floats=True, width=64, group_size=128)):
        for N, K in LAYERS.values():
            for M in (1, 16, 64, 4096):
                problem = Problem(M, N, K, **form)
                times = {}
                for choice in launch.ranked(problem, on)[:10]:
                    try:
                        times[choice] = tune.microseconds(problem, choice, on)
                    except Exception as error:  # a tile that does not run is a finding too
                        found.append({"problem": str(problem), "tile": repr(choice), "failed": str(error)[:200]})
                if times:
                    first, best = next(iter(times)), min(times, key=lambda choice: times[choice])
                    found.append({"problem": str(problem), "first": repr(first), "predicted us": cost(problem, first, on).total,
                                  "us": times[first], "fastest": repr(best), "its us": times[best]})  # fmt: skip
    return found


def time_persistent() -> list[dict[str, Any]]:
    """The best plain and the best persistent tile of the model's ranking, of products and pairs with many tiles."""
    found = []
    on = launch.device()
    for N, K in LAYERS.values():
        for M in (512, 2048, 4096):
            for products in (1, 2):
                problem, line = Problem(M, N, K, 8, products=products), {}
                for name, walks in (("plain", False), ("persistent", True)):
                    choices = [c for c in launch.ranked(problem, on) if (c.tile.persistent > 0) == walks][:3]
                    times = {choice: tune.microseconds(problem, choice, on) for choice in choices}
                    if times:
                        best = min(times, key=lambda choice: times[choice])
                        line |= {name: str(best.tile), f"{name} us": times[best],
                                 f"{name} predicted us": cost(problem, best, on).total}  # fmt: skip
                found.append({"problem": str(problem), **line})
    return found


def _linear(M: int, N: int, K: int) -> float:
    """Inductor's bfloat16 linear with bias, in microseconds."""
    bf16 = dict(device="cuda", dtype=torch.bfloat16)
    linear = torch.compile(F.linear, dynamic=False)

    def make() -> Callable[[], Any]:
        x, w, b = torch.randn(M, K, **bf16), torch.randn(N, K, **bf16), torch.randn(N, **bf16)
        return lambda: linear(x, w, b)

    return microseconds(make, (N * K + M * K + M * N) * 2)


def time_a8() -> list[dict[str, Any]]:
    """Products of int8 activations, alone and with the quantization of their input, beside a bfloat16 linear."""
    found = []
    for name, (N, K) in LAYERS.items():
        for M in (1, 2, 8, 16, 64, 512, 4096):
            base = _linear(M, N, K)
            for bits, group in ((8, K), (4, 128), (3, 256), (2, K)):
                width = 64 if bits == 3 else 128
                row_of_codes = torch.zeros(1, K, device="cuda", dtype=torch.int8)
                size_of_row = K if bits == 8 else Codes(bits).pack(row_of_codes, width).shape[1]  # whole blocks

                def make(whole: bool) -> Callable[[], Callable[[], Any]]:
                    def operands() -> Callable[[], Any]:
                        bf16, size = dict(device="cuda", dtype=torch.bfloat16), group if group < K else gemm.ONE_GROUP  # noqa: B023
                        x, bias = torch.randn(M, K, **bf16), torch.randn(N, **bf16)  # noqa: B023
                        words = torch.randint(-128, 128, (N, size_of_row), device="cuda", dtype=torch.int8)  # noqa: B023
                        scale = torch.rand((K // group, N) if group < K else (N,), device="cuda") / 1000  # noqa: B023
                        sums = torch.zeros(N, device="cuda", dtype=torch.float32 if group < K else torch.int32)  # noqa: B023
                        q, scale_x, _ = row.quantize_rows(x)

                        def call() -> Any:
                            codes, s, _ = row.quantize_rows(x) if whole else (q, scale_x, None)
                            weight = [words, scale, sums]
                            end = [bias], "t0 = add(y0, column0)"
                            return gemm.a8_gemm(codes, s, None, weight, *end, bits, size, width, torch.bfloat16)  # noqa: B023

                        return call

                    return operands

                size = N * K * bits // 8 + M * K * 3 + M * N * 2
                product, layer = microseconds(make(False), size), microseconds(make(True), size)
                found.append({"layer": name, "M": M, "bits": bits, "gemm us": product, "with quantization us": layer,
                              "bf16 us": base, "gemm ratio": base / product, "ratio": base / layer,
                              "TOP/s": 2 * M * N * K / product / 1e6})  # fmt: skip
    return found


def time_a16() -> list[dict[str, Any]]:
    """W4A16 in groups of 128 and W8A16 per channel beside a bfloat16 linear; the sums of x are part of the time."""
    found = []
    for name, (N, K) in LAYERS.items():
        for M in (1, 8, 16, 32, 64):
            base = _linear(M, N, K)
            for bits, group in ((4, 128), (8, K)):

                def call(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
                    return gemm.a16_gemm(x, [packed, scale], [bias], "t0 = add(y0, column0)", False, bits, group)  # noqa: B023

                compiled = torch.compile(call, dynamic=False)

                def make() -> Callable[[], Any]:
                    bf16 = dict(device="cuda", dtype=torch.bfloat16)
                    x, bias = torch.randn(M, K, **bf16), torch.randn(N, **bf16)  # noqa: B023
                    packed = torch.randint(-(1 << 15), 1 << 15, (N, K * bits // 16), device="cuda", dtype=torch.int16)  # noqa: B023
                    scale = torch.rand(-(-K // group), N, device="cuda")  # noqa: B023
                    return lambda: compiled(x, packed, scale, bias)  # noqa: B023

                size = N * K * bits // 8
                ours = microseconds(make, size)
                found.append({"layer": name, "M": M, "bits": bits, "us": ours, "bf16 us": base, "ratio": base / ours,
                              "GB/s of weights": size / ours / 1e3})  # fmt: skip
                torch._dynamo.reset()
    return found


SECTIONS: tuple[Callable[[], list[dict[str, Any]]], ...] = (
    check_rows, check_a8, check_persistent, check_a16, check_attention, check_compiled,
    time_rows, time_a8, time_persistent, time_a16, time_attention, time_tiles,
)  # fmt: skip


def main() -> int:
    """Run what is missing within the budget; 1 if a check found an integer that is not exact."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/gpu.json"))
    parser.add_argument("--budget", type=float, default=500, help="seconds after which no further section is begun")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no NVIDIA GPU here; docs/gpu.md tells what can be checked without one")
        return 0
    import triton

    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    report: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    if report.get("machine") != machine:
        report = {"machine": machine, "sections": {}}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    print(machine, flush=True)
    began = time.monotonic()
    for section in SECTIONS:
        name = section.__name__
        if name in report["sections"]:
            print(f"{name}: done before", flush=True)
            continue
        if time.monotonic() - began > options.budget:
            print(f"{name}: left for another run, the budget is spent", flush=True)
            continue
        torch.manual_seed(0)
        start = time.monotonic()
        try:
            lines = section()
        except Exception as error:  # one broken kernel must not cost the others their turn on the machine
            lines = [{"failed": f"{type(error).__name__}: {error}"[:2000]}]
        else:
            report["sections"][name] = lines
            options.out.write_text(json.dumps(report, indent=1))
        print(f"\n{name} ({time.monotonic() - start:.0f} s)", flush=True)
        for line in lines:
            print("  " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()), flush=True)
        torch.cuda.empty_cache()
    wrong = [line for lines in report["sections"].values() for line in lines if line.get("integers exact") is False]
    missing = [section.__name__ for section in SECTIONS if section.__name__ not in report["sections"]]
    print(f"\n{len(wrong)} checks with wrong integers; not done: {', '.join(missing) or 'nothing'}")
    return 1 if wrong or missing else 0


if __name__ == "__main__":
    sys.exit(main())
