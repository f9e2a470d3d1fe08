"""Low-bit linears on a CPU: what is packed comes back, integers are exact, floats within what their roundings may cost."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from instruction_sets import ISAS, needs_library, on
from torch import Tensor

from fxquant.backend.cpu import low_bit, ops
from fxquant.numerics.affine import IntAffine
from fxquant.numerics.granularity import PerGroup

pytestmark = needs_library
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# From one input to more than a chunk holds, sizes that fill no block among them.
sizes = st.sampled_from([1, 2, 5, 8, 31, 32, 64, 100, 128, 300])


class Weight:
    """A random weight [n, groups * size]: its codes, the values that they stand for, and how they are packed."""

    def __init__(self, bits: int, symmetric: bool, n: int, groups: int, size: int, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.format, self.granularity = IntAffine(bits, symmetric=symmetric), PerGroup(size)
        self.bits, self.size, self.n, self.k = bits, size, n, groups * size
        weight = torch.randn(n, self.k, generator=self.generator)
        self.qparams = self.format.fit(weight, self.granularity)
        self.codes = self.format.encode(weight, self.qparams, self.granularity)
        self.values = self.decoded(torch.float32).double()

    def decoded(self, dtype: torch.dtype) -> Tensor:
        return self.format.decode(self.codes, self.qparams, self.granularity, dtype)

    def packed(self, scale: Tensor | None = None) -> low_bit.Packed:
        zero_point = self.qparams.zero_point
        zero_point = None if zero_point is None else zero_point.flatten(1)
        scale = self.qparams.scale if scale is None else scale
        return low_bit.pack(self.codes, scale.flatten(1), zero_point, self.bits, self.size)

    def rows(self, m: int) -> Tensor:
        return torch.randn(m, self.k, generator=self.generator)

    def how(self, bias: Tensor | None = None, activation: str = "none", dtype: torch.dtype = torch.float32) -> Any:
        return bias, self.bits, self.size, self.n, activation, dtype


@st.composite
def weights(draw: st.DrawFn) -> Weight:
    bits = draw(st.integers(1, 8))
    symmetric = bits > 1 and draw(st.booleans())
    return Weight(bits, symmetric, draw(st.integers(1, 150)), draw(st.integers(1, 4)), draw(sizes), draw(st.integers(0, 2**16)))


@given(weights())
def test_what_is_packed_comes_back_without_its_zero_point(weight: Weight) -> None:
    words, scale, terms = weight.packed()
    zero_point = weight.qparams.zero_point
    wanted = weight.codes.to(torch.int32).view(weight.n, -1, weight.size) - (0 if zero_point is None else zero_point)
    assert torch.equal(low_bit.unpack(words, terms, weight.bits, weight.size, weight.n), wanted)
    assert torch.equal(scale.transpose(1, 2).flatten(0, 1)[: weight.n], weight.qparams.scale.flatten(1))


@pytest.mark.parametrize(("bits", "bytes_each"), [(8, 1), (4, 1 / 2), (3, 3 / 8), (2, 1 / 4), (1, 1 / 8)])
def test_codes_take_their_bits_and_no_more(bits: int, bytes_each: float) -> None:
    assert Weight(bits, False, 128, 2, 128).packed()[0].numel() == 128 * 256 * bytes_each


@given(weights(), st.sampled_from(FLOATS))
def test_a_weight_is_decoded_to_the_last_bit_of_the_contract(weight: Weight, dtype: torch.dtype) -> None:
    found = torch.empty(weight.k, weight.n, dtype=dtype)
    low_bit.decode(*weight.packed(), weight.bits, weight.size, found)
    assert torch.equal(found.t(), weight.decoded(dtype))


@pytest.mark.parametrize("isa", ISAS)
@given(weights(), st.integers(0, 40), st.booleans())
def test_integers_are_exact(isa: str, weight: Weight, m: int, per_row: bool) -> None:
    """With scales of 1 and 2, and sums below 2^24, there is nothing to round."""
    generator = torch.Generator().manual_seed(m)
    most = min(255, 2**24 // (weight.k * 255 * 2))
    scale = 2.0 ** torch.randint(0, 2, (weight.n, weight.k // weight.size), generator=generator)
    codes = torch.randint(0, most + 1, (m, weight.k), generator=generator, dtype=torch.uint8)
    zero = torch.randint(0, most + 1, (m, 1) if per_row else (), generator=generator, dtype=torch.int32)
    args = (codes, torch.full_like(zero, 2, dtype=torch.float32), zero, *weight.packed(scale), *weight.how())
    found, wanted = on(isa, low_bit.linear_u8, *args), low_bit.linear_u8_reference(*args)
    assert torch.equal(found, wanted)


AVX512 = ISAS != ("avx2",)


def bound(weight: Weight, x: Tensor, values: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """What roundings cost at most; the last is to the dtype of the result.

    On AVX2 one in float32 per input of a group, per group and for the bias. On AVX512 half a step per input, integers of 24 or
    16 bits in steps that a power of two makes of their group's largest; 2 % of that and three in float32 where sums of digits
    are put together (digits are not signed, so a sum of them may be larger than what it stands for); one per group; the bias.
    """
    size = x.double().abs() @ values.abs().t() + (0 if bias is None else bias.double().abs())
    limits, groups = torch.finfo(y.dtype), (weight.k // weight.size, weight.size)
    grouped, each = x.double().abs().unflatten(1, groups), values.abs().unflatten(1, groups)
    half_steps = 2.0 ** (1 - bits_of(x.dtype, weight.size)) * grouped.amax(-1) @ each.sum(-1).t()
    inputs = 1.02 * half_steps if AVX512 else weight.size * 2.0**-24 * size
    count = groups[0] + (6 if AVX512 else 3)
    return 1.01 * count * 2.0**-24 * size + 1.01 * inputs + 0.51 * limits.eps * y.double().abs() + limits.tiny


def bits_of(dtype: torch.dtype, size: int) -> int:
    """Of the integers that activations in groups of ``size`` become."""
    return 24 if dtype == torch.float32 or size > 256 else 16


@pytest.mark.skipif(not AVX512, reason="on AVX2 activations stay floats")
@given(st.sampled_from(FLOATS), st.sampled_from([1, 5, 64, 100, 300]), st.integers(1, 5), st.integers(0, 2**16))
def test_activations_are_rounded_to_the_last_bit_of_the_contract(dtype: torch.dtype, size: int, m: int, seed: int) -> None:
    """Seen through one input per output."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, 2 * size, generator=generator)
    x = (x * 2 ** torch.randint(-20, 3, x.shape, generator=generator)).to(dtype)
    limits = torch.finfo(dtype)
    highest = torch.nextafter(torch.tensor(2.0, dtype=dtype), torch.tensor(0.0, dtype=dtype))
    specials = torch.tensor([2.0, -2.0, -0.0, limits.max, -limits.max, limits.tiny, -limits.tiny / 4, 1.2e-38]).to(dtype)
    specials = torch.cat([specials, highest.view(1), -highest.view(1)])
    kind = int(torch.randint(0, 4, (), generator=generator))
    if kind == 1:
        x[:, 0] = specials[torch.randint(0, len(specials), (m,), generator=generator)]
    elif kind == 2:
        x = specials[torch.randint(0, len(specials), x.shape, generator=generator)]
    elif kind == 3:
        x[:, size:] = 0
    packed = low_bit.pack(torch.eye(2 * size, dtype=torch.int8), torch.ones(2 * size, 2), None, 8, size)
    y = low_bit.linear_float(x, *packed, None, 8, size, 2 * size, "none", torch.float32)
    groups, bits = x.double().unflatten(1, (2, size)), bits_of(dtype, size)
    _, exponent = torch.frexp(groups.abs().amax(-1, keepdim=True))
    step = 2.0 ** (exponent - (bits - 1)).clamp(min=-126).double()
    most = 2 ** (bits - 1) - 1
    wanted = ((groups / step).round().clamp(-most, most) * step).flatten(1).float()
    assert torch.equal(y, wanted)


