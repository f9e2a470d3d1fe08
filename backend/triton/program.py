"""What a matrix product still does in registers before it stores, as a text: ``t0 = add(y0, column0); t1 = silu(t0)``.

``y0`` (and ``y1`` of a gated pair) are the products in float32, ``full0`` an [M, N] operand, ``column0`` one number for each
output [N], ``row0`` one for each token [M, 1], ``scalar0`` one for all []; the digits number the operands in one row. Each step
names one op of OPS; the last one is the result, and no step at all is ``y0``. Everything is float32 and rounded once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .language import KernelError

KINDS = ("full", "column", "row", "scalar")


@dataclass(frozen=True)
class Op:
    """One op: its meaning, and how it is spelled in Triton; ``{0}`` and ``{1}`` are names or numbers, never expressions."""

    meaning: Callable[..., Tensor]
    triton: str


ROUND = (
    "tl.where(tl.abs({0}) < 4194304.0, "
    "(tl.minimum(tl.maximum({0}, -4194304.0), 4194304.0) + 12582912.0) - 12582912.0, {0})"
)
"""Adding 1.5 * 2**23 leaves the nearest integer, halves to even; the clamp keeps a product from fusing with the addition."""

TANH = (
    "tl.where(tl.abs({0}) < 0.04, {0} * (1.0 - {0} * {0} * 0.3333333333333333), "
    "tl.where({0} < 0.0, -1.0, 1.0) * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * tl.abs({0})))))"
)
"""``1 - 2 / (1 + exp 2z)`` loses its leading digits near 0, where two terms of the series have them."""

OPS: dict[str, Op] = {
    "add": Op(lambda a, b: a + b, "{0} + {1}"),
    "sub": Op(lambda a, b: a - b, "{0} - {1}"),
    "mul": Op(lambda a, b: a * b, "{0} * {1}"),
    "div": Op(lambda a, b: a / b, "{0} / {1}"),
    "maximum": Op(
        lambda a, b: torch.maximum(torch.as_tensor(a, dtype=torch.float32), torch.as_tensor(b, dtype=torch.float32)),
        "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    ),
    "minimum": Op(
        lambda a, b: torch.minimum(torch.as_tensor(a, dtype=torch.float32), torch.as_tensor(b, dtype=torch.float32)),
        "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    ),
    "neg": Op(torch.neg, "-{0}"),
    "abs": Op(torch.abs, "tl.abs({0})"),
    "square": Op(torch.square, "{0} * {0}"),
    "cube": Op(lambda a: a * a * a, "{0} * {0} * {0}"),
    "reciprocal": Op(torch.reciprocal, "1.0 / {0}"),
    "sqrt": Op(torch.sqrt, "tl.sqrt({0})"),
    "rsqrt": Op(torch.rsqrt, "tl.rsqrt({0})"),
    "exp": Op(torch.exp, "tl.exp({0})"),
    "erf": Op(torch.erf, "tl.erf({0})"),
    "tanh": Op(torch.tanh, TANH),
    "sigmoid": Op(torch.sigmoid, "1.0 / (1.0 + tl.exp(-{0}))"),
    "round": Op(torch.round, ROUND),
    "relu": Op(F.relu, "tl.maximum({0}, 0.0, propagate_nan=tl.PropagateNan.ALL)"),
    "gelu": Op(F.gelu, "0.5 * {0} * (1.0 + tl.erf({0} * 0.7071067811865476))"),
    # 0.5 (1 + tanh z) == sigmoid(2 z): one exponential, and no cancellation where tanh is near -1
    "gelu_tanh": Op(
        lambda a: F.gelu(a, approximate="tanh"),
        "{0} / (1.0 + tl.exp(-1.5957691216057308 * {0} * (1.0 + 0.044715 * {0} * {0})))",
    ),
    "silu": Op(F.silu, "{0} / (1.0 + tl.exp(-{0}))"),
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """``name = op(*args)``; an argument is a name or the repr of a number."""

    name: str
    op: str
    args: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} = {self.op}({', '.join(self.args)})"


@dataclass(frozen=True)
class Program:
    """The steps of an epilogue; ``str`` writes them and ``parse`` reads them back."""

    steps: tuple[Step, ...] = ()

    def __str__(self) -> str:
        return "; ".join(map(str, self.steps))

    @staticmethod
    def parse(text: str) -> Program:
        """The Program that ``text`` spells; raises KernelError for what is none."""
        steps = []
        for part in filter(None, (part.strip() for part in text.split(";"))):
            read = re.fullmatch(r"(t\d+) = (\w+)\(([^()]*)\)", part)
            if read is None or read[2] not in OPS:
                raise KernelError(f"{part!r} is no step of an epilogue; 't0 = gelu(y0)' is one, with an op of {', '.join(OPS)}")
            steps.append(Step(read[1], read[2], tuple(a.strip() for a in read[3].split(","))))
        return Program(tuple(steps))

    @property
    def result(self) -> str:
        """The name of the result."""
        return self.steps[-1].name if self.steps else "y0"

    @property
    def operands(self) -> tuple[str, ...]:
        """The operands that it reads, in the order of their numbers."""
        names = {a for step in self.steps for a in step.args if kind_of(a) in KINDS}
        return tuple(sorted(names, key=number_of))

    def renamed(self, names: Mapping[str, str]) -> Program:
        """With the names in ``names`` replaced, those of steps too."""
        return Program(
            tuple(Step(names.get(s.name, s.name), s.op, tuple(names.get(a, a) for a in s.args)) for s in self.steps)
        )

    def printed(self) -> list[str]:
        """Lines of Triton, one for each step."""
        return [f"{s.name} = {OPS[s.op].triton.format(*s.args)}" for s in self.steps]


def kind_of(name: str) -> str:
    """``column`` of ``column3``; of a number, nothing."""
    return name.rstrip("0123456789") if name[:1].isalpha() else ""


def number_of(name: str) -> int:
    """3 of ``column3``."""
    return int(name[len(kind_of(name)) :])


def evaluate(text: str, products: Sequence[Tensor], inputs: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The meaning: the result for ``products`` (float32 [M, N]) and the operands ``inputs``, rounded once to ``dtype``."""
    program = Program.parse(text)
    values: dict[str, Tensor] = {f"y{i}": y for i, y in enumerate(products)}
    values |= {name: inputs[number_of(name)].float() for name in program.operands}
    for step in program.steps:
        values[step.name] = OPS[step.op].meaning(*(values[a] if a in values else float(a) for a in step.args))
    return values[program.result].expand(products[0].shape).to(dtype)
