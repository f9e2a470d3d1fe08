"""The Triton text of one matrix product, written from what is known of it: how it loads, unpacks, multiplies, corrects, ends.

A text needs nothing but ``triton`` and ``tl``, so that Inductor can take it over as it stands. Facts about sizes are spelled
out in it: where a size is known to divide there is no mask, where a scale is not there it is not loaded.
"""

from __future__ import annotations

import linecache
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from textwrap import indent
from typing import Any

from .codes import Codes, lifting, looking_up, widening
from .language import tl, triton
from .program import Program, kind_of


@dataclass(frozen=True)
class Form:
    """What is known of a product when its kernel is written.

    ``codes`` is None for int8 weights as they are. ``floats`` is "bf16" or "fp16" where activations are, "" where they are int8
    codes. ``chunk`` slices share one scale (and one sum of activations) and ``chunks_per_group`` chunks one group; with int8
    activations and one scale per output, chunk is 0: the whole sum stays in 32-bit integers.
    """

    products: int = 1
    floats: str = ""
    codes: Codes | None = None
    chunk: int = 0
    chunks_per_group: int = 1
    zero_x: bool = False  # activations have zero points
    tensor_x: bool = False  # activations have one scale for all, not one per token
    sums_x: bool = False  # the offset of float codes leaves by the sums of the activations
    offset: int = 0
    program: str = ""
    weight_left: bool = False
    parts: bool = False  # K is split: what is stored are partial sums
    persistent: bool = False  # a program takes one tile after the other; K is not split
    even_m: bool = False
    even_n: bool = False
    even_k: bool = False
    tokens: int = 0  # how many rows a GEMV keeps apart (gemv.py)
    interpreted: bool = False  # no inline assembly

    @property
    def name(self) -> str:
        """A name for people, which profilers show."""
        bits = self.codes.bits if self.codes else 8
        book = "book_" if self.codes and self.codes.codebook else ""
        ends = ("_pair" if self.products == 2 else "") + ("_part" if self.parts else "") + "_persistent" * self.persistent
        return f"{book}w{bits}a{16 if self.floats else 8}{ends}"

    @property
    def integer(self) -> bool:
        """The whole sum is an integer."""
        return not self.floats and not self.chunk

    @property
    def weights(self) -> list[str]:
        """What each product reads besides its codes, loaded in the loop (of groups) or at the end (of channels)."""
        third = ["zero_w"] if self.floats and self.codes and not (self.codes.signed or self.codes.codebook) else []
        return ["scale_w", *(["sum_w"] if self.zero_x else third)]


def write(form: Form) -> str:
    """The kernel: one tile of the result, or of one part of the sum; a persistent one takes whole tiles, in the same order."""
    P, left = range(form.products), form.weight_left
    tile = "tile" if form.persistent else "tl.program_id(0)"
    shape = "(BN, BM)" if left else "(BM, BN)"
    names = ["x", *(f"w{i}" for i in P)]
    if not form.floats and not form.parts:
        names += ["scale_x", *(["zero_x"] if form.zero_x else [])]
    loop = [f"{name}{i}" for i in P for name in form.weights if form.chunk and name != "sum_w"]
    end = [f"{name}{i}" for i in P for name in form.weights if not form.parts and (not form.chunk or name == "sum_w")]
    names += [*loop, *end, *(["sums_x"] if form.sums_x else [])]
    operands = () if form.parts else Program.parse(form.program).operands
    names += [*operands, "out"]
    sizes = ["M", "N", "K", "stride_x", "stride_w"]
    sizes += [*(["chunks"] if form.sums_x else []), *(["groups"] if form.chunk else [])]
    sizes += [f"stride_{name}" for name in operands if kind_of(name) == "full"] + ([] if form.parts else ["stride_out"])
    block = "WIDTH" if form.codes is None else f"{form.codes.slices} * WIDTH"
    walk = [
        "# The order of tiles is down bands of BAND tiles of rows: neighbours in time share weight tiles in the L2 cache.",
        "tiles_n = tl.cdiv(N, BN)",
        f"steps = tl.cdiv(K, {block})",
    ]
    share: list[str] = []
    stepping = "for step in range(0, steps):"
    if form.persistent:
        walk += [
            "# One loop of all steps of all tiles (flatten): what a tile begins with is loaded while the one before it ends.",
            "for tile in tl.range(tl.program_id(0), tl.cdiv(M, BM) * tiles_n, tl.num_programs(0), flatten=True):",
        ]
    else:
        share = ["share = tl.cdiv(steps, PARTS)", "first = tl.program_id(1) * share"]
        stepping = "for step in range(first, tl.minimum(first + share, steps)):"
    body = [
        f"band = {tile} // (BAND * tiles_n)",
        "height = tl.minimum(tl.cdiv(M, BM) - band * BAND, BAND)",
        f"m = (band * BAND + ({tile} % (BAND * tiles_n)) % height) * BM + tl.arange(0, BM)",
        f"n = (({tile} % (BAND * tiles_n)) // height) * BN + tl.arange(0, BN)",
        "k = tl.arange(0, WIDTH)",
        *edges(form),
        "x_rows = x + m_in.to(tl.int64)[:, None] * stride_x + k[None, :]",
        *(f"w{i}_rows = w{i} + n_in.to(tl.int64)[:, None] * stride_w + k[None, :]" for i in P),
        *share,
        *(f"acc{i} = tl.zeros({shape}, dtype=tl.{'int32' if form.integer else 'float32'})" for i in P),
    ]
    if form.codes is None and share:
        body += [f"{name} += first * WIDTH" for name in ("x_rows", *(f"w{i}_rows" for i in P))]
    body += [stepping]
    body += ["    " + line for line in (plain(form) if form.codes is None else unpacked(form, form.codes))]
    if left:
        body += [f"acc{i} = tl.trans(acc{i})" for i in P]
    body += stored_parts(form) if form.parts else ending(form)
    body = walk + ([f"    {line}" for line in body] if form.persistent else body)
    return function(form.name, names, sizes, [*(["PARTS"] if share else []), "BM", "BN", "WIDTH", "BAND"], body)


def write_sum(form: Form) -> str:
    """The kernel that adds up the parts of ``form`` in their order, the same on every run, and ends as the product would."""
    whole = Form(**{**form.__dict__, "parts": False, "even_m": False, "even_n": False})
    P = range(form.products)
    names = ["parts"] + ([] if form.floats else ["scale_x", *(["zero_x"] if form.zero_x else [])])
    names += [f"{name}{i}" for i in P for name in form.weights if form.integer or name == "sum_w"]
    operands = Program.parse(form.program).operands
    names += [*operands, "out"]
    sizes = ["M", "N", *(f"stride_{name}" for name in operands if kind_of(name) == "full"), "stride_out"]
    kind = "int32" if form.integer else "float32"
    at = "part" if form.products == 1 else "(part * 2 + {})"
    body = [
        "m = tl.program_id(0) * BM + tl.arange(0, BM)",
        "n = tl.program_id(1) * BN + tl.arange(0, BN)",
        "here = parts + m.to(tl.int64)[:, None] * N + n[None, :]",
        "inside = (m < M)[:, None] & (n < N)[None, :]",
        *(f"acc{i} = tl.zeros((BM, BN), dtype=tl.{kind})" for i in P),
        "for part in tl.static_range(PARTS):",
        *(f"    acc{i} += tl.load(here + {at.format(i)} * M * N, mask=inside, other=0)" for i in P),
        *ending(whole),
    ]
    return function(f"sum_of_{form.name}", names, sizes, ["PARTS", "BM", "BN"], body)


def edges(form: Form) -> Iterator[str]:
    """Rows beyond an edge read the last row instead of a mask."""
    if not (form.even_m and form.even_n):
        yield "# Rows beyond the edge read the last row: loads stay wide, and what they compute is not stored."
    yield "m_in = m" if form.even_m else "m_in = tl.minimum(m, M - 1)"
    yield "n_in = n" if form.even_n else "n_in = tl.minimum(n, N - 1)"


def dot(form: Form, weight: str, to: str) -> str:
    """One product of tiles, the weight on the left or on the right."""
    operands = f"{weight}, tl.trans(x_tile)" if form.weight_left else f"x_tile, tl.trans({weight})"
    return f"{to} = tl.dot({operands}, {to}{'' if form.floats else ', out_dtype=tl.int32'})"


def plain(form: Form) -> Iterator[str]:
    """int8 weights as they are, K contiguous: the other order costs Hopper its asynchronous copies and doubles the loop."""
    mask = "" if form.even_k else ", mask=k[None, :] < K - step * WIDTH, other=0"
    yield f"x_tile = tl.load(x_rows{mask})"
    for i in range(form.products):
        yield f"w_tile{i} = tl.load(w{i}_rows{mask})"
        yield dot(form, f"w_tile{i}", f"acc{i}")
    yield from (f"{name} += WIDTH" for name in ("x_rows", *(f"w{i}_rows" for i in range(form.products))))


