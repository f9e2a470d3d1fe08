"""Compile a kernel for a GPU that is not here, and read off what it would cost: registers, spills, shared memory, instructions.

``python -m fxquant.backend.triton.inspect`` prints the table of docs/gpu.md; with the name of a line, its Triton text.
"""

# mypy: disable-error-code="import-untyped, import-not-found"
# Triton has no stubs, and need not be installed.
from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from . import attention, gemm, launch, row
from .codes import NF4, Codes
from .cost import LATENCY, REACHED, cost, least
from .gemv import TOKENS
from .gpus import COMPILED, Device
from .language import triton
from .program import Program, kind_of
from .recording import Launch, launches, tile_of
from .tile import Choice, Problem

PRODUCT = re.compile(r"[IH]G?MMA$|IDP$")
"""The instructions that multiply: those of the tensor cores, and dp4a."""
POINTERS = {
    torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32",
    torch.bool: "*i1", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32",
}  # fmt: skip


@dataclass(frozen=True)
class Inspection:
    """What ptxas made of one kernel for one compute capability."""

    capability: int
    warps: int
    shared: int
    registers: int
    stack: int
    ptx: str
    sass: str

    @cached_property
    def instructions(self) -> list[tuple[int, str, str]]:
        """Every machine instruction: address, full opcode (``LDG.E.128``), the rest of its line."""
        found = re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)([^;]*);", self.sass)
        return [(int(address, 16), opcode, rest) for address, opcode, rest in (match.groups() for match in found)]

    @cached_property
    def opcodes(self) -> Counter[str]:
        """How often each opcode occurs in the whole kernel, modifiers included."""
        return Counter(opcode for _, opcode, _ in self.instructions)

    def count(self, *families: str) -> int:
        """How many instructions belong to the families, e.g. ``count("LDL", "STL")``."""
        return sum(n for opcode, n in self.opcodes.items() if opcode.split(".")[0] in families)

    @property
    def spills(self) -> int:
        """Accesses to thread-local memory; the stack is in ``stack``."""
        return self.count("LDL", "STL")

    @cached_property
    def loop(self) -> Counter[str]:
        """The opcodes of one step of the shortest loop that holds an instruction of a product; empty if there is none.

        The shortest way through it: what only the first or the last step of a persistent tile does is left out.
        """
        bodies = []
        for start, end in self._loops():
            inside = {opcode.split(".")[0] for address, opcode, _ in self.instructions if start <= address <= end}
            if any(map(PRODUCT.match, inside)):
                bodies.append((start, end))
        shortest = min(bodies, key=lambda body: body[1] - body[0], default=None)
        return Counter(self._way(*shortest)) if shortest else Counter()

    def _way(self, start: int, end: int) -> Iterator[str]:
        """The opcodes on the shortest way from one address to another, which may lead by what stands elsewhere."""
        labels, always = dict(_label_addresses(self.sass)), set(_always(self.sass))
        all_of_them = {address: (opcode, rest) for address, opcode, rest in self.instructions}
        following = dict(zip(all_of_them, [*list(all_of_them)[1:], None], strict=True))
        before: dict[int, int | None] = {start: None}
        queue = deque([start])
        while end not in before:
            address = queue.popleft()
            opcode, rest = all_of_them[address]
            target = re.search(r"`\((\.L\S+?)\)", rest) if opcode.split(".")[0] == "BRA" else None
            for there in ((None if address in always else following[address]), labels[target[1]] if target else None):
                if there is not None and there not in before:
                    before[there] = address
                    queue.append(there)
        at: int | None = end
        while at is not None:
            yield all_of_them[at][0]
            at = before[at]

    def _loops(self) -> Iterator[tuple[int, int]]:
        labels = dict(_label_addresses(self.sass))
        for address, opcode, rest in self.instructions:
            if opcode.split(".")[0] == "BRA":
                target = re.search(r"`\((\.L\S+?)\)", rest)
                if target and labels.get(target[1], address) < address:
                    yield labels[target[1]], address

    def per_weight(self, tokens: int) -> float:
        """Instructions that one thread issues in the loop per weight, of a kernel with the weight on the left of ``tokens``.

        One HGMMA takes 64 x 16 weights from the 128 threads of a warp group, one HMMA 16 x 16 from 32 for each 8 tokens: 8 per
        thread either way; an eight-bit product twice that. A dp4a takes 4 weights, for each token again.
        """
        weights = 0.0
        for opcode, n in self.loop.items():
            family = opcode.split(".")[0]
            if family == "IDP":
                weights += n * 4 / tokens
            elif PRODUCT.match(family):
                weights += n * (16 if "I" in family else 8) / (1 if "G" in family else max(tokens, 8) / 8)
        return self.loop.total() / weights


