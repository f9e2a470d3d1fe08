"""Laws of every format under every granularity, and what each promises about numbers that nobody wants."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, example, given
from strategies import float_dtypes, formats, granularities, searched_ranges, tensors
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant.errors import FxquantError, RecipeError
from fxquant.numerics.affine import IntAffine, QParams, check_finite
from fxquant.numerics.granularity import GRANULARITIES, Granularity, PerChannel, PerGroup, PerTensor, PerToken
from fxquant.numerics.ranges import Dynamic, Given, MinMSE

ALL_FORMATS = [IntAffine(b) for b in range(2, 9)] + [IntAffine(b, symmetric=False) for b in range(1, 9)]
floats32 = st.just(torch.float32)
floats64 = st.just(torch.float64)


@st.composite
def cases(draw: st.DrawFn, x: st.SearchStrategy[Tensor]) -> tuple[IntAffine, Granularity, Tensor]:
    tensor = draw(x)
    return draw(formats), draw(granularities(tuple(tensor.shape))), tensor


def quantized(form: IntAffine, granularity: Granularity, x: Tensor, qparams: QParams) -> Tensor:
    return form.decode(form.encode(x, qparams, granularity), qparams, granularity, x.dtype)


def blocks_of(granularity: Granularity, x: Tensor) -> Tensor:
    return granularity.split(x).double()


# Laws


@given(cases(tensors()))
def test_quantizing_twice_is_quantizing_once(case):
    form, granularity, x = case
    qparams = form.fit(x, granularity)
    once = quantized(form, granularity, x, qparams)
    assert torch.equal(quantized(form, granularity, once, qparams), once)


@given(cases(tensors(extreme=True)))
def test_zero_stays_zero(case):
    form, granularity, x = case
    zeros = torch.zeros_like(x)
    assert torch.equal(quantized(form, granularity, zeros, form.fit(x, granularity)), zeros)


@given(cases(tensors(st.sampled_from([torch.float32, torch.float64]), extreme=True)))
@example((IntAffine(2, symmetric=True), PerTensor(), torch.tensor([torch.finfo(torch.float32).max, 1e36])))
def test_the_error_is_at_most_half_a_step(case):
    form, granularity, x = case
    qparams = form.fit(x, granularity)
    error = (blocks_of(granularity, x) - blocks_of(granularity, quantized(form, granularity, x, qparams))).abs()
    # six roundings of eps / 2, three in the scale, 1 / scale, x * that, code * scale: each moves a number of up to L steps
    slack = 3 * form.qmax * torch.finfo(qparams.scale.dtype).eps
    # One bit of the whole range would need a wider step than there is; two symmetric ones need just the widest.
    capped = (qparams.scale == torch.finfo(qparams.scale.dtype).max) & (form.bits == 1)
    assert (error <= qparams.scale.double() * (0.5 + slack + 0.5 * capped.double())).all()


@given(cases(tensors(st.sampled_from([torch.bfloat16, torch.float16]), extreme=True)))
def test_half_precision_adds_its_own_rounding_and_no_more(case):
    form, granularity, x = case
    qparams = form.fit(x, granularity)
    exact = quantized(form, granularity, x.float(), qparams)
    assert torch.equal(quantized(form, granularity, x, qparams), exact.clamp(*_ends(x.dtype)).to(x.dtype))
    assert qparams.scale.dtype == torch.float32


def _ends(dtype: torch.dtype) -> tuple[float, float]:
    return torch.finfo(dtype).min, torch.finfo(dtype).max


@given(cases(tensors(extreme=True)))
def test_quantization_keeps_order(case):
    form, granularity, x = case
    order = blocks_of(granularity, x).argsort(-1)
    values = blocks_of(granularity, form.fake_quantize(x, granularity))
    if not isinstance(granularity, PerChannel):  # there a row of the last axis may mix scales
        assert (values.gather(-1, order).diff(dim=-1) >= 0).all()


@given(cases(tensors(extreme=True)))
def test_a_symmetric_grid_does_not_know_the_sign(case):
    form, granularity, x = case
    assume(form.symmetric)
    assert torch.equal(form.fake_quantize(-x, granularity), -form.fake_quantize(x, granularity))


@given(cases(tensors(floats32)), st.integers(-30, 30))
def test_a_power_of_two_passes_through_bit_for_bit(case, power):
    form, granularity, x = case
    once, scaled = form.fit(x, granularity), form.fit(x * 2.0**power, granularity)
    assert torch.equal(form.encode(x, once, granularity), form.encode(x * 2.0**power, scaled, granularity))
    assert torch.equal(form.fake_quantize(x * 2.0**power, granularity), form.fake_quantize(x, granularity) * 2.0**power)


@given(cases(tensors(extreme=True)), tensors(extreme=True))
def test_codes_are_codes_of_the_format_whatever_is_encoded(case, other):
    form, granularity, x = case
    qparams = form.fit(x, granularity)
    other = other.to(x.dtype).reshape(-1)[:1].expand(x.shape) if other.numel() else x
    for data in (x, other):
        codes = form.encode(data, qparams, granularity)
        assert codes.dtype == form.dtype and codes.shape == x.shape
        assert not codes.numel() or form.qmin <= codes.min() <= codes.max() <= form.qmax


@given(cases(tensors(extreme=True)))
def test_outputs_are_finite_and_keep_dtype_and_shape(case):
    form, granularity, x = case
    y = form.fake_quantize(x, granularity)
    assert y.dtype == x.dtype and y.shape == x.shape and y.isfinite().all()


@given(cases(tensors(extreme=True)))
def test_scales_are_normal_numbers_and_zero_blocks_have_scale_one(case):
    form, granularity, x = case
    scale, zero_point = form.fit(x, granularity)
    assert (scale >= torch.finfo(scale.dtype).tiny).all() and scale.isfinite().all()
    blocks = granularity.split(x)
    zero = granularity.reduce(torch.amax, blocks.abs()) == 0 if x.numel() else torch.ones_like(scale, dtype=torch.bool)
    assert (scale[zero] == 1).all()
    if form.symmetric:
        assert zero_point is None
    else:
        assert zero_point is not None and zero_point.dtype == torch.int32 and zero_point.shape == scale.shape
        assert ((zero_point >= 0) & (zero_point <= form.qmax)).all()


@given(cases(tensors(extreme=True)))
def test_the_ends_of_the_range_are_not_lost(case):
    """The largest magnitude keeps a code at an end of the grid, so no level is wasted."""
    form, granularity, x = case
    assume(form.symmetric and x.numel())
    blocks = granularity.split(x)
    largest = granularity.reduce(torch.amax, granularity.split(form.encode(x, form.fit(x, granularity), granularity)).abs())
    tiny = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).tiny
    normal = granularity.reduce(torch.amax, blocks.abs()).double() >= tiny * form.qmax
    assert (largest[normal] == form.qmax).all()


@given(tensors(extreme=True), formats, st.sampled_from([PerToken(), PerChannel(0), PerTensor(), PerGroup(1)]), st.randoms())
def test_the_order_of_rows_does_not_matter(x, form, granularity, random):
    assume(x.ndim > 1)
    rows = list(range(x.shape[0]))
    random.shuffle(rows)
    assert torch.equal(form.fake_quantize(x, granularity)[rows], form.fake_quantize(x[rows], granularity))


@given(tensors(extreme=True), formats, st.sampled_from([1, 2, 4]))
def test_a_finer_group_never_has_a_larger_step(x, form, size):
    assume(x.shape[-1] % (2 * size) == 0)
    fine, coarse = (form.fit(x, PerGroup(g)).scale.squeeze(-1) for g in (size, 2 * size))
    coarse = coarse.repeat_interleave(2, dim=-1)
    zero = PerGroup(size).split(x).abs().amax(-1) == 0  # scale 1 by definition, and no error
    assert ((fine <= coarse) | zero).all()


@given(cases(tensors(extreme=True)))
def test_strides_do_not_matter(case):
    form, granularity, x = case
    assert torch.equal(form.fake_quantize(x, granularity), form.fake_quantize(x.contiguous(), granularity))


@given(cases(tensors(floats64)), searched_ranges)
def test_the_searched_range_is_never_worse_than_the_whole_one(case, searched):
    form, granularity, x = case

    def squared_error(chosen):
        return granularity.reduce(torch.sum, granularity.split(form.fake_quantize(x, granularity, chosen) - x).square())

    found, whole = squared_error(searched), squared_error(Dynamic())
    assert (found <= whole * (1 + 1e-12)).all()


@given(cases(tensors()))
def test_a_given_range_equals_the_fitted_one_with_the_same_ends(case):
    form, _, x = case
    assume(x.numel())
    lo, hi = x.min().double().item(), x.max().double().item()
    assume(x.dtype != torch.float64)  # a given range is float32
    given_range = form.fit(x, PerTensor(), Given(lo, hi))
    assert _same(given_range, form.fit(x, PerTensor())) and _same(given_range, form.from_range(lo, hi))


@given(tensors(floats32, extreme=True), formats)
def test_packed_codes_come_back(x, form):
    codes = form.encode(x, form.fit(x, PerToken()), PerToken())
    assert torch.equal(form.unpack(form.pack(codes), x.shape[-1]), codes)


def _same(a: QParams, b: QParams) -> bool:
    if a.zero_point is None or b.zero_point is None:
        return a.zero_point is b.zero_point and torch.equal(a.scale, b.scale)
    return torch.equal(a.scale, b.scale) and torch.equal(a.zero_point, b.zero_point)


# The plain arithmetic of the module docstring, number by number, in Python floats


@given(tensors(floats64), formats)
def test_the_arithmetic_is_the_one_that_is_written_down(x, form):
    assume(x.numel())
    row = x.reshape(-1).tolist()
    lo, hi = min(*row, 0.0), max(*row, 0.0)
    if form.symmetric:
        scale = max(-lo, hi) * (1 / form.qmax) or 1.0
        zero_point = 0
    else:
        scale = (hi / 2 - lo / 2) * (2 / form.qmax) or 1.0
        zero_point = min(max(round(-lo * (1 / scale)), 0), form.qmax)
    codes = [min(max(round(v * (1 / scale)) + zero_point, form.qmin), form.qmax) for v in row]
    qparams = form.fit(x, PerTensor())
    assert form.encode(x, qparams, PerTensor()).reshape(-1).tolist() == codes
    assert form.fake_quantize(x, PerTensor()).reshape(-1).tolist() == [(c - zero_point) * scale for c in codes]


# NaN and infinity


@given(formats, st.sampled_from([torch.nan, torch.inf, -torch.inf]), float_dtypes)
def test_a_nan_or_an_infinity_spoils_its_row_and_no_other(form, bad, dtype):
    x = torch.linspace(-1, 1, 21).reshape(3, 7).to(dtype)
    x[1, 2] = bad
    y = form.fake_quantize(x, PerToken())
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@given(formats, st.sampled_from([torch.nan, torch.inf]))
def test_the_search_does_not_hide_a_nan(form, bad):
    weight = torch.tensor([[1.0, bad], [1.0, 2.0]])
    scale = form.fit(weight, PerChannel(0), MinMSE()).scale
    assert scale[0].isnan().all() and scale[1].isfinite().all()


@given(formats)
def test_an_infinity_saturates_under_a_given_range(form):
    x = torch.tensor([-torch.inf, 0.0, torch.inf])
    assert form.encode(x, form.from_range(-1.0, 1.0), PerTensor()).tolist()[::2] == [form.qmin, form.qmax]


def test_a_range_wider_than_float32_has_a_finite_step_even_at_one_bit():
    x = torch.tensor([1.5e38, -3e37, -2.2e38])
    assert (x.max().double() - x.min().double()) > torch.finfo(torch.float32).max
    assert all(form.fake_quantize(x, PerTensor()).isfinite().all() for form in ALL_FORMATS)


def test_a_weight_with_a_nan_is_named():
    check_finite("head.weight", torch.ones(2, 2))
    with pytest.raises(FxquantError, match=r"'head.weight' holds NaN or infinity \(1 of 4"):
        check_finite("head.weight", torch.tensor([[1.0, torch.nan], [0.0, 2.0]]))


# Tracing


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(-1), PerGroup(4), PerToken()], ids=str)
@pytest.mark.parametrize("form", [IntAffine(8), IntAffine(4, symmetric=False)], ids=str)
@pytest.mark.parametrize("chosen", [Dynamic(), MinMSE(3)], ids=str)
def test_one_trace_serves_every_number_of_tokens(form, granularity, chosen):
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        qparams = form.fit(x, granularity, chosen)
        codes = form.encode(x, qparams, granularity)
        return codes, form.decode(codes, qparams, granularity, x.dtype)

    graph = make_fx(fn, tracing_mode="symbolic")(torch.randn(3, 5, 8))
    generator = torch.Generator().manual_seed(0)
    for tokens in ((3, 5), (2, 9), (4, 4)):
        x = torch.randn(*tokens, 8, generator=generator)
        for traced, plain in zip(graph(x), fn(x), strict=True):
            assert torch.equal(traced, plain)


def test_a_static_range_traces_without_looking_at_data():
    form = IntAffine(8, symmetric=False)

    def fn(x: Tensor) -> Tensor:
        return form.fake_quantize(x, PerTensor(), Given(-1.0, 3.0))

    graph = make_fx(fn, tracing_mode="symbolic")(torch.randn(3, 8))
    x = torch.linspace(-2, 4, 40).reshape(5, 8)
    assert torch.equal(graph(x), fn(x))
    assert not any("amax" in str(node.target) for node in graph.graph.nodes)


@pytest.mark.slow
@pytest.mark.parametrize("form", [IntAffine(8), IntAffine(8, symmetric=False), IntAffine(4)], ids=str)
def test_the_compiled_arithmetic_is_equal_bit_for_bit(form):
    granularity = PerToken()

    def fn(x: Tensor) -> tuple[Tensor, ...]:
        qparams = form.fit(x, granularity)
        codes = form.encode(x, qparams, granularity)
        return codes, qparams.scale, form.decode(codes, qparams, granularity, x.dtype)

    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.bfloat16):
        x = (torch.randn(64, 300, generator=generator) * torch.logspace(-30, 30, 64)[:, None]).to(dtype)
        for compiled, plain in zip(torch.compile(fn, dynamic=True)(x), fn(x), strict=True):
            assert torch.equal(compiled, plain)


# Quality


@pytest.mark.parametrize("symmetric", [True, False])
def test_more_bits_are_better(symmetric):
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(5))
    errors = [_relative_error(form, x) for form in ALL_FORMATS if form.symmetric == symmetric]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.01


# sqrt(sum of squared errors / sum of squares) over groups of 64, as published for these quantizers on Gaussian data.
SYMMETRIC_ANCHORS = [(2, 0.716), (3, 0.250), (4, 0.108)]
REAL_ZERO_POINT_ANCHORS = [(2, 0.448), (3, 0.191), (4, 0.0893)]


def gaussian_groups() -> Tensor:
    return torch.randn(2048, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize(("bits", "expected"), SYMMETRIC_ANCHORS)
def test_the_error_on_gaussian_groups_is_the_known_one(bits, expected):
    assert _relative_error(IntAffine(bits), gaussian_groups()) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("bits", "expected"), REAL_ZERO_POINT_ANCHORS)
def test_an_integer_zero_point_costs_little_over_the_known_error(bits, expected):
    """The known error is that of a real zero point, which has no code for 0; an integer one was measured 1 to 2 % above it."""
    x = gaussian_groups()
    lo, hi = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = (hi - lo) / (2**bits - 1)
    real = ((((x - lo) / step).round() * step + lo - x).norm() / x.norm()).item()
    assert real == pytest.approx(expected, rel=0.02)
    assert real < _relative_error(IntAffine(bits, symmetric=False), x) < 1.03 * real


def test_the_search_pays_where_bits_are_few():
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(5))
    assert _relative_error(IntAffine(3), x, MinMSE()) < 0.9 * _relative_error(IntAffine(3), x)


def _relative_error(form: IntAffine, x: Tensor, chosen: Dynamic | MinMSE = Dynamic()) -> float:  # noqa: B008  (frozen)
    return ((form.fake_quantize(x, PerToken(), chosen) - x).norm() / x.norm()).item()


# Granularity


@given(tensors(), st.data())
def test_blocks_join_to_what_was_split(x, data):
    granularity = data.draw(granularities(tuple(x.shape)))
    assert torch.equal(granularity.join(granularity.split(x)), x)


@pytest.mark.parametrize(
    ("granularity", "shape"),
    [
        (PerTensor(), ()), (PerChannel(0), (6, 1, 1)), (PerChannel(-1), (1, 1, 8)), (PerGroup(4), (6, 5, 2, 1)),
        (PerToken(), (6, 5, 1)),
    ],
    ids=str,
)  # fmt: skip
def test_scales_have_the_documented_shape(granularity, shape):
    assert IntAffine(8).fit(torch.randn(6, 5, 8), granularity).scale.shape == shape


def test_one_axis_per_channel_is_one_scale_per_element():
    assert IntAffine(8).fit(torch.tensor([1.0, -2.0]), PerChannel(0)).scale.shape == (2,)


def test_a_group_that_does_not_divide_is_refused_with_both_numbers():
    assert "group size is 128 and the last axis has 1000" in str(PerGroup(128).refusal((7, 1000)))
    with pytest.raises(FxquantError, match=r"PerGroup\(size=128\) does not fit a tensor of shape \[7, 1000\]"):
        IntAffine(4).fit(torch.ones(7, 1000), PerGroup(128))


@given(st.integers(1, 300), st.integers(1, 5000))
def test_groups_are_fitted_to_the_largest_divisor_within_a_quarter(size, inner):
    found = PerGroup(size).fitted(inner).size
    divisors = [d for d in range(1, size + 1) if inner % d == 0 and (d >= size // 4 or d == inner)]
    assert found == max(divisors, default=size)


@given(tensors(), st.data())
def test_no_reason_to_refuse_means_that_it_works(x, data):
    some = [PerTensor(), PerToken(), *map(PerChannel, range(-4, 4)), *map(PerGroup, range(1, 9))]
    granularity = data.draw(st.sampled_from(some))
    if granularity.refusal(x.shape) is None:
        IntAffine(8).fake_quantize(x, granularity)
    else:
        with pytest.raises(FxquantError):
            granularity.split(x)


def test_a_scalar_has_one_scale_and_neither_rows_nor_groups():
    assert IntAffine(8).fake_quantize(torch.tensor(3.0), PerTensor()) == pytest.approx(3.0)
    refused = [kind for kind in GRANULARITIES if (PerGroup(2) if kind is PerGroup else kind()).refusal(())]
    assert refused == [PerChannel, PerGroup, PerToken]


# Refusals


def test_one_symmetric_bit_is_refused_and_the_way_out_is_named():
    with pytest.raises(RecipeError, match=r"use IntAffine\(1, symmetric=False\)"):
        IntAffine(1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: IntAffine(9), lambda: IntAffine(0), lambda: IntAffine(True), lambda: IntAffine("8"),
        lambda: IntAffine(torch.tensor(8)), lambda: IntAffine(8, symmetric=1), lambda: PerGroup(0), lambda: PerGroup(2.0),
        lambda: PerChannel("0"), lambda: Given(1.0, -1.0), lambda: Given(0.0), lambda: Given(0.0, torch.inf),
        lambda: Given(torch.tensor(0.0), 1.0), lambda: MinMSE(0), lambda: MinMSE(lowest=1.0),
        lambda: IntAffine(8).from_range(1.0, 0.0),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_when_it_is_written(make):
    with pytest.raises(RecipeError, match=r"needed|give both|swap them"):
        make()


def test_integers_are_not_quantized():
    with pytest.raises(FxquantError, match=r"torch.int64 is to be quantized"):
        IntAffine(8).fit(torch.arange(4), PerTensor())


def test_a_range_that_is_still_to_be_given_says_so():
    with pytest.raises(RecipeError, match="add \\(site, lo, hi\\)"):
        IntAffine(8).fit(torch.ones(2), PerTensor(), Given())
