"""Several calls of the C++ kernels as one op: what PyTorch spends on a call is no small part of a product of few rows.

A *program* is text, so that it is kept on disk with the graph that holds it, or becomes a literal in Inductor's C++. It has a
sentence for each call, between semicolons: the op's name and its arguments, each a word that begins with its kind. ``%3`` is
value 3, and values are first the given tensors, then what the calls return, one after another; ``-`` is no tensor, ``[2`` a
list of the two arguments that follow. The others are ``i384``, ``b1``, ``f3ff8000000000000``, ``snone`` and ``tfloat32``: an
integer, a boolean, a number (the bits of its double, which no locale spells otherwise), a name, a dtype. The last sentence
lists the values that come out. ops.cpp runs it.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import low_bit, ops

OPS = {
    op._schema.name.removeprefix("fxquant::"): op
    for op in (
        ops.quantize_rows, ops.normalize_rows, ops.linear, ops.linear_rows, ops.linear_gated, ops.attention, ops.attend,
        low_bit.linear_u8, low_bit.linear_float, low_bit.gated_u8, low_bit.gated_float,
    )
}  # fmt: skip
"""What a program may call, by name."""


class Value(int):
    """The number of a value."""


def sentence(name: str, arguments: Sequence[Any]) -> str:
    """A sentence of a program: numbers of class ``Value`` are tensors. Raises TypeError for what no program can hold."""
    return " ".join([name, *(word for argument in arguments for word in _words(argument))])


def _words(x: Any) -> Iterator[str]:
    match x:
        case None:
            yield "-"
        case Value():
            yield f"%{int(x)}"
        case bool():
            yield f"b{int(x)}"
        case int():
            yield f"i{x}"
        case float():
            yield f"f{struct.pack('>d', x).hex()}"
        case torch.dtype():
            yield f"t{str(x).removeprefix('torch.')}"
        case str() if x.isidentifier():
            yield f"s{x}"
        case list() | tuple():
            yield f"[{len(x)}"
            for item in x:
                yield from _words(item)
        case _:
            raise TypeError(f"a program cannot hold {x!r}")


def _arguments(words: Iterator[str], values: Sequence[Tensor]) -> Iterator[Any]:
    for word in words:
        kind, rest = word[0], word[1:]
        match kind:
            case "-":
                yield None
            case "%":
                yield values[int(rest)]
            case "[":
                yield [next(_arguments(words, values)) for _ in range(int(rest))]
            case "b":
                yield rest == "1"
            case "i":
                yield int(rest)
            case "f":
                yield struct.unpack(">d", bytes.fromhex(rest))[0]
            case "t":
                yield getattr(torch, rest)
            case "s":
                yield rest
            case _:
                raise ValueError(f"{word!r} is no argument of a program")


def chain_reference(given: Sequence[Tensor], program: str) -> list[Tensor]:
    """What ``program`` means: its calls one after another. On fake tensors, too, which is how its results get their shapes."""
    values = list(given)
    *calls, last = program.split(";")
    for name, *words in map(str.split, calls):
        results = OPS[name](*_arguments(iter(words), values))
        values += [results] if isinstance(results, Tensor) else results
    return [*_arguments(iter(last.split()[1:]), values)]


_library = torch.library.Library("fxquant", "FRAGMENT")
chain = ops.declare(_library, "chain(Tensor[] given, str program) -> Tensor[]", chain_reference)
