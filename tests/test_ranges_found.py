"""What each observer promises about the range it finds. The laws of all of them: test_observers.py."""

import math
from collections.abc import Sequence
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from observing import UINT6, at_hand, batches, either, found, given_spec, seen
from strategies import formats
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant.errors import CalibrationError, RecipeError
from fxquant.numerics.affine import IntAffine
from fxquant.numerics.entropy import Entropy
from fxquant.numerics.extremes import AverageMinMax, MinMax, MovingAverage
from fxquant.numerics.granularity import PerChannel, PerTensor
from fxquant.numerics.learned import LSQ
from fxquant.numerics.least_error import GoldenMSE, MinMSE
from fxquant.numerics.observer import Observer
from fxquant.numerics.percentile import Percentile
from fxquant.numerics.ranges import Dynamic, Given
from fxquant.numerics.token_wise import TokenWise, clipped
from fxquant.recipe import Spec

# Averages and extremes


@given(batches())
def test_the_average_is_of_the_extremes_of_batches(data):
    lo, hi = found(AverageMinMax(), data, PerTensor())
    assert math.isclose(lo, math.fsum(x.min().item() for x in data) / len(data), rel_tol=1e-6, abs_tol=1e-30)
    assert math.isclose(hi, math.fsum(x.max().item() for x in data) / len(data), rel_tol=1e-6, abs_tol=1e-30)


def test_a_moving_average_follows_its_formula():
    data = [torch.tensor([[-1.0, 4.0]]), torch.tensor([[-3.0, 8.0]]), torch.tensor([[0.0, 0.0]])]
    lo, hi = found(MovingAverage(0.75), data, PerTensor())
    assert (lo.item(), hi.item()) == (-1.5 * 0.75, 5.0 * 0.75)


# Percentile


@given(either, batches(), st.floats(0.5, 1, exclude_min=True))
def test_the_percentile_of_watched_data_is_that_of_all_data_up_to_a_bin(granularity, data, q):
    lo, hi = found(Percentile(q), data, granularity)
    x = torch.cat(data)
    exact_lo, exact_hi = Percentile(q).of(x, granularity, lambda lo, hi: x)
    bin = 1 / 256 if lo.numel() == 1 else 1 / 32
    lost = x.abs().amax() * 2.0**-15  # below the window of octaves
    for end, exact, outward in ((lo, exact_lo.reshape(lo.shape), -1), (hi, exact_hi.reshape(hi.shape), 1)):
        error = (end - exact) * outward
        assert (error >= -lost).all() and (error <= exact.abs() * bin + lost).all()


@given(batches(), st.floats(0.5, 1, exclude_min=True))
def test_a_percentile_leaves_out_no_more_than_it_says(data, q):
    x = torch.cat(data)
    lo, hi = Percentile(q).of(x, PerTensor(), lambda lo, hi: x)
    allowed = x.numel() - math.ceil(q * x.numel())
    assert (x < lo).sum() <= allowed and (x > hi).sum() <= allowed


@given(batches())
def test_the_whole_percentile_is_min_max(data):
    assert found(Percentile(1), data, PerTensor()) == found(MinMax(), data, PerTensor())


@given(st.floats(1e-3, 1.0), st.floats(1e8, 1e30))
def test_a_percentile_of_what_one_value_drowns_stays_within_the_extremes(small, large):
    """So much smaller than the largest that the histogram takes it for zero, which is below all of the data."""
    lo, hi = found(Percentile(0.9), [torch.tensor([[large]]), torch.full((10, 1), small)], PerTensor())
    assert torch.tensor(small) <= lo <= hi


# Least squared error


@given(either, batches(), formats, st.sampled_from([MinMSE(2, 0.25), GoldenMSE(2)]))
def test_the_searched_range_is_not_worse_than_min_max_but_for_the_histogram(granularity, data, form, searched):
    x = torch.cat(data)

    def error(observer: Observer) -> Tensor:
        off = given_spec(form, granularity, *found(observer, data, granularity, form)).fake_quantize(x) - x
        return granularity.reduce(torch.mean, off.double().square()).sqrt()

    bin, window = (1 / 512, 2.0**-23) if granularity == PerTensor() or x.shape[1] == 1 else (1 / 64, 2.0**-15)
    size = granularity.reduce(torch.mean, x.double().square()).sqrt()
    hidden = 2 * (size * bin + granularity.reduce(torch.amax, x.abs()) * window)
    slack = 1 + 4 * form.qmax * torch.finfo(torch.float32).eps  # the arithmetic itself, as in test_formats
    assert (error(searched) <= (error(MinMax()) + hidden) * slack).all()