def unpacked(form: Form, codes: Codes) -> Iterator[str]:
    """A block of words: each is loaded once, and gives a slice of the weight for each part of it."""
    P = range(form.products)
    for i in P:
        for tile in range(codes.words):
            at = f"step * {codes.words} + {tile}" if codes.words > 1 else "step"
            yield f"words{i}_{tile} = tl.load(w{i}_rows + {f'({at})' if codes.words > 1 else at} * WIDTH)"
    into = "product" if form.chunk else "acc"
    for j in range(codes.slices):
        if form.chunk and j % form.chunk == 0:
            for i in P:
                yield f"product{i} = tl.zeros((BN, BM), dtype=tl.{'float32' if form.floats else 'int32'})"
        yield f"base = (step * {codes.slices} + {j}) * WIDTH"
        yield f"x_tile = tl.load(x_rows + base{'' if form.even_k else ', mask=k[None, :] < K - base, other=0'})"
        for i in P:
            yield from slice_of(form, codes, i, j)
            yield dot(form, f"w_tile{i}", f"{into}{i}")
        if form.chunk and (j + 1) % form.chunk == 0:
            yield from scaled(form, codes, j)


def slice_of(form: Form, codes: Codes, i: int, j: int) -> Iterator[str]:
    """``w_tile``: slice ``j`` of the words of product ``i``."""
    if form.floats:
        dtype = {"bf16": "tl.bfloat16", "fp16": "tl.float16"}[form.floats]
        if codes.codebook:
            yield from _looked_up(form, codes, i, j, dtype)
        elif form.interpreted:
            flip = 1 << codes.bits - 1 if codes.signed else 0
            bias = 1024 if codes.bits == 4 else -128
            yield f"code = (words{i}_0.to(tl.int32) >> {codes.bits * j}) & {(1 << codes.bits) - 1}"
            yield f"w_tile{i} = ((code ^ {flip}) + {bias}).to({dtype})"
        else:
            text = widening(j, codes.slices, codes.signed, form.floats == "bf16")
            yield from assembly(f"w_tile{i}", text, "=r,r", f"words{i}_0", dtype, 2)
        return
    moves = codes.moves(j)
    if form.interpreted:
        terms = []
        for tile, shift, mask in moves:
            moved = f"words{i}_{tile}.to(tl.int32)" + (f" << {shift}" if shift > 0 else f" >> {-shift}" if shift else "")
            terms.append(f"(({moved}) & {mask})")
        yield f"w_tile{i} = ({' | '.join(terms)}).to(tl.int8)"
    else:
        words = ", ".join(f"words{i}_{tile}" for tile, _, _ in moves)
        constraint = ",".join(["=r", *("r" for _ in moves)])
        yield from assembly(f"w_tile{i}", lifting(moves), constraint, words, "tl.int8", 4)


def _looked_up(form: Form, codes: Codes, i: int, j: int, dtype: str) -> Iterator[str]:
    """``w_tile`` from a codebook: all slices are looked up together, when the first is asked for."""
    if form.interpreted:
        yield f"code = (words{i}_0.to(tl.int32) >> {codes.bits * j}) & {(1 << codes.bits) - 1}"
        yield f"w_tile{i} = tl.zeros(code.shape, dtype=tl.float32)"
        yield from (f"w_tile{i} = tl.where(code == {c}, {entry!r}, w_tile{i})" for c, entry in enumerate(codes.codebook))
        yield f"w_tile{i} = w_tile{i}.to({dtype})"
        return
    if j == 0:
        slices, text = range(codes.slices), looking_up(codes.codebook, form.floats == "bf16")
        to = ", ".join(f"slice{i}_{k}" for k in slices)
        constraint, types = ",".join(["=r" for _ in slices] + ["r"]), ", ".join(dtype for _ in slices)
        yield from assembly(to, text, constraint, f"words{i}_0", f"({types})", 2)
    yield f"w_tile{i} = slice{i}_{j}"


def assembly(to: str, text: str, constraint: str, words: str, dtype: str, pack: int) -> Iterator[str]:
    """``to``: PTX on whole registers, each of which holds ``pack`` words."""
    yield f"{to} = tl.inline_asm_elementwise("
    yield f'    "{text}",'
    yield f'    "{constraint}", [{words}], dtype={dtype}, is_pure=True, pack={pack},'
    yield ")"


