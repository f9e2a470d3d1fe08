"""What is packed comes back: every width, every size, dense and in K-slices."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from fxquant.errors import FxquantError
from fxquant.numerics.packing import pack, pack_slices, unpack, unpack_slices

widths = st.integers(1, 8)


def codes_of(bits: int, shape: tuple[int, ...], signed: bool, seed: int) -> Tensor:
    """Every code of the width may occur, the extreme ones included."""
    generator = torch.Generator().manual_seed(seed)
    low = -(1 << bits - 1) if signed else 0
    return torch.randint(low, low + (1 << bits), shape, generator=generator).to(torch.int8 if signed else torch.uint8)


@given(widths, st.integers(0, 40), st.integers(0, 3), st.booleans(), st.integers(0, 999))
def test_packed_codes_come_back(bits, size, rows, signed, seed):
    codes = codes_of(bits, (rows, size), signed, seed)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, (size * bits + 7) // 8)
    assert torch.equal(unpack(packed, bits, size, signed=signed), codes)


@given(widths, st.integers(0, 40), st.integers(0, 999))
def test_a_packed_row_is_one_little_endian_integer(bits, size, seed):
    codes = codes_of(bits, (size,), False, seed)
    number = sum(code << bits * k for k, code in enumerate(codes.tolist()))
    assert bytes(pack(codes, bits).tolist()) == number.to_bytes((size * bits + 7) // 8, "little")


@given(widths, st.integers(1, 20), st.booleans(), st.integers(0, 999))
def test_strides_do_not_matter(bits, size, signed, seed):
    codes = codes_of(bits, (size, 3), signed, seed).T
    assert torch.equal(pack(codes, bits), pack(codes.contiguous(), bits))


sliced = st.sampled_from([(4, 4), (2, 4), (2, 8), (1, 8), (8, 4), (4, 2)])


@given(sliced, st.integers(1, 5), st.integers(0, 3), st.integers(0, 3), st.booleans(), st.integers(0, 999))
def test_sliced_codes_come_back(layout, block, tiles, rows, signed, seed):
    bits, slices = layout
    codes = codes_of(bits, (rows, tiles * block * slices), signed, seed)
    packed = pack_slices(codes, bits, block, slices)
    assert packed.shape == (rows, tiles * block) and packed.element_size() * 8 == bits * slices
    assert torch.equal(unpack_slices(packed, bits, block, slices, signed=signed), codes)


@given(sliced, st.integers(1, 4), st.integers(1, 3), st.integers(0, 999))
def test_a_slice_is_one_shift_and_meets_contiguous_columns(layout, block, tiles, seed):
    bits, slices = layout
    codes = codes_of(bits, (2, tiles * block * slices), False, seed)
    packed = pack_slices(codes, bits, block, slices)
    for b in range(tiles):
        for j in range(slices):
            slice_j = packed[:, b * block : (b + 1) * block].to(torch.int64) >> bits * j & (1 << bits) - 1
            start = (b * slices + j) * block
            assert torch.equal(slice_j, codes[:, start : start + block].to(torch.int64))


def test_four_nibbles_lie_in_an_int16_from_the_low_end():
    codes = torch.arange(1, 9, dtype=torch.uint8)
    assert pack_slices(codes, 4, block=2).tolist() == [0x7531, 0x8642 - 0x10000]


def test_a_size_that_the_slices_do_not_divide_is_refused():
    with pytest.raises(FxquantError, match=r"100 codes, a multiple of 128 \(4 slices of 32\)"):
        pack_slices(torch.zeros(2, 100, dtype=torch.uint8), 4, block=32)


def test_a_width_without_a_container_is_refused():
    with pytest.raises(FxquantError, match="fill 12 bits"):
        pack_slices(torch.zeros(2, 8, dtype=torch.uint8), 3, block=2)


def test_packed_codes_of_another_size_or_container_are_refused():
    with pytest.raises(FxquantError, match="from 3 bytes, 4 are needed"):
        unpack(torch.zeros(2, 3, dtype=torch.uint8), 4, 8)
    with pytest.raises(FxquantError, match=r"are torch\.int16"):
        unpack_slices(torch.zeros(2, 8, dtype=torch.int8), 4, block=2)


def test_wide_codes_and_wide_widths_are_refused():
    with pytest.raises(FxquantError, match=r"codes are torch.int32"):
        pack(torch.zeros(4, dtype=torch.int32), 4)
    with pytest.raises(FxquantError, match="an integer from 1 to 8"):
        pack(torch.zeros(4, dtype=torch.uint8), 9)