@given(at_hand(), formats, st.builds(GoldenMSE, st.integers(1, 12)))
def test_golden_section_on_a_weight_is_never_worse_than_its_extremes(case, form, searched):
    granularity, x = case

    def squared_error(chosen: Observer | Dynamic) -> Tensor:
        y = form.fake_quantize(x.double(), granularity, chosen)
        return granularity.reduce(torch.sum, granularity.split(y - x).square())

    assert (squared_error(searched) <= squared_error(Dynamic()) * (1 + 1e-12)).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_grid_and_golden_section_find_the_least_error_there_is(bits, symmetric):
    form = IntAffine(bits, symmetric=symmetric)
    x = torch.randn(200, 50, generator=torch.Generator().manual_seed(0)) ** 3

    def error(lo: float, hi: float) -> float:
        return (form.fake_quantize(x, PerTensor(), Given(lo, hi)) - x).square().mean().item()

    lo, hi = (end.item() for end in found(MinMax(), [x], PerTensor()))
    least = min(error(lo * k / 60, hi * k / 60) for k in range(2, 61))
    for observer in (MinMSE(), GoldenMSE()):
        assert error(*(end.item() for end in found(observer, [x], PerTensor(), form))) < 1.01 * least


def test_ends_that_move_apart_suit_an_outlier_on_one_side():
    x = torch.randn(100, 128, generator=torch.Generator().manual_seed(0))
    x[:, 0] += 25
    form = IntAffine(4, symmetric=False)
    lo, hi = (end.item() for end in found(GoldenMSE(), [x], PerTensor(), form))

    def error(lo: float, hi: float) -> float:
        return (form.fake_quantize(x, PerTensor(), Given(lo, hi)) - x).square().mean().item()

    together = min(error(x.min().item() * k / 100, x.max().item() * k / 100) for k in range(5, 101))
    assert error(lo, hi) < 0.92 * together


def test_one_massive_value_does_not_blind_the_search():
    x = torch.randn(200, 200, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 3000.0
    form = IntAffine(8, symmetric=False)

    def error(lo: Tensor, hi: Tensor) -> float:
        return (form.fake_quantize(x, PerTensor(), Given(lo.item(), hi.item())) - x).square().mean().item()

    for observer in (Entropy(), Percentile(0.9999)):
        lo, hi = found(observer, [x], PerTensor(), form)
        assert -5 < lo < -3 and 3 < hi < 6, observer
    x[0, 0] = 50.0  # the square of 3000 is worth keeping; that of 50, shared among so many, is worth a part
    least = min(error(torch.tensor(-4.5), torch.tensor(hi / 4)) for hi in range(12, 200, 4))
    for observer in (MinMSE(8), GoldenMSE()):
        assert error(*found(observer, [x], PerTensor(), form)) < 1.02 * least, observer


# Entropy


def divergence_in_plain_python(x: Tensor, form: IntAffine, lo: float, hi: float) -> float:
    """The definition at the head of entropy.py, bin by bin, with bins found by frexp."""
    bins: dict[tuple[int, int, int], int] = {}
    for v in x.flatten().tolist():
        if v:
            mantissa, exponent = math.frexp(abs(v))
            key = (int(math.copysign(1, v)), exponent, int(mantissa * 512))
            bins[key] = bins.get(key, 0) + 1
    least, most = x.min().item(), x.max().item()
    middles = {
        key: min(max(key[0] * math.ldexp(key[2] + 0.5, key[1] - 9), least), most) for key in bins
    }  # fmt: skip
    order = sorted(bins, key=middles.__getitem__)
    inside = [key for key in order if lo <= middles[key] <= hi]
    reference = {key: bins[key] for key in inside}
    for key in order:
        if key not in reference:
            reference[inside[0] if middles[key] < lo else inside[-1]] += bins[key]
    spec = Spec(form, PerTensor(), Given(lo, hi))
    code = {key: spec.fake_quantize(torch.tensor([middles[key]])).item() for key in inside}
    width = {key: math.ldexp(1, key[1] - 9) for key in inside}
    total, kept = sum(bins.values()), sum(bins[key] for key in inside)
    result = 0.0
    for key in inside:
        mates = [other for other in inside if code[other] == code[key]]
        q = sum(bins[m] for m in mates) / kept * width[key] / sum(width[m] for m in mates)
        result += reference[key] / total * math.log(reference[key] / total / q)
    return result


@pytest.mark.parametrize("form", [IntAffine(4), IntAffine(4, symmetric=False)], ids=str)
def test_the_range_of_least_divergence_is_that_of_the_definition(form):
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)) ** 3 + 0.3
    lo, hi = (end.item() for end in found(Entropy(2), [x], PerTensor(), form))
    least, most = x.min().item(), x.max().item()
    reach = max(-least, most)
    factors = [2 ** (-k / 2) for k in range(12)]
    if form.symmetric:
        ranges = [(-reach * f, reach * f) for f in factors]
        chosen = (-max(-lo, hi), max(-lo, hi))
    else:
        ranges = [(max(least, -reach * f), min(most, reach * f)) for f in factors]
        chosen = (lo, hi)
    divergence = divergence_in_plain_python(x, form, *chosen)
    assert divergence <= min(divergence_in_plain_python(x, form, *ends) for ends in ranges) + 1e-9


