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
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fxquant.backend.triton import int8_gemm, row, weight_only

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


def check_int8() -> list[dict[str, Any]]:
    """With scales of one the product is an integer, and must be the exact one; then the whole epilogue against float64."""
    found = []
    shapes = ((1, 1, 1), (1, 4096, 4096), (16, 1001, 768), (17, 96, 100), (64, 3072, 768), (65, 129, 513), (1000, 2304, 768))
    for M, N, K in shapes:
        x = torch.randint(-128, 128, (M, K), device="cuda", dtype=torch.int8)
        w = torch.randint(-128, 128, (N, K), device="cuda", dtype=torch.int8)
        zero = torch.randint(-128, 128, (M, 1), device="cuda", dtype=torch.int32)
        total = w.sum(1, dtype=torch.int32)
        truth = (x.double() - zero) @ w.double().T
        ones = torch.ones(M, 1, device="cuda"), torch.ones(N, device="cuda")
        exact = torch.equal(int8_gemm.int8_gemm(x, w, ones[0], zero, ones[1], total), truth.float())
        scale_x, scale_w = torch.rand(M, 1, device="cuda") / K, torch.rand(N, device="cuda") / 64
        bias, residual = torch.randn(N, device="cuda"), torch.randn(M, N, device="cuda")
        errors = {}
        for activation in ("none", "relu", "gelu", "gelu_tanh", "silu"):
            y = int8_gemm.int8_gemm(x, w, scale_x, zero, scale_w, total, bias, activation, residual)
            t = truth * (scale_x.double() * scale_w.double()) + bias.double()
            act = {"none": lambda t: t, "relu": F.relu, "gelu": F.gelu, "silu": F.silu,
                   "gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}[activation]  # fmt: skip
            errors[activation] = relative(y, act(t) + residual.double())
        found.append({"M": M, "N": N, "K": K, "integers exact": exact, "epilogue error": errors})
    return found


def check_weight_only() -> list[dict[str, Any]]:
    """Small integers and powers of two, for which the answer is exact in any order; then ordinary numbers against float64."""
    found = []
    shapes = ((1, 4096, 4096, 128), (9, 35, 260, 128), (16, 96, 512, 64), (33, 130, 1000, 1 << 30), (70, 64, 256, 256))
    for dtype in (torch.float16, torch.bfloat16):
        for bits, shifted in ((4, False), (4, True), (8, False), (8, True)):
            for M, N, K, group in shapes:
                groups = -(-K // group)
                low = 0 if shifted else -(1 << bits - 1)
                codes = torch.randint(low, low + (1 << bits), (N, K), device="cuda").to(torch.uint8 if shifted else torch.int8)
                zero = torch.randint(0, 1 << bits, (groups, N), device="cuda", dtype=torch.int32) if shifted else None
                scale = 2.0 ** torch.randint(-3, 1, (groups, N), device="cuda")
                op = weight_only.w4a16_gemm if bits == 4 else weight_only.w8a16_gemm
                packed = weight_only.pack_weight(codes, bits, 64)
                group_of_k = torch.arange(K, device="cuda") // group
                weight = (codes.double() - (0 if zero is None else zero.double()[group_of_k].T)) * scale.double()[group_of_k].T
                x = torch.zeros(M, K, device="cuda", dtype=dtype)
                x[:, torch.randperm(K, device="cuda")[:8]] = 1  # so few that the sums are exact in 16 bits up to a rounding
                exact = torch.equal(op(x, packed, scale, zero, None, group), (x.double() @ weight.T).float().to(dtype))
                x = torch.randn(M, K, device="cuda").to(dtype)
                error = relative(op(x, packed, scale, zero, None, group), x.double() @ weight.T)
                found.append({"dtype": str(dtype), "bits": bits, "zero points": shifted, "M": M, "N": N, "K": K, "group": group,
                              "integers exact": exact, "error": error})  # fmt: skip
    return found


def check_compiled() -> list[dict[str, Any]]:
    """The same ops inside torch.compile, which inlines the kernels: two token counts, one of them never compiled for."""
    w = torch.randint(-127, 128, (3072, 768), device="cuda", dtype=torch.int8)
    scale = torch.rand(3072, device="cuda") / 1000

    def layer(x: torch.Tensor) -> torch.Tensor:
        q, scale_x, _, total, _ = torch.ops.fxquant.layer_norm_quantize(x * 2, x, None, None, 1e-5, True, True, False)
        y = torch.ops.fxquant.int8_gemm(q, w, scale_x, None, scale, None, None, "gelu", None, x.dtype)
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


def _linear(M: int, N: int, K: int) -> float:
    """Inductor's bfloat16 linear with bias, in microseconds."""
    bf16 = dict(device="cuda", dtype=torch.bfloat16)
    linear = torch.compile(F.linear, dynamic=False)

    def make() -> Callable[[], Any]:
        x, w, b = torch.randn(M, K, **bf16), torch.randn(N, K, **bf16), torch.randn(N, **bf16)
        return lambda: linear(x, w, b)

    return microseconds(make, (N * K + M * K + M * N) * 2)


def time_int8() -> list[dict[str, Any]]:
    """int8 with per-token quantization of its input, beside a bfloat16 linear."""
    found = []
    for name, (N, K) in LAYERS.items():
        for M in (1, 16, 64, 512, 4096):
            bf16 = dict(device="cuda", dtype=torch.bfloat16)

            def make(whole: bool) -> Callable[[], Callable[[], Any]]:
                def operands() -> Callable[[], Any]:
                    x, w = torch.randn(M, K, **bf16), torch.randint(-127, 128, (N, K), device="cuda", dtype=torch.int8)  # noqa: B023
                    scale, bias = torch.rand(N, device="cuda") / 1000, torch.randn(N, **bf16)  # noqa: B023
                    q, scale_x, _ = row.quantize_rows(x)

                    def call() -> Any:
                        codes, s, _ = row.quantize_rows(x) if whole else (q, scale_x, None)
                        return int8_gemm.int8_gemm(codes, w, s, None, scale, None, bias, "none", None, torch.bfloat16)

                    return call

                return operands

            size = N * K + M * K * 3 + M * N * 2
            gemm, layer, base = microseconds(make(False), size), microseconds(make(True), size), _linear(M, N, K)
            found.append({"layer": name, "M": M, "gemm us": gemm, "with quantization us": layer, "bf16 us": base,
                          "gemm ratio": base / gemm, "ratio": base / layer, "TOP/s": 2 * M * N * K / gemm / 1e6})  # fmt: skip
    return found


def time_weight_only() -> list[dict[str, Any]]:
    """W4A16 in groups of 128 and W8A16 per channel beside a bfloat16 linear; the sums of x are part of the time."""
    found = []
    for name, (N, K) in LAYERS.items():
        for M in (1, 8, 16, 32, 64):
            base = _linear(M, N, K)
            for bits, group in ((4, 128), (8, K)):
                op = weight_only.w4a16_gemm if bits == 4 else weight_only.w8a16_gemm

                def call(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
                    return op(x, packed, scale, None, bias, group)  # noqa: B023

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
    check_rows, check_int8, check_weight_only, check_compiled, time_rows, time_int8, time_weight_only,
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