def scaled(form: Form, codes: Codes, j: int) -> Iterator[str]:
    """What a chunk adds to the result: its product, less what offset and zero point make of it, times its scale."""
    yield f"chunk = step * {codes.slices // form.chunk} + {j // form.chunk}"
    if j + 1 == form.chunk:
        yield "# What fills K up meets zeros, but not those of a scale that is not there."
    yield f"here = tl.minimum({over('chunk', form.chunks_per_group)}, groups - 1) * N + n_in"
    if form.sums_x:
        yield "sum_x = tl.load(sums_x + m_in * chunks + chunk)[None, :]"
    for i in range(form.products):
        if form.sums_x:
            zero = str(form.offset)
            if "zero_w" in form.weights:
                zero = f"({form.offset} + tl.load(zero_w{i} + here).to(tl.float32)[:, None])"
            yield f"product{i} -= {zero} * sum_x"
        yield f"acc{i} += tl.load(scale_w{i} + here)[:, None] * product{i}{'' if form.floats else '.to(tl.float32)'}"


def over(name: str, by: int) -> str:
    """``name // by``, or ``name`` alone."""
    return name if by == 1 else f"{name} // {by}"


def stored_parts(form: Form) -> Iterator[str]:
    """The sums as they are, [PARTS, products, M, N]."""
    yield "here = m.to(tl.int64)[:, None] * N + n[None, :]"
    for i in range(form.products):
        at = "tl.program_id(1)" if form.products == 1 else f"(tl.program_id(1) * {form.products} + {i})"
        yield f"tl.store(out + {at} * M * N + here, acc{i}{_mask(form)})"


def ending(form: Form) -> Iterator[str]:
    """From sums [BM, BN] to the stored result: zero points, scales, the steps of the program."""
    columns = "" if form.even_n else ", mask=n < N, other=0"
    rows = "" if form.even_m else ", mask=m < M, other=0"
    if not form.floats:
        yield "left = tl.load(scale_x)" if form.tensor_x else f"left = tl.load(scale_x + m{rows})[:, None]"
        if form.zero_x:
            yield "zero = tl.load(zero_x)" if form.tensor_x else f"zero = tl.load(zero_x + m{rows})[:, None]"
    shift = form.codes.magnified if form.codes and not form.floats else 0
    for i in range(form.products):
        if form.floats:
            yield f"y{i} = acc{i}"
        elif form.integer:
            if shift:
                yield f"acc{i} = acc{i} >> {shift}"
            if form.zero_x:
                yield f"acc{i} -= zero * tl.load(sum_w{i} + n{columns})[None, :]"
            yield f"y{i} = acc{i}.to(tl.float32) * (left * tl.load(scale_w{i} + n{columns})[None, :])"
        else:
            less = f" - zero.to(tl.float32) * tl.load(sum_w{i} + n{columns})[None, :]" if form.zero_x else ""
            yield f"y{i} = (acc{i} * {0.5**shift!r}{less}) * left"
    program = Program.parse(form.program)
    tiles = {name: f"{name}_tile" for name in program.operands}  # a pointer keeps its name for the next tile
    for name, tile in tiles.items():
        yield f"{tile} = {_operand(form, name, columns, rows)}.to(tl.float32)"
    yield from program.renamed(tiles).printed()
    yield "there = out + m.to(tl.int64)[:, None] * stride_out + n[None, :]"
    yield f"tl.store(there, {program.result}.to(out.dtype.element_ty){_mask(form)})"


def _operand(form: Form, name: str, columns: str, rows: str) -> str:
    kind = kind_of(name)
    if kind == "scalar":
        return f"tl.load({name})"
    if kind == "column":
        return f"tl.load({name} + n{columns})[None, :]"
    if kind == "row":
        return f"tl.load({name} + m{rows})[:, None]"
    mask = _mask(form)
    return f"tl.load({name} + m.to(tl.int64)[:, None] * stride_{name} + n[None, :]{mask and mask + ', other=0'})"


def _mask(form: Form) -> str:
    tests = [*([] if form.even_m else ["(m < M)[:, None]"]), *([] if form.even_n else ["(n < N)[None, :]"])]
    return f", mask={' & '.join(tests)}" if tests else ""


def function(name: str, names: list[str], sizes: list[str], constants: list[str], body: list[str]) -> str:
    """The text of a kernel."""
    head = f"    {', '.join(names)},\n    {', '.join(sizes)},\n    {', '.join(f'{c}: tl.constexpr' for c in constants)},\n"
    return f"@triton.jit\ndef {name}(\n{head}):\n{indent(chr(10).join(body), '    ')}\n"


@lru_cache(None)
def kernel(text: str) -> Any:
    """The kernel that ``text`` defines; Triton reads its source where Python's tracebacks do, in ``linecache``."""
    file = f"<fxquant {sha256(text.encode()).hexdigest()[:16]}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    scope: dict[str, Any] = {"triton": triton, "tl": tl, "__name__": __name__}
    exec(compile(text, file, "exec"), scope)
    return scope[text.split("def ", 1)[1].split("(", 1)[0]]