def test_two_sided_entropy_moves_the_ends_apart():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 50, generator=generator)
    x[0, 0] += 60.0
    lo, hi = found(Entropy(), [x], PerTensor(), IntAffine(8, symmetric=False))
    assert -6 < lo < -3 and hi < 30


# Token-wise clipping


def clipped_in_plain_torch(data: Sequence[Tensor], ratio: float) -> tuple[float, float]:
    """Outlier Suppression's coarse stage as its released code has it, quantile and all."""
    lows, highs = [], []
    for x in data:
        upper, lower = x.double().amax(1), x.double().amin(1)
        highs.append(upper[upper <= upper.abs().quantile(ratio)].max())
        lows.append(lower[lower >= -lower.abs().quantile(ratio)].min())
    return torch.stack(lows).mean().item(), torch.stack(highs).mean().item()


# Of nine decimals: PyTorch's quantile of a ratio nearer to 1 is interpolated to the largest value itself.
ratios = st.one_of(st.floats(0.01, 1).map(lambda ratio: round(ratio, 9)), st.sampled_from(TokenWise.candidates(4, 32, 128)))


@given(batches(), ratios)
def test_token_wise_clipping_is_the_published_formula(data, ratio):
    lo, hi = found(TokenWise(ratio), data, PerTensor())
    low, high = clipped_in_plain_torch(data, ratio)
    if low > high:  # the published ends may cross; what a format sees, widened to hold zero, is the same
        lo, hi, low, high = min(lo, 0), max(hi, 0), min(low, 0), max(high, 0)
    assert math.isclose(lo, low, rel_tol=1e-6, abs_tol=1e-30) and math.isclose(hi, high, rel_tol=1e-6, abs_tol=1e-30)


@given(either, batches())
def test_ratio_one_is_the_average_of_extremes_bit_for_bit(granularity, data):
    whole = found(TokenWise(1.0), data, granularity)
    assert all(torch.equal(a, b) for a, b in zip(whole, found(AverageMinMax(), data, granularity), strict=True))


@given(either, batches(), st.lists(ratios, min_size=2, max_size=6))
def test_ranges_are_nested_as_the_ratio_falls(granularity, data, chosen):
    state = seen(TokenWise(), data, granularity)
    ranges = [TokenWise().with_ratio(r).range(state, UINT6, granularity) for r in sorted(chosen, reverse=True)]
    for (lo, hi), (inner_lo, inner_hi) in pairwise(ranges):
        assert (lo.clamp(max=0) <= inner_lo.clamp(max=0)).all() and (inner_hi.clamp(min=0) <= hi.clamp(min=0)).all()


