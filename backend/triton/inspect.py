"""Compile a kernel for a GPU that is not here, and read off what it would cost: registers, spills, shared memory, instructions.

``python -m fxquant.backend.triton.inspect`` prints the table of docs/gpu.md.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from . import launch
from .language import triton

TENSOR_CORE = re.compile(r"[IH]G?MMA$")
POINTERS = {
    torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32",
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32",
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
        found = re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", self.sass)
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
        """The opcodes of the shortest loop that holds a tensor core instruction; empty if there is none."""
        bodies = []
        for start, end in self._loops():
            body = Counter(opcode for address, opcode, _ in self.instructions if start <= address <= end)
            if any(TENSOR_CORE.match(opcode.split(".")[0]) for opcode in body):
                bodies.append(body)
        return min(bodies, key=lambda body: body.total(), default=Counter())

    def _loops(self) -> Iterator[tuple[int, int]]:
        labels = dict(_label_addresses(self.sass))
        for address, opcode, rest in self.instructions:
            if opcode.split(".")[0] == "BRA":
                target = re.search(r"`\((\.L\S+?)\)", rest)
                if target and labels.get(target[1], address) < address:
                    yield labels[target[1]], address

    def per_weight(self, bits: int, weights: int) -> float:
        """Instructions that one thread issues in the loop for each weight, ``weights`` per tensor core instruction and thread."""
        products = sum(n for opcode, n in self.loop.items() if TENSOR_CORE.match(opcode.split(".")[0]))
        return self.loop.total() / (products * weights)


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


def compile_for(kernel: Any, arguments: Mapping[str, Any], capability: int, *, warps: int, stages: int) -> Inspection:
    """Compile ``kernel`` for ``capability`` (80, 89, 90) without a GPU.

    ``arguments`` names every parameter: a torch dtype stands for a pointer to it, aligned to 16 bytes; an int for an integer
    argument that is specialised as the launcher would (a multiple of 16, or not); None and constexprs for themselves.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constexprs = {p.name for p in kernel.params if p.is_constexpr}
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if name in constexprs or value is None or (value == 1 and isinstance(value, int)):
            signature[name], constants[(place,)] = "constexpr", value
        elif isinstance(value, torch.dtype):
            signature[name], attributes[(place,)] = POINTERS[value], [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    numbers = {name: int(n) for name, n in re.findall(r"(REG|STACK):(\d+)", usage)}
    return Inspection(capability, warps, built.metadata.shared, numbers["REG"], numbers["STACK"], built.asm["ptx"], sass)


def _tool(name: str, *arguments: str) -> str:
    """The output of one of the tools that Triton's wheel carries."""
    import triton.backends.nvidia

    path = Path(triton.backends.nvidia.__file__).parent / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout
