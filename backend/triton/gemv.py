"""One or two tokens: no tensor core, four products of bytes in an instruction (dp4a), every word of the weight read once.

The words are those of ``codes.py``, read as int32: what lifts four codes in a register of bytes lifts them here too, and a
slice meets the same columns of the activations. A lane keeps its own sum; lanes are added up at the end, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from .codes import Codes, lifting
from .program import Program, kind_of
from .source import Form, assembly, ending, function, over

TOKENS = (1, 2)
"""For how many tokens there is a kernel; more are cheaper on the tensor cores."""


def write_gemv(form: Form) -> str:
    """The kernel for BM = 1 or 2 tokens: int8 activations, any codes, one product or a pair."""
    P, slices = range(form.products), form.codes.slices if form.codes else 1
    names = ["x", *(f"w{i}" for i in P), "scale_x", *(["zero_x"] if form.zero_x else [])]
    names += [f"{name}{i}" for i in P for name in form.weights]
    operands = Program.parse(form.program).operands
    sizes = ["M", "N", "K", "stride_x", "stride_w", *(["groups"] if form.chunk else [])]
    sizes += [f"stride_{name}" for name in operands if kind_of(name) == "full"]
    kind = "int32" if form.integer else "float32"
    body = [
        "m = tl.arange(0, BM)",
        "n = tl.program_id(0) * BN + tl.arange(0, BN)",
        "n_in = n" if form.even_n else "n_in = tl.minimum(n, N - 1)",
        "k = tl.arange(0, WIDTH // 4)",
        *(f"w{i}_rows = w{i} + n_in.to(tl.int64)[:, None] * stride_w + k[None, :]" for i in P),
        *(f"acc{i}_{row} = tl.zeros((BN, WIDTH // 4), dtype=tl.{kind})" for i in P for row in range(form.tokens)),
        f"for step in range(0, tl.cdiv(K, {slices} * WIDTH)):",
        *("    " + line for line in _block(form, form.codes)),
    ]
    for i in P:
        sums = [f"tl.sum(acc{i}_{row}, 1)[None, :]" for row in range(form.tokens)]
        body.append(f"acc{i} = {sums[0]}" if len(sums) == 1 else f"acc{i} = tl.where(m[:, None] == 0, {sums[0]}, {sums[1]})")
    body += ending(replace(form, even_m=True))
    return function("gemv_" + form.name, [*names, *operands, "out"], [*sizes, "stride_out"], ["BM", "BN", "WIDTH"], body)


def _rows(form: Form) -> range:
    return range(form.tokens)


def _block(form: Form, codes: Codes | None) -> Iterator[str]:
    P, words = range(form.products), codes.words if codes else 1
    into = "product" if form.chunk else "acc"
    for i in P:
        for tile in range(words):
            at = f"(step * {words} + {tile})" if words > 1 else "step"
            mask = "" if form.even_k or codes else ", mask=k[None, :] < K // 4 - step * (WIDTH // 4), other=0"
            yield f"words{i}_{tile} = tl.load(w{i}_rows + {at} * (WIDTH // 4){mask})"
    slices = codes.slices if codes else 1
    for j in range(slices):
        if form.chunk and j % form.chunk == 0:
            for i in P:
                yield from (f"product{i}_{row} = tl.zeros((BN, WIDTH // 4), dtype=tl.int32)" for row in range(form.tokens))
        yield f"base = (step * {slices} + {j}) * (WIDTH // 4)" if slices > 1 else "base = step * (WIDTH // 4)"
        for row in range(form.tokens):
            far = f" + {row} * stride_x" if row else ""
            mask = "" if form.even_k else ", mask=k < K // 4 - base, other=0"
            yield f"x_{row} = tl.load(x{far} + base + k{mask})[None, :]"
        for i in P:
            lifted = f"words{i}_0"
            if codes:
                lifted = f"lifted{i}"
                yield from _lift(form, lifted, i, codes.moves(j))
            for row in range(form.tokens):
                yield from _dp4a(form, f"{into}{i}_{row}", lifted, f"x_{row}")
        if codes and form.chunk and (j + 1) % form.chunk == 0:
            yield f"chunk = step * {slices // form.chunk} + {j // form.chunk}"
            yield f"here = tl.minimum({over('chunk', form.chunks_per_group)}, groups - 1) * N + n_in"
            for i in P:
                yield f"scale{i} = tl.load(scale_w{i} + here)[:, None]"
                yield from (f"acc{i}_{row} += scale{i} * product{i}_{row}.to(tl.float32)" for row in range(form.tokens))


def _lift(form: Form, to: str, i: int, moves: list[tuple[int, int, int]]) -> Iterator[str]:
    words = [f"words{i}_{tile}" for tile, _, _ in moves]
    if not form.interpreted:
        yield from assembly(to, lifting(moves), ",".join(["=r", *("r" for _ in moves)]), ", ".join(words), "tl.int32", 1)
        return
    terms = []
    for word, (_, shift, mask) in zip(words, moves, strict=True):
        moved = f"({word} << {shift})" if shift > 0 else f"({word} >> {-shift})" if shift else word
        signed = mask * 0x01010101 - (1 << 32 if mask & 0x80 else 0)
        terms.append(f"({moved} & {signed})")
    yield f"{to} = {' | '.join(terms)}"


def _dp4a(form: Form, to: str, a: str, b: str) -> Iterator[str]:
    if not form.interpreted:
        yield from assembly(to, "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", f"{a}, {b}, {to}", "tl.int32", 1)
        return
    for shift in (24, 16, 8, 0):  # a byte with its sign: up to the top, and down again
        byte = [f"(({word} << {shift}) >> 24)" if shift else f"({word} >> 24)" for word in (a, b)]
        yield f"{to} += {byte[0]} * {byte[1]}"


def whole_words(*matrices: Tensor) -> bool:
    """Whether the rows of int8 matrices consist of whole words of four bytes, and begin at one."""
    sizes = [size for t in matrices for size in (t.shape[1], t.stride(0), t.storage_offset())]
    return all(t.stride(1) == 1 for t in matrices) and all(isinstance(size, int) and size % 4 == 0 for size in sizes)