@given(batches(), st.lists(ratios, min_size=2, max_size=6))
def test_ends_of_tokens_fall_with_the_ratio(data, chosen):
    upper = data[0].amax(1, keepdim=True)
    ends = [clipped(upper, ratio) for ratio in sorted(chosen)]
    assert all(inner <= outer for inner, outer in pairwise(ends)) and all(upper.eq(end).any() for end in ends)


@given(batches())
def test_no_ratio_drops_every_token(data):
    lo, hi = found(TokenWise(1e-9), data, PerTensor())
    assert lo.isfinite() and hi.isfinite() and lo <= hi


def test_one_state_answers_for_every_ratio():
    x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    x[3] *= 100
    state = seen(TokenWise(), [x], PerTensor())
    assert TokenWise(1.0).range(state, UINT6, PerTensor())[1] > 50 > 5 > TokenWise(0.98).range(state, UINT6, PerTensor())[1]


def test_a_ratio_that_is_still_to_be_searched_says_so():
    state = seen(TokenWise(), [torch.ones(2, 2)], PerTensor())
    with pytest.raises(CalibrationError, match=r"has no ratio.*with_ratio\(0.99\)"):
        TokenWise().range(state, UINT6, PerTensor())


def test_the_ratio_found_keeps_the_rest():
    assert TokenWise(fine=True).with_ratio(0.9) == TokenWise(0.9, fine=True)
    assert TokenWise(fine=True).learned and not TokenWise().learned and LSQ().learned and not MinMax().learned


@pytest.mark.parametrize(
    ("bits", "batch", "length", "number", "second"),
    [
        (8, 32, 128, 10, 0.99), (6, 32, 128, 30, 0.99), (4, 32, 128, 90, 0.99), (6, 4, 1024, 30, 0.99),
        (8, 32, 384, 30, 0.9967), (6, 32, 384, 90, 0.9967), (4, 32, 384, 272, 0.9967), (2, 1, 1, 90, 0.99),
    ],
)  # fmt: skip
def test_the_candidates_are_those_of_the_paper(bits, batch, length, number, second):
    candidates = TokenWise.candidates(bits, batch, length)
    assert len(candidates) == number and candidates[:2] == (1.0, second)
    assert all(a > b > 0 for a, b in pairwise(candidates))
    assert all(TokenWise().with_ratio(ratio) for ratio in candidates)


# Ranges that are given per channel


def test_a_range_per_channel_is_given_as_tuples():
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    spec = Spec(UINT6, PerChannel(-1), Given([-1.0, -0.5], [2.0, 0.25]))
    assert spec.range == Given((-1.0, -0.5), (2.0, 0.25)) and hash(spec) == hash(Spec.from_json(spec.to_json()))
    for channel, ends in enumerate([(-1.0, 2.0), (-0.5, 0.25)]):
        alone = UINT6.fake_quantize(x[:, channel], PerTensor(), Given(*ends))
        assert torch.equal(spec.fake_quantize(x)[:, channel], alone)
    assert torch.equal(spec.fake_quantize(x[None]), spec.fake_quantize(x)[None])


def test_a_range_per_channel_traces_without_looking_at_data():
    spec = Spec(UINT6, PerChannel(-1), Given((-1.0, -0.5), (2.0, 0.25)))
    graph = make_fx(lambda x: spec.fake_quantize(x), tracing_mode="symbolic")(torch.randn(3, 2))
    x = torch.linspace(-2, 4, 10).reshape(5, 2)
    assert torch.equal(graph(x), spec.fake_quantize(x))


def test_given_tuples_that_do_not_fit_are_refused():
    with pytest.raises(RecipeError, match=r"one per channel, the granularity is PerTensor\(\); use PerChannel"):
        Spec(UINT6, PerTensor(), Given((0.0,), (1.0,)))
    with pytest.raises(RecipeError, match="2 low and 1 high ends"):
        Given((0.0, 0.0), (1.0,))
    with pytest.raises(RecipeError, match="1 low and 0 high ends"):
        Given((0.0,), 1.0)
    with pytest.raises(RecipeError, match="channel 1 of Given has the range"):
        Given((0.0, 1.0), (1.0, 0.0))
    with pytest.raises(RecipeError, match="ranges of 2 channels, the tensor has 3"):
        Spec(UINT6, PerChannel(-1), Given((0.0, 0.0), (1.0, 1.0))).fake_quantize(torch.ones(4, 3))
