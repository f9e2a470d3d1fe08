"""A small emulator of the PTX that kernels inline: straight lines of 32-bit integer and packed 16-bit float instructions.

Semantics are those of the PTX ISA, section 9.7: ``lop3`` looks up each bit in its table, ``prmt`` picks bytes of two registers
(with the sign of the byte where bit 3 of a selector is set), ``dp4a`` adds four products of bytes to a 32-bit sum.
"""

import re
from collections.abc import Callable

import torch

WORD = 0xFFFFFFFF


def lop3(a: int, b: int, c: int, table: int) -> int:
    """Bit i of the result is bit ``a_i b_i c_i`` (a first) of ``table``."""
    return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i for i in range(32))


def prmt(a: int, b: int, selector: int) -> int:
    """Four bytes out of the eight of {b, a}; a selector with bit 3 set repeats the sign of its byte."""
    octets = [(b << 32 | a) >> 8 * i & 0xFF for i in range(8)]
    found = 0
    for i in range(4):
        picked = octets[selector >> 4 * i & 7]
        if selector >> 4 * i & 8:
            picked = 0xFF if picked & 0x80 else 0
        found |= picked << 8 * i
    return found


def signed(x: int, bits: int) -> int:
    return (x & (1 << bits) - 1 ^ 1 << bits - 1) - (1 << bits - 1)


def dp4a(a: int, b: int, c: int) -> int:
    """``dp4a.s32.s32``: c plus the sum of the products of signed bytes, modulo 2**32."""
    return (c + sum(signed(a >> 8 * i, 8) * signed(b >> 8 * i, 8) for i in range(4))) & WORD


def floats(x: int, dtype: torch.dtype) -> torch.Tensor:
    """The two 16-bit floats of a register, low half first."""
    return torch.tensor([x & 0xFFFF, x >> 16], dtype=torch.int32).to(torch.uint16).view(dtype).double()


def halves(x: torch.Tensor, dtype: torch.dtype) -> int:
    """The inverse of ``floats``, rounded to nearest even."""
    low, high = x.to(dtype).view(torch.uint16).to(torch.int64).tolist()
    return int(low | high << 16)


OPS: dict[str, Callable[..., int]] = {
    "mov.b32": lambda a: a,
    "shl.b32": lambda a, n: a << n & WORD if n < 32 else 0,
    "shr.b32": lambda a, n: a >> n if n < 32 else 0,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "lop3.b32": lop3,
    "prmt.b32": prmt,
    "dp4a.s32.s32": dp4a,
    "add.rn.f16x2": lambda a, b: halves(floats(a, torch.float16) + floats(b, torch.float16), torch.float16),
    "fma.rn.bf16x2": lambda a, b, c: halves(
        floats(a, torch.bfloat16) * floats(b, torch.bfloat16) + floats(c, torch.bfloat16), torch.bfloat16
    ),
}


def run(text: str, *inputs: int) -> int:
    """What ``text`` leaves in $0, given registers $1, $2, ...; a register is read only after it was declared and written."""
    return run_all(text, 1, *inputs)[0]


def run_all(text: str, outputs: int, *inputs: int) -> list[int]:
    """What ``text`` leaves in its first ``outputs`` registers, given those after them."""
    registers, results = {f"${i}": word for i, word in enumerate(inputs, outputs)}, [f"${i}" for i in range(outputs)]
    declared = set(results)

    def value(name: str) -> int:
        return int(name, 0) & WORD if name[0].isdigit() else registers[name]

    for statement in text.strip().removeprefix("{").removesuffix("}").split(";"):
        op, _, rest = statement.strip().partition(" ")
        arguments = [part.strip() for part in rest.split(",")]
        if op == ".reg":
            kind, first = arguments[0].split()
            assert kind == ".b32", statement
            declared |= {first, *arguments[1:]}
        elif op:
            assert op in OPS, f"the emulator does not know {op!r}"
            assert arguments[0] in declared and re.fullmatch(r"\$\d|[a-z]\w*", arguments[0]), statement
            registers[arguments[0]] = OPS[op](*map(value, arguments[1:]))
    return [registers[name] for name in results]
