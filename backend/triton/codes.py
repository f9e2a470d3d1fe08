"""How the codes of a low-bit weight lie in memory, and the few instructions that make operands of the tensor cores of them.

K is cut into slices of ``width`` columns, and codes that lie a slice apart share a word: one shift and one logic operation then
turn a whole register of words into operands, in the order in which the slice meets the activations (shared/kernels.md, 2.3).

For 8-bit activations words are bytes, and a code ends at the top of its byte, as ``code << 8 - bits``: signed codes need no
sign extension, and the product is a power of two too large. Codes of 3 bits lie in two *planes*, of their high two bits and
of their low bit, so that nothing straddles a byte. For 16-bit activations words are int16 and codes arrive as floats
``offset + code``, see ``widening``, or as entries of a codebook, see ``looking_up``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.numerics.packing import pack_slices, unpack_slices

OFFSET = {torch.bfloat16: 128, torch.float16: 1024}
"""The power of two whose last mantissa bits hold a four-bit code."""

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 values of NormalFloat (QLoRA, arXiv 2305.14314, appendix E): a code is a place in this list."""

PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}


@dataclass(frozen=True)
class Codes:
    """Codes of ``bits`` bits in words of ``container`` bits (8 for int8 activations, 16 for float ones).

    ``codebook``: what each of 16 codes means, for 16-bit activations; without one a code means itself.
    """

    bits: int
    container: int = 8
    signed: bool = True
    codebook: tuple[float, ...] = ()

    @property
    def planes(self) -> tuple[int, ...]:
        """The bits of each plane, high ones first."""
        return PLANES[self.bits]

    @property
    def slices(self) -> int:
        """How many slices a block has: as many as the words of the thinnest plane hold."""
        return self.container // min(self.planes)

    @property
    def tiles(self) -> tuple[tuple[int, int], ...]:
        """(plane, which part of it) of each tile of words that a block consists of."""
        parts = [self.slices * plane // self.container for plane in self.planes]
        return tuple((p, part) for p, count in enumerate(parts) for part in range(count))

    @property
    def words(self) -> int:
        """Words for each column of a block."""
        return len(self.tiles)

    def pack(self, codes: Tensor, width: int) -> Tensor:
        """Codes [N, K] (int8, or uint8 if not signed) as words [N, ceil(K / block) * words * width]; K is filled up with 0.

        >>> Codes(3).pack(torch.zeros(4, 1000, dtype=torch.int8), 64).shape       # 2 blocks of 8 x 64, 3 words each
        torch.Size([4, 384])
        """
        codes = F.pad(codes, (0, -codes.shape[1] % (self.slices * width)))
        low, found, blocks = self.bits, [], codes.shape[1] // (self.slices * width)
        for plane in self.planes:
            low -= plane
            part = (codes.view(torch.uint8) >> low) & ((1 << plane) - 1)
            words = pack_slices(part, plane, width, self.container // plane)
            found.append(words.view(codes.shape[0], blocks, words.shape[1] // max(blocks, 1)))
        return torch.cat(found, 2).flatten(1)

    def unpack(self, packed: Tensor, width: int) -> Tensor:
        """The inverse of ``pack``, with the codes that filled K up: [N, blocks * slices * width]."""
        blocks = packed.view(packed.shape[0], -1, self.words * width)
        codes, at = torch.zeros(()), 0
        for p, plane in enumerate(self.planes):
            size = self.slices * plane // self.container * width
            part = unpack_slices(blocks[..., at : at + size].flatten(1), plane, width, self.container // plane).to(torch.int16)
            codes, at = part if p == 0 else (codes << plane) + part, at + size
        if self.signed:
            sign = 1 << self.bits - 1
            return ((codes ^ sign) - sign).to(torch.int8)
        return codes.to(torch.uint8)

    def tile_of(self, plane: int, j: int) -> int:
        """Which tile of words holds slice ``j`` of ``plane``."""
        return self.tiles.index((plane, j // (self.container // self.planes[plane])))

    def moves(self, j: int) -> list[tuple[int, int, int]]:
        """(tile, shift to the left, mask) for each plane: what brings slice ``j`` to the top of its bytes."""
        top, found = 8, []
        for p, plane in enumerate(self.planes):
            top -= plane
            shift = top - plane * (j % (8 // plane))
            found.append((self.tile_of(p, j), shift, ((1 << plane) - 1) << top))
        return found

    @property
    def magnified(self) -> int:
        """By how many bits an operand for 8-bit activations is shifted to the left."""
        return 8 - self.bits

    def offset(self, dtype: torch.dtype) -> int:
        """What ``widening`` adds to a code."""
        if self.codebook:
            return 0
        return {4: OFFSET[dtype] + (8 if self.signed else 0), 8: 0 if self.signed else -128}[self.bits]


def lifting(moves: list[tuple[int, int, int]]) -> str:
    """PTX that brings a slice of four bytes to the top of each, from one word of each plane; lop3 0xea is ``a & b | c``."""
    text = []
    for i, (_, shift, mask) in enumerate(moves):
        word, mask4 = f"${i + 1}", f"0x{mask * 0x01010101:08x}"
        if shift:
            text.append(f"{'shl' if shift > 0 else 'shr'}.b32 t, {word}, {abs(shift)};")
            word = "t"
        text.append(f"and.b32 s, {word}, {mask4};" if i == 0 else f"lop3.b32 s, {word}, {mask4}, s, 0xea;")
    return "{ .reg .b32 s, t; " + " ".join(text) + " mov.b32 $0, s; }"


def widening(slice: int, slices: int, signed: bool, bf16: bool) -> str:
    """PTX that turns slice ``slice`` of two int16 words into two floats; lop3 0x6a is ``a & b ^ c``.

    Four bits: offset + code, the code biased by 8 if signed. Eight bits in bfloat16, whose mantissa holds seven: 128 + low
    bits, less 128 or 256; in float16: 1024 + (code ^ 128), less 1152. Both are exact: the signed code, or the unsigned one
    less 128.
    """
    shift = f"shr.b32 t, $1, {16 // slices * slice};" if slice else "mov.b32 t, $1;"
    if slices == 4:
        bits = (0x4300 if bf16 else 0x6400) + (8 if signed else 0)
        body = f"lop3.b32 $0, t, 0x000f000f, 0x{bits:04x}{bits:04x}, 0x6a;"
    elif bf16:
        low = "lop3.b32 a, t, 0x007f007f, 0x43004300, 0x6a;"
        high = f"lop3.b32 b, t, 0x00800080, 0x{'c300c300' if signed else 'c380c380'}, 0x6a;"
        body = f".reg .b32 a, b, one; mov.b32 one, 0x3f803f80; {low} {high} fma.rn.bf16x2 $0, a, one, b;"
    else:
        biased = f"lop3.b32 a, t, 0x00ff00ff, 0x{'64806480' if signed else '64006400'}, 0x6a;"
        body = f".reg .b32 a, b; {biased} mov.b32 b, 0xe480e480; add.rn.f16x2 $0, a, b;"
    return "{ .reg .b32 t; " + shift + " " + body + " }"


def _bits(x: float, bf16: bool) -> int:
    """The bits of ``x`` as a 16-bit float, rounded to nearest even; without tensors, which may be fake where this is called."""
    if not bf16:
        return int.from_bytes(struct.pack("<e", x), "little")
    word = int.from_bytes(struct.pack("<f", x), "little")
    return word + 0x7FFF + (word >> 16 & 1) >> 16


def looking_up(codebook: tuple[float, ...], bf16: bool) -> str:
    """PTX that turns two int16 words of four codes into the entries of ``codebook``: slice j of both in $j, from $4.

    The bytes of 16 entries lie in eight registers. ``prmt`` picks a byte of eight for each of four codes: twice for low bytes,
    twice for high ones, and lop3 0xd8, ``c ? b : a``, takes what the top bit of each code says. 27 instructions for 8
    weights, and 10 moves of table entries that the compiler adds.
    """
    entries = [_bits(entry, bf16) for entry in codebook]
    octets = [[entry >> 8 * part & 0xFF for entry in entries] for part in (0, 1)]
    tables = [[f"0x{int.from_bytes(bytes(part[i : i + 4]), 'little'):08x}" for i in (0, 4, 8, 12)] for part in octets]
    text = ["and.b32 s, $4, 0x77777777;", "and.b32 m, $4, 0x88888888;", "shr.b32 m, m, 3;"]
    for first, second in ("ab", "cd"):  # of one word: slices 0 and 1, 2 and 3
        text.append("prmt.b32 v, 0x0000ff00, 0, m;")
        for to, table in zip(("l", "h"), tables, strict=True):
            text += [f"prmt.b32 t, {table[0]}, {table[1]}, s;", f"prmt.b32 u, {table[2]}, {table[3]}, s;"]
            text.append(f"lop3.b32 {to}, t, u, v, 0xd8;")
        text += [f"prmt.b32 {first}, l, h, 0x5140;", f"prmt.b32 {second}, l, h, 0x7362;"]
        if first == "a":
            text += ["shr.b32 s, s, 16;", "shr.b32 m, m, 16;"]
    text += [f"prmt.b32 ${j}, {'aabb'[j]}, {'ccdd'[j]}, {'0x7632' if j % 2 else '0x5410'};" for j in range(4)]
    return "{ .reg .b32 s, m, t, u, v, l, h, a, b, c, d; " + " ".join(text) + " }"