@given(weights(), st.integers(0, 20), st.sampled_from(FLOATS), st.booleans(), st.sampled_from([0.0, 1.0, 4.0]))
def test_a_float_product_errs_by_its_roundings_alone(
    weight: Weight, m: int, dtype: torch.dtype, with_bias: bool, spread: float
) -> None:
    """``spread``: how many powers of two activations, which have outliers, are apart."""
    x = weight.rows(m)
    x = x * 2 ** (spread * torch.randn(x.shape, generator=weight.generator))
    x = (4 * x / (x.abs().max() if m else 1)).to(dtype)  # no result is too large for float16
    bias = torch.randn(weight.n, generator=weight.generator).to(dtype) if with_bias else None
    y = low_bit.linear_float(x, *weight.packed(), *weight.how(bias, dtype=dtype))
    assert y.dtype == dtype and bool(y.isfinite().all())
    wanted = x.double() @ weight.values.t() + (0 if bias is None else bias.double())
    assert bool(((y.double() - wanted).abs() <= bound(weight, x, weight.values, bias, y)).all())


@given(weights(), st.integers(1, 20), st.sampled_from(FLOATS))
def test_many_rows_meet_decoded_weights(weight: Weight, m: int, dtype: torch.dtype) -> None:
    """What rounds besides: the decoded weight, and the result before its bias, in ``dtype``."""
    x, bias = weight.rows(m).to(dtype), torch.randn(weight.n, generator=weight.generator)
    y = low_bit.linear_decoded(x, *weight.packed(), *weight.how(bias, dtype=dtype))
    values = weight.decoded(dtype).double()
    size = x.double().abs() @ values.abs().t() + bias.double().abs()
    assert y.dtype == dtype
    unit = (weight.k + 1) * 2.0**-24 + 3 * torch.finfo(dtype).eps
    assert bool(((y.double() - (x.double() @ values.t() + bias.double())).abs() <= unit * size + 1e-6).all())


def test_more_rows_of_bfloat16_than_are_worth_it_meet_decoded_weights() -> None:
    weight = Weight(4, True, 70, 2, 32)
    x, bias = weight.rows(300).bfloat16().view(3, 100, -1), torch.randn(70)
    args = (x, *weight.packed(), *weight.how(bias, "gelu", torch.bfloat16))
    assert torch.equal(low_bit.linear_float(*args), low_bit.linear_decoded(*args))


MANY = [torch.float16, torch.float32] if AVX512 else [torch.float16]
"""Of which any number of rows meets codes; of others many meet decoded weights."""


@pytest.mark.parametrize(
    ("dtype", "rows"), [*((dtype, 30) for dtype in FLOATS), *((dtype, n) for dtype in MANY for n in (479, 480, 481, 1000))]
)
@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16])
def test_any_number_of_rows_is_multiplied_as_each_of_them_alone(dtype: torch.dtype, rows: int, to: torch.dtype) -> None:
    weight = Weight(4, False, 256, 3, 100)
    x = weight.rows(rows).to(dtype)
    for op, end in (
        (low_bit.linear_float, (*weight.packed(), *weight.how(torch.randn(256), "gelu", to))),
        (low_bit.gated_float, gated(weight, torch.randn(256), "silu", to)),
    ):
        y = op(x, *end)
        for row in (0, 5, 29, 31, 32, 478, 480, rows - 1):
            if row < rows:
                assert torch.equal(y[row], op(x[row], *end))


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_epilogue_is_that_of_int8(activation: str, dtype: torch.dtype) -> None:
    weight = Weight(4, False, 70, 3, 32)
    bias, x = torch.randn(70).to(dtype), weight.rows(5)
    for found, wanted in (
        (low_bit.linear_float, low_bit.linear_float_reference),
        (lambda x, *rest: low_bit.linear_u8(*ops.quantize_rows(x, 8, False), *rest),
         lambda x, *rest: low_bit.linear_u8_reference(*ops.quantize_rows(x, 8, False), *rest)),
    ):  # fmt: skip
        args = (x, *weight.packed(), *weight.how(bias, activation, dtype))
        torch.testing.assert_close(found(*args), wanted(*args), rtol=max(2e-6, torch.finfo(dtype).eps), atol=2e-6 * 20)


