"""The emulator against the definitions of its instructions, and the assembly of our kernels in the emulator."""

import ptx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxquant.backend.triton.codes import NF4, Codes, lifting, looking_up, widening

WORDS = st.integers(0, 2**32 - 1)


@given(WORDS, WORDS, WORDS)
def test_lop3_is_the_function_whose_table_its_three_constants_give(a, b, c):
    # The ISA's recipe: the table of f is f(0xF0, 0xCC, 0xAA).
    for f in (lambda a, b, c: a & b | c, lambda a, b, c: a & b ^ c, lambda a, b, c: (a ^ b) & ~c, lambda a, b, c: a | b | c):
        assert ptx.lop3(a, b, c, f(0xF0, 0xCC, 0xAA) & 0xFF) == f(a, b, c) & ptx.WORD


@given(WORDS, WORDS)
def test_prmt_picks_bytes(a, b):
    assert ptx.prmt(a, b, 0x3210) == a
    assert ptx.prmt(a, b, 0x7654) == b
    assert ptx.prmt(a, b, 0x0123) == int.from_bytes(a.to_bytes(4, "little"), "big")
    assert ptx.prmt(a, b, 0xFEDC) == sum((0xFF if b >> 8 * i + 7 & 1 else 0) << 8 * i for i in range(4))


@given(WORDS, WORDS, WORDS)
def test_dp4a_is_a_product_of_bytes_modulo_a_word(a, b, c):
    x, y = (torch.tensor([word], dtype=torch.int64).to(torch.uint32).view(torch.int8).long() for word in (a, b))
    assert ptx.dp4a(a, b, c) == (int(x @ y) + c) % 2**32


def test_what_the_emulator_does_not_know_it_refuses():
    with pytest.raises(AssertionError, match=r"does not know 'mul.lo.u32'"):
        ptx.run("{ mul.lo.u32 $0, $1, $1; }", 3)
    with pytest.raises(KeyError):  # a register that nobody has written
        ptx.run("{ .reg .b32 t; mov.b32 $0, t; }", 3)


@given(st.lists(st.integers(0, 0xFFFF), min_size=2, max_size=2), st.sampled_from([4, 2]), st.booleans(), st.booleans())
def test_the_assembly_that_widens_codes_gives_each_code_and_its_offset(words, slices, is_signed, bf16):
    bits, dtype = 16 // slices, torch.bfloat16 if bf16 else torch.float16
    offset = Codes(bits, 16, is_signed).offset(dtype)
    for j in range(slices):
        out = ptx.run(widening(j, slices, is_signed, bf16), words[0] | words[1] << 16)
        for word, value in zip(words, ptx.floats(out, dtype).tolist(), strict=True):
            code = word >> bits * j & (1 << bits) - 1
            assert value == (ptx.signed(code, bits) if is_signed else code) + offset


BOOKS = {"NF4": NF4, "squares": tuple(float(i * i) for i in range(16)), "signs": tuple((-1.5) ** i for i in range(16))}


@given(st.lists(st.integers(0, 0xFFFF), min_size=2, max_size=2), st.sampled_from(sorted(BOOKS)), st.booleans())
def test_the_assembly_that_looks_codes_up_gives_the_entry_of_each(words, name, bf16):
    dtype = torch.bfloat16 if bf16 else torch.float16
    entries = torch.tensor(BOOKS[name]).to(dtype).double()
    outputs = ptx.run_all(looking_up(BOOKS[name], bf16), 4, words[0] | words[1] << 16)
    for j, out in enumerate(outputs):
        codes = [word >> 4 * j & 15 for word in words]
        assert torch.equal(ptx.floats(out, dtype), entries[codes])


def test_every_code_is_looked_up_in_every_place():
    for code in range(16):
        outputs = ptx.run_all(looking_up(NF4, True), 4, code * 0x11111111)
        assert all(ptx.floats(out, torch.bfloat16).unique() == torch.tensor(NF4[code]).bfloat16() for out in outputs)


def test_normal_float_is_what_its_paper_defines():
    """Quantiles of a normal distribution, eight of each sign's side sharing the zero, scaled so that the last is one."""
    normal, offset = torch.distributions.Normal(0.0, 1.0), 0.9677083
    above = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64))[:-1]
    below = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64))[:-1]
    levels = torch.cat([above, below, torch.zeros(1)]).sort().values
    torch.testing.assert_close(torch.tensor(NF4).double(), levels / levels.abs().max(), rtol=0, atol=1e-6)


@given(st.sampled_from([2, 3, 4]), st.integers(0, 2**32))
def test_the_assembly_that_lifts_codes_gives_each_code_at_the_top_of_its_byte(bits, seed):
    codes, width = Codes(bits), 4  # four bytes: one register
    top = 1 << bits - 1
    plain = torch.randint(-top, top, (1, codes.slices * width), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    words = codes.pack(plain, width).view(torch.uint8).view(codes.words, width).tolist()
    for j in range(codes.slices):
        moves = codes.moves(j)
        out = ptx.run(lifting(moves), *(int.from_bytes(words[tile], "little") for tile, _, _ in moves))
        lifted = [ptx.signed(out >> 8 * i, 8) for i in range(4)]
        assert lifted == [code << codes.magnified for code in plain[0, j * width : (j + 1) * width].tolist()]


@given(
    st.sampled_from([(2, 8), (3, 8), (4, 8), (4, 16), (8, 16)]), st.booleans(), st.integers(1, 5), st.integers(0, 99),
    st.sampled_from([4, 16, 64]),
)  # fmt: skip
def test_packing_is_lossless(form, is_signed, N, K, width):
    codes, bits = Codes(*form, is_signed), form[0]
    low = -(1 << bits - 1) if is_signed else 0
    plain = torch.randint(low, low + (1 << bits), (N, K)).to(torch.int8 if is_signed else torch.uint8)
    packed = codes.pack(plain, width)
    assert packed.dtype == (torch.int8 if form[1] == 8 else torch.int16)
    assert packed.numel() * form[1] == N * -(K // -(codes.slices * width)) * codes.slices * width * bits
    back = codes.unpack(packed, width)
    assert torch.equal(back[:, :K], plain) and not back[:, K:].any()