def _always(sass: str) -> Iterator[int]:
    """The addresses of branches that are always taken: no predicate, and no ``BRA.U UP0`` or ``BRA.DIV``."""
    for address in re.findall(r"/\*([0-9a-f]{4,})\*/\s+BRA\s+`\(", sass):
        yield int(address, 16)


def _label_addresses(sass: str) -> Iterator[tuple[str, int]]:
    """Each label of a listing with the address of the instruction that follows it."""
    waiting: list[str] = []
    for line in sass.splitlines():
        label = re.match(r"\s*(\.L\S+):", line)
        address = re.search(r"/\*([0-9a-f]{4,})\*/", line)
        if label:
            waiting.append(label[1])
        elif address and waiting:
            yield from ((name, int(address[1], 16)) for name in waiting)
            waiting = []


def compile_for(asked: Launch, capability: int) -> Inspection:
    """Compile the kernel of ``asked`` for ``capability`` (80, 89, 90) as its launch would, without a GPU.

    Integers are specialised as the launcher does (1, a multiple of 16), and tensors start at multiples of 16 bytes.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = asked.kernel
    constexprs = {p.name for p in kernel.params if p.is_constexpr}
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = asked.arguments[name]
        if name in constexprs or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(place,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(place,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": asked.warps, "num_stages": asked.stages, "enable_fp_fusion": True}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    numbers = {name: int(n) for name, n in re.findall(r"(REG|STACK):(\d+)", usage)}
    return Inspection(capability, asked.warps, built.metadata.shared, numbers["REG"], numbers["STACK"], built.asm["ptx"], sass)


def _tool(name: str, *arguments: str) -> str:
    """The output of one of the tools that Triton's wheel carries."""
    import triton.backends.nvidia

    path = Path(triton.backends.nvidia.__file__).parent / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Case:
    """One line of the table: an op on fake tensors; ``tokens`` on the narrow side of a weight-only product; which kernels."""

    name: str
    run: Callable[[], object]
    tokens: int | None = None
    dp4a: bool = False
    persistent: bool = False

    def asked(self, on: Device) -> list[Launch]:
        """Its launches on ``on`` with the tile that the model of the cost ranks first, of those of its kind."""
        kind = self.dp4a, self.persistent

        def choose(problem: Problem, on: Device) -> Choice:
            found = launch.ranked(problem, on)
            return next(c for c in found if (c.tile.bm in TOKENS, c.tile.persistent > 0) == kind)

        with FakeTensorMode():
            return launches(self.run, on, choose)

    def inspect(self, on: Device) -> Inspection:
        """Compile its first launch for ``on``; the second, if any, adds up the parts of a split K."""
        return compile_for(self.asked(on)[0], on.capability)

    def predicted(self, on: Device, seen: Inspection) -> tuple[float | None, float, str]:
        """Microseconds that it should take on ``on`` by ``cost.py``, those of the roofline, and what it would wait for.

        Of attention the roofline alone, to which exponentials count: 16 in a clock of a processor.
        """
        asked = self.asked(on)[0]
        if asked.problem is not None and asked.choice is not None:
            found = cost(asked.problem, asked.choice, on)
            return found.total, least(asked.problem, on), found.bound
        tensors = [t for t in asked.arguments.values() if isinstance(t, torch.Tensor)]
        memory = sum(t.numel() * t.element_size() for t in tensors) / on.bandwidth / 1e3
        if "WIDTH_V" in asked.arguments:
            memory = sum(t.untyped_storage().nbytes() for t in tensors) / on.bandwidth / 1e3  # a broadcast mask counts once
            bounds = attention.bounds(asked.arguments | {"kernel": asked.kernel.__name__}, on) | {"memory": memory}
            slowest = max(bounds, key=lambda name: bounds[name])
            return None, bounds[slowest], slowest
        issue = seen.opcodes.total() * asked.warps * asked.grid[0] / 4 / on.processors / on.clock / 1e3
        return max(memory / REACHED, issue) + LATENCY, memory, "memory" if memory / REACHED > issue else "issue"