def gated(weight: Weight, bias: Tensor | None, activation: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments of a gated product behind its rows: the first half of the outputs are the gates."""
    return *weight.packed(), bias, weight.bits, weight.size, weight.n // 2, activation, dtype


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@given(st.integers(1, 8), st.integers(1, 3), sizes, st.sampled_from([0, 1, 2, 7, 20, 100]), st.booleans(), st.booleans())
def test_a_gated_product_is_that_of_its_halves(
    isa: str, activation: str, bits: int, groups: int, size: int, m: int, symmetric: bool, with_bias: bool
) -> None:
    """To the last bit in float32, where the result of a half is the same number in and out of a register."""
    weight = Weight(bits, symmetric and bits > 1, 256, groups, size)
    bias = torch.randn(256, generator=weight.generator) if with_bias else None
    x = weight.rows(m)
    codes = ops.quantize_rows(x, 8, False)
    biases = (None, None) if bias is None else bias.split(128)
    for op, read in ((low_bit.linear_float, (x,)), (low_bit.linear_u8, codes)):
        gate, up = (
            on(isa, op, *read, *packed, of_half, bits, size, 128, name, torch.float32)
            for *packed, of_half, name in zip(*(t.split(2) for t in weight.packed()), biases, (activation, "none"), strict=True)
        )
        found = on(isa, low_bit.GATED[op], *read, *gated(weight, bias, activation, torch.float32))
        assert torch.equal(found, gate * up)


@pytest.mark.parametrize("rows", [3, 300])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_gated_product_is_what_it_is_called(dtype: torch.dtype, rows: int) -> None:
    weight = Weight(4, False, 256, 3, 32)
    bias, x = torch.randn(256, generator=weight.generator).to(dtype), weight.rows(rows).to(dtype)
    args = gated(weight, bias, "silu", dtype)
    codes = ops.quantize_rows(x, 8, False)
    # Where many rows meet decoded weights the two halves are rounded too: four halves of an eps in the gate (weight, product,
    # bias, function), three in what it lets through, one in their product.
    decoded = rows == 300 and (dtype == torch.bfloat16 or (dtype == torch.float32 and not AVX512))
    rough = (4 if decoded else 1) * torch.finfo(dtype).eps
    for found, wanted, limit in (
        (low_bit.gated_float(x, *args), low_bit.gated_float_reference(x, *args), rough),
        (low_bit.gated_u8(*codes, *args), low_bit.gated_u8_reference(*codes, *args), torch.finfo(dtype).eps),
    ):
        assert found.dtype == dtype
        error = (found.double() - wanted.double()).abs().max() / wanted.double().abs().max()
        assert error <= max(2e-6, limit)


def test_gates_that_fill_no_panel_are_refused() -> None:
    weight = Weight(4, True, 140, 2, 32)
    with pytest.raises(RuntimeError, match="70 gates; a multiple of 64 is needed"):
        low_bit.gated_float(weight.rows(2), *gated(weight, None, "silu", torch.float32))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_neither_threads_nor_the_rows_beside_change_a_bit(bits: int) -> None:
    weight = Weight(bits, False, 200, 3, 300)
    x, threads = weight.rows(110), torch.get_num_threads()
    prepared = ops.quantize_rows(x, 8, False)
    integers, floats = [], []
    for number in (1, 2):
        torch.set_num_threads(number)
        integers.append(low_bit.linear_u8(*prepared, *weight.packed(), *weight.how()))
        floats.append(low_bit.linear_float(x, *weight.packed(), *weight.how()))
    torch.set_num_threads(threads)
    assert torch.equal(*integers) and torch.equal(*floats)
    for rows in (slice(0, 1), slice(3, 5), slice(7, 25), slice(100, 110)):
        part = low_bit.linear_u8(*(t[rows] for t in prepared), *weight.packed(), *weight.how())
        assert torch.equal(part, integers[0][rows])
        assert torch.equal(low_bit.linear_float(x[rows], *weight.packed(), *weight.how()), floats[0][rows])


def test_the_instruction_sets_agree_to_the_last_bit() -> None:
    for size in (5, 32, 64, 128, 300):
        weight = Weight(4, False, 100, 2, size)
        for m in (1, 3, 16, 17, 130):
            args = (*ops.quantize_rows(weight.rows(m), 8, False), *weight.packed(), *weight.how())
            assert len({tuple(on(isa, low_bit.linear_u8, *args).flatten().tolist()) for isa in ISAS}) == 1


@pytest.mark.parametrize("size", [5, 32])
def test_what_is_not_finite_stays_in_its_output_and_in_its_row(size: int) -> None:
    weight = Weight(4, False, 70, 3, size)
    scale = weight.qparams.scale.clone()
    scale[9, 1] = torch.nan
    x = weight.rows(4)
    x[2, size] = torch.inf
    prepared = ops.quantize_rows(x, 8, False)
    for y in (low_bit.linear_float(x, *weight.packed(scale), *weight.how()),
              low_bit.linear_u8(*prepared, *weight.packed(scale), *weight.how())):  # fmt: skip
        wanted = torch.ones(4, 70, dtype=torch.bool)
        wanted[2], wanted[:, 9] = False, False
        assert torch.equal(y.isfinite() & wanted, wanted)
        assert not y[2].isfinite().any() and bool(y[:, 9].isnan().all())
        assert not AVX512 or bool(y[2].isnan().all())


def test_strides_and_leading_shapes_do_not_matter() -> None:
    weight = Weight(4, True, 70, 2, 32)
    x = weight.rows(6)
    args = (*weight.packed(), *weight.how())
    y = low_bit.linear_float(x, *args)
    assert torch.equal(low_bit.linear_float(x.t().contiguous().t(), *args), y)
    assert torch.equal(low_bit.linear_float(x.view(2, 1, 3, -1), *args), y.view(2, 1, 3, -1))


def test_sizes_that_do_not_agree_are_refused() -> None:
    weight = Weight(4, True, 70, 2, 32)
    with pytest.raises(RuntimeError, match="sizes do not agree"):
        low_bit.linear_float(weight.rows(2)[:, :60], *weight.packed(), *weight.how())
    with pytest.raises(RuntimeError, match="sizes do not agree"):
        low_bit.linear_float(weight.rows(2), *weight.packed(), *weight.how(torch.zeros(69)))
    wide = Weight(1, False, 1, 1, low_bit.MOST_INPUTS + 1)
    with pytest.raises(RuntimeError, match="groups of 33026 inputs; at most 33025 are summed exactly"):
        low_bit.linear_float(wide.rows(1), *wide.packed(), *wide.how())
