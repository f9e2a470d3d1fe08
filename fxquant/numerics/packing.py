"""Codes of 1 to 8 bits in bytes: dense along the last axis for storage, in K-slices for kernels that unpack with one shift.

Both are plain PyTorch with an exact inverse. A code is stored as its low ``bits`` bits (two's complement when negative).
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import FxquantError


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., K] (int8 or uint8) as uint8 [..., ceil(K * bits / 8)], little endian and without gaps.

    Bit ``i`` of code ``k`` is bit ``k * bits + i`` of the row, counted from the low end of its first byte; codes of 3, 5, 6
    and 7 bits straddle bytes. The last byte is filled up with zeros.

    >>> pack(torch.tensor([1, 2, 3], dtype=torch.uint8), bits=4)
    tensor([33,  3], dtype=torch.uint8)
    """
    _check(codes, bits)
    size = codes.shape[-1]
    codes = pad(_low_bits(codes, bits), (0, -size % 8))
    words = _merge([codes[..., k::8] for k in range(8)], bits)  # eight codes fill exactly `bits` bytes
    rows = torch.stack([words >> 8 * j & 0xFF for j in range(bits)], dim=-1).flatten(-2)
    return rows[..., : -(size * bits // -8)].to(torch.uint8)


def unpack(packed: Tensor, bits: int, size: int, *, signed: bool = False) -> Tensor:
    """The inverse of ``pack``: codes [..., size], uint8, or int8 if ``signed``."""
    _check(packed, bits)
    if packed.shape[-1] != -(size * bits // -8):
        needed = -(size * bits // -8)
        raise FxquantError(f"{size} codes of {bits} bits are to be unpacked from {packed.shape[-1]} bytes, {needed} are needed")
    packed = pad(packed, (0, -packed.shape[-1] % bits))
    words = _merge([packed[..., j::bits] for j in range(bits)], 8)
    codes = torch.stack([words >> bits * k & _mask(bits) for k in range(8)], dim=-1).flatten(-2)
    return _restore(codes[..., :size], bits, signed)


# The container of a slice pack, by its width.
CONTAINERS = {8: torch.int8, 16: torch.int16, 32: torch.int32}


def pack_slices(codes: Tensor, bits: int, block: int, slices: int = 4) -> Tensor:
    """Codes [..., K] as containers [..., K / slices] that hold ``slices`` codes which lie ``block`` apart.

    ``packed[b * block + k] = sum over j < slices of codes[(b * slices + j) * block + k] << (bits * j)``: the j-th slice of a
    packed tile is ``packed >> bits * j & mask``, and it meets the contiguous columns ``[(b * slices + j) * block :][:block]``
    of the other operand. The container has ``bits * slices`` bits: int16 for four 4-bit codes, int8 for four 2-bit codes.
    Raises FxquantError if ``block * slices`` does not divide K, or there is no such container.
    """
    _check(codes, bits)
    container = _container(bits, slices)
    if codes.shape[-1] % (block * slices):
        raise FxquantError(
            f"the last axis has {codes.shape[-1]} codes, a multiple of {block * slices} ({slices} slices of {block}) is needed"
        )
    tiles = torch.unflatten(_low_bits(codes, bits), -1, (codes.shape[-1] // (block * slices), slices, block))
    return _merge(list(tiles.unbind(-2)), bits).to(container).flatten(-2)


def unpack_slices(packed: Tensor, bits: int, block: int, slices: int = 4, *, signed: bool = False) -> Tensor:
    """The inverse of ``pack_slices``: codes [..., K], uint8, or int8 if ``signed``."""
    container = _container(bits, slices)
    if packed.dtype != container:
        raise FxquantError(f"the packed codes are {packed.dtype}, {slices} slices of {bits} bits are {container}")
    tiles = torch.unflatten(packed.to(torch.int64), -1, (packed.shape[-1] // block, block))
    codes = torch.stack([tiles >> bits * j & _mask(bits) for j in range(slices)], dim=-2).flatten(-3)
    return _restore(codes, bits, signed)


def _merge(parts: list[Tensor], bits: int) -> Tensor:
    """int64 words with ``parts[i]`` (non-negative, below 2^bits) at bit ``bits * i``."""
    words = parts[0].to(torch.int64)
    for i, part in enumerate(parts[1:], start=1):
        words = words | part.to(torch.int64) << bits * i
    return words


def _restore(codes: Tensor, bits: int, signed: bool) -> Tensor:
    """Low bits as codes again; a signed code has its sign in the top bit."""
    if not signed:
        return codes.to(torch.uint8)
    sign = 1 << bits - 1
    return ((codes ^ sign) - sign).to(torch.int8)


def _low_bits(codes: Tensor, bits: int) -> Tensor:
    return codes.view(torch.uint8) & _mask(bits)


def _mask(bits: int) -> int:
    return (1 << bits) - 1


def _container(bits: int, slices: int) -> torch.dtype:
    if bits * slices not in CONTAINERS:
        known = ", ".join(map(str, CONTAINERS))
        raise FxquantError(f"{slices} slices of {bits} bits fill {bits * slices} bits, and there are containers of {known}")
    return CONTAINERS[bits * slices]


def _check(codes: Tensor, bits: int) -> None:
    if type(bits) is not int or not 1 <= bits <= 8:
        raise FxquantError(f"codes of {bits!r} bits are to be packed, an integer from 1 to 8 is needed")
    if codes.dtype not in (torch.int8, torch.uint8):
        raise FxquantError(f"codes are {codes.dtype}, int8 or uint8 is needed; Format.encode gives them")