def _fake(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def rows_case(D: int, norm: bool, symmetric: bool = True, dtype: torch.dtype = torch.bfloat16) -> Callable[[], object]:
    """4096 rows of D, quantized, or with the residual and LayerNorm in front."""

    def run() -> object:
        x, vector = _fake(4096, D, dtype=dtype), _fake(D, dtype=dtype)
        if norm:
            return row.layer_norm_quantize(x, x, vector, vector, 1e-5, symmetric, keep_sum=True)
        return row.quantize_rows(x, symmetric)

    return run


BIAS = "t0 = add(y0, column0)"
GATED = "t0 = silu(y0); t1 = mul(t0, y1)"
RESIDUAL = f"{BIAS}; t1 = add(t0, full1)"
ERF = f"{BIAS}; t1 = gelu(t0); t2 = add(t1, full1)"
CODES = f"{BIAS}; t1 = gelu_tanh(t0); t2 = mul(t1, scalar1); t3 = round(t2); t4 = maximum(t3, -127.0); t5 = minimum(t4, 127.0)"


def operands_of(program: str, M: int, N: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Fake operands for ``program``: 16-bit ones as a model has them, scalars in float32."""
    shapes = {"full": (M, N), "column": (N,), "row": (M, 1), "scalar": ()}
    kinds = [kind_of(name) for name in Program.parse(program).operands]
    return [_fake(*shapes[kind], dtype=torch.float32 if kind == "scalar" else dtype) for kind in kinds]


def a8_case(
    M: int, bits: int = 8, group_size: int = gemm.ONE_GROUP, program: str = BIAS, products: int = 1,
    dtype: torch.dtype = torch.bfloat16, N: int = 4096, K: int = 4096, width: int = 128,
) -> Callable[[], object]:  # fmt: skip
    """M tokens in int8 codes with zero points times one or two weights of N x K."""

    def run() -> object:
        words = _fake(N, K * bits // 8, dtype=torch.int8)
        if group_size < K:
            weights = [words, _fake(K // group_size, N), _fake(N)]
        else:
            weights = [words, _fake(N), _fake(N, dtype=torch.int32)]
        q, zero = _fake(M, K, dtype=torch.int8), _fake(M, 1, dtype=torch.int32)
        inputs = operands_of(program, M, N, torch.bfloat16)
        return gemm.a8_gemm(q, _fake(M, 1), zero, weights * products, inputs, program, bits, group_size, width, dtype)

    return run


def a16_case(
    M: int, bits: int, shifted: bool, group_size: int = 128, program: str = "", products: int = 1,
    dtype: torch.dtype = torch.bfloat16, width: int = 64, codebook: tuple[float, ...] = (),
) -> Callable[[], object]:  # fmt: skip
    """M tokens in 16-bit floats times one or two weights of 4096 x 4096."""

    def run() -> object:
        N = K = 4096
        scale = _fake(-(-K // group_size), N)
        packed = _fake(N, K // Codes(bits, 16).slices, dtype=torch.int16)
        weights = [packed, scale, *([scale] if shifted else [])] * products
        inputs = operands_of(program, M, N, dtype)
        x, book = _fake(M, K, dtype=dtype), list(codebook) or None
        return gemm.a16_gemm(x, weights, inputs, program, shifted, bits, group_size, width, codebook=book)

    return run


def attention_case(
    L: int, T: int, D: int, causal: bool = False, mask: tuple[int, torch.dtype] | None = None, E: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Callable[[], object]:  # fmt: skip
    """L queries of 32 heads against T keys of 8, as projections leave them; ``mask``: how many rows it has, and of what."""

    def run() -> object:
        q, k = (_fake(1, size, count, D, dtype=torch.int8).transpose(1, 2) for size, count in ((L, 32), (T, 8)))
        v = _fake(1, T, 8, E or D, dtype=dtype).transpose(1, 2)
        m = None if mask is None else _fake(1, 1, mask[0], T, dtype=mask[1])
        return attention.int8_attention(q, k, v, _fake(1, 32, L), _fake(1, 8, T), m, causal)

    return run


CASES = (
    Case("quantize rows of 4096", rows_case(4096, norm=False)),
    Case("residual + LayerNorm + quantize, 4096", rows_case(4096, norm=True)),
    Case("the same, asymmetric", rows_case(4096, norm=True, symmetric=False)),
    Case("residual + LayerNorm + quantize, 384", rows_case(384, norm=True)),
    Case("W8A8, M = 4096, bias, erf GELU, residual", a8_case(4096, program=ERF)),
    Case("W8A8, M = 4096, bias, residual", a8_case(4096, program=RESIDUAL)),
    Case("W8A8, M = 4096, gated pair", a8_case(4096, program=GATED, products=2)),
    Case("W8A8, M = 4096, tanh GELU, int8 codes out", a8_case(4096, program=CODES, dtype=torch.int8)),
    Case("W8A8, M = 4096, bias, erf GELU, residual, persistent", a8_case(4096, program=ERF), persistent=True),
    Case("W8A8, M = 4096, bias, residual, persistent", a8_case(4096, program=RESIDUAL), persistent=True),
    Case("W8A8, M = 4096, gated pair, persistent", a8_case(4096, program=GATED, products=2), persistent=True),
    Case("W8A8, M = 4096, tanh GELU, int8 codes out, persistent", a8_case(4096, program=CODES, dtype=torch.int8),
         persistent=True),
    Case("W8A8, M = 64, gated pair", a8_case(64, program=GATED, products=2)),
    Case("W8A8, M = 16", a8_case(16)),
    Case("W8A8, M = 1, dp4a", a8_case(1), 1, dp4a=True),
    Case("W4A8 g128, M = 1, dp4a", a8_case(1, 4, 128), 1, dp4a=True),
    Case("W4A8 g128, M = 2, dp4a, gated pair", a8_case(2, 4, 128, GATED, 2), 2, dp4a=True),
    Case("W3A8 g128, M = 1, dp4a", a8_case(1, 3, 128, width=64), 1, dp4a=True),
    Case("W2A8, M = 1, dp4a", a8_case(1, 2), 1, dp4a=True),
    Case("W4A8 g128, M = 8", a8_case(8, 4, 128), 8),
    Case("W4A8 g128, M = 16", a8_case(16, 4, 128), 16),
    Case("W4A8 g128, M = 16, gated pair", a8_case(16, 4, 128, GATED, 2), 16),
    Case("W4A8 g128, M = 64", a8_case(64, 4, 128)),
    Case("W4A8 g128, M = 4096", a8_case(4096, 4, 128)),
    Case("W3A8 g128, M = 8", a8_case(8, 3, 128, width=64), 8),
    Case("W3A8, M = 16", a8_case(16, 3, width=64), 16),
    Case("W2A8, M = 8", a8_case(8, 2), 8),
    Case("W2A8, M = 16", a8_case(16, 2), 16),
    Case("W2A8, M = 4096", a8_case(4096, 2)),
    Case("W4A16 g128, M = 8", a16_case(8, 4, shifted=False), 8),
    Case("W4A16 g128 with zero points, M = 8", a16_case(8, 4, shifted=True), 8),
    Case("W4A16 g128, M = 16", a16_case(16, 4, shifted=False), 16),
    Case("W4A16 g128, M = 16, float16", a16_case(16, 4, shifted=False, dtype=torch.float16), 16),
    Case("W4A16 g128, M = 16, gated pair", a16_case(16, 4, shifted=True, program=GATED, products=2), 16),
    Case("W4A16 g128, M = 32", a16_case(32, 4, shifted=False), 32),
    Case("W4A16 g128, M = 64", a16_case(64, 4, shifted=True)),
    Case("W4A16 NF4 g64, M = 8", a16_case(8, 4, shifted=False, group_size=64, codebook=NF4), 8),
    Case("W4A16 NF4 g64, M = 16", a16_case(16, 4, shifted=False, group_size=64, codebook=NF4), 16),
    Case("W8A16, M = 16", a16_case(16, 8, shifted=False, group_size=4096), 16),
    Case("int8 attention, 4096 x 4096, D = 128", attention_case(4096, 4096, 128)),
    Case("int8 attention, 4096 x 4096, D = 128, causal", attention_case(4096, 4096, 128, causal=True)),
    Case("int8 attention, 4096 x 4096, D = 64", attention_case(4096, 4096, 64)),
    Case("int8 attention, 4096 x 4096, D = 64, mask", attention_case(4096, 4096, 64, mask=(4096, torch.bool))),
    Case("int8 attention, 4096 x 4096, D = 256", attention_case(4096, 4096, 256)),
    Case("int8 attention, 4095 x 4095, D = 80, mask of keys", attention_case(4095, 4095, 80, mask=(1, torch.bool))),
    Case("int8 attention, 1 x 4096, D = 128", attention_case(1, 4096, 128)),
)


def main() -> None:
    """Print the table, a line for each case and compute capability; given the name of a case, its kernels instead."""
    for case in CASES:
        if sys.argv[1:] == [case.name]:
            print("\n".join(asked.kernel.src for asked in case.asked(COMPILED[-1])))
            return
    columns = (
        "kernel", "sm", "tile", "registers", "stack", "shared, bytes", "instructions", "in the loop", "products in the loop",
        "instructions per weight", "predicted, us", "roofline, us", "waits for",
    )  # fmt: skip
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for case in CASES:
        for on in COMPILED:
            seen = case.inspect(on)
            products = ", ".join(f"{n} {op}" for op, n in seen.loop.items() if PRODUCT.match(op.split(".")[0]))
            share = f"{seen.per_weight(case.tokens):.2f}" if case.tokens else ""
            time, bound, reason = case.predicted(on, seen)
            cells = (
                case.name, on.capability, tile_of(case.asked(on)[0]), seen.registers, seen.stack, seen.shared,
                seen.opcodes.total(), seen.loop.total() or "", products, share, "" if time is None else f"{time:.1f}",
                f"{bound:.1f}", reason,
            )  # fmt: skip
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
