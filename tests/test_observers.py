"""Laws of every observer, of merging above all, and what each one promises about the range it finds."""

import json
import math
import pickle
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given
from observing import UINT6, batches, either, found, given_spec, seen, watched
from strategies import formats, granularities, tensors
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant.errors import CalibrationError, RecipeError
from fxquant.numerics.affine import IntAffine
from fxquant.numerics.entropy import Entropy
from fxquant.numerics.extremes import AverageMinMax, MinMax, MovingAverage
from fxquant.numerics.granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from fxquant.numerics.histogram import Histogram
from fxquant.numerics.learned import LSQ, LSQPlus
from fxquant.numerics.least_error import GoldenMSE, MinMSE
from fxquant.numerics.observer import Observer
from fxquant.numerics.observers import OBSERVERS
from fxquant.numerics.percentile import Percentile
from fxquant.numerics.ranges import RANGES, Dynamic, Given
from fxquant.numerics.token_wise import TokenWise, clipped
from fxquant.recipe import Recipe, Spec

# One of each, cheap to search; a new observer without an entry fails the first test.
EXAMPLES: dict[type[Observer], Observer] = {
    MinMax: MinMax(),
    AverageMinMax: AverageMinMax(),
    MovingAverage: MovingAverage(0.7),
    Percentile: Percentile(0.9),
    MinMSE: MinMSE(2, 0.25),
    GoldenMSE: GoldenMSE(2),
    Entropy: Entropy(1),
    TokenWise: TokenWise(0.8),
    LSQ: LSQ(),
    LSQPlus: LSQPlus(),
}
FOR_ACTIVATIONS = (Entropy, TokenWise, LSQ)
FOR_WEIGHTS = [o for o in EXAMPLES.values() if not isinstance(o, FOR_ACTIVATIONS)]
ROUNDED = (MovingAverage, LSQ, LSQPlus)  # whose sums depend on the order by rounding; all others are equal bit for bit

each = pytest.mark.parametrize("observer", EXAMPLES.values(), ids=lambda o: type(o).__name__)
orderless = pytest.mark.parametrize(
    "observer", [o for o in EXAMPLES.values() if not o.order_matters], ids=lambda o: type(o).__name__
)
for_weights = pytest.mark.parametrize("observer", FOR_WEIGHTS, ids=lambda o: type(o).__name__)

def assert_same(observer: Observer, one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    """Equal bit for bit; up to the rounding of float64 sums for the few that say so."""
    for a, b in zip(one, other, strict=True):
        close = torch.allclose(a, b, rtol=1e-6, atol=1e-6 * a.abs().max())
        assert torch.equal(a, b) or (isinstance(observer, ROUNDED) and close)


def kept(observer: Observer, state: Any, granularity: Granularity) -> tuple[Tensor, ...]:
    """What decides about the range: the range itself, or the histogram that is searched for it at greater cost."""
    return state[:-1] if isinstance(state, Histogram) else observer.range(state, UINT6, granularity)


# What the protocol promises, of all


def test_every_observer_is_held_to_these_laws():
    assert tuple(EXAMPLES) == OBSERVERS and set(OBSERVERS) < set(RANGES)


@each
@given(either, batches(), formats)
def test_a_range_is_two_float32_tensors_that_a_recipe_can_hold(observer, granularity, data, form):
    lo, hi = found(observer, data, granularity, form)
    assert lo.dtype == hi.dtype == torch.float32
    assert lo.shape == hi.shape == (() if granularity == PerTensor() else (data[0].shape[1],))
    assert lo.isfinite().all() and hi.isfinite().all() and (lo <= hi).all()
    spec = given_spec(form, granularity, lo, hi)
    assert Spec.from_json(spec.to_json()) == spec
    assert spec.fake_quantize(data[0]).isfinite().all()


@each
@given(either, batches())
def test_merging_commutes(observer, granularity, data):
    a, b = seen(observer, data[:1], granularity), seen(observer, data[1:], granularity)
    one, other = (kept(observer, observer.merge(*pair), granularity) for pair in ((a, b), (b, a)))
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@each
@given(either, batches(at_least=3))
def test_merging_associates(observer, granularity, data):
    a, b, c = (seen(observer, part, granularity) for part in (data[:1], data[1:2], data[2:]))
    left = observer.merge(observer.merge(a, b), c)
    right = observer.merge(a, observer.merge(b, c))
    assert_same(observer, kept(observer, left, granularity), kept(observer, right, granularity))


@orderless
@given(either, batches(), st.integers(0, 4))
def test_two_processes_find_what_one_finds(observer, granularity, data, cut):
    a, b = (pickle.loads(pickle.dumps(seen(observer, part, granularity))) for part in (data[:cut], data[cut:]))
    one = seen(observer, data, granularity)
    assert_same(observer, kept(observer, observer.merge(a, b), granularity), kept(observer, one, granularity))


@orderless
@given(either, batches(), st.randoms(use_true_random=False))
def test_batches_may_come_in_any_order(observer, granularity, data, random):
    shuffled = random.sample(data, len(data))
    one, other = (kept(observer, seen(observer, d, granularity), granularity) for d in (shuffled, data))
    assert_same(observer, one, other)


def test_a_moving_average_says_that_order_matters_and_it_does():
    data = [torch.ones(1, 1), torch.zeros(1, 1)]
    assert [o.order_matters for o in EXAMPLES.values()] == [isinstance(o, MovingAverage) for o in EXAMPLES.values()]
    assert found(MovingAverage(), data, PerTensor()) != found(MovingAverage(), data[::-1], PerTensor())


@each
@given(either, batches(), st.randoms(use_true_random=False))
def test_tokens_may_come_in_any_order(observer, granularity, data, random):
    shuffled = [x[random.sample(range(len(x)), len(x))] for x in data]
    one, other = (kept(observer, seen(observer, d, granularity), granularity) for d in (shuffled, data))
    assert_same(observer, one, other)


@each
@given(either, batches(), st.integers(-20, 20))
def test_a_power_of_two_times_the_data_is_that_power_times_the_range(observer, granularity, data, power):
    factor = 2.0**power
    lo, hi = found(observer, data, granularity)
    scaled = found(observer, [x * factor for x in data], granularity)
    assert torch.equal(scaled[0], lo * factor) and torch.equal(scaled[1], hi * factor)


@each
@given(either, batches(), formats)
def test_no_range_goes_beyond_the_data_and_zero(observer, granularity, data, form):
    lo, hi = found(observer, data, granularity, form)
    least, most = found(MinMax(), data, granularity)
    assert (lo >= least.clamp(max=0)).all() and (hi <= most.clamp(min=0)).all()


@each
@given(batches(), formats)
def test_one_channel_is_a_tensor_of_its_own(observer, data, form):
    assume(all(len(x) <= 256 for x in data))
    column = [x[:, :1] for x in data]
    lo, hi = found(observer, column, PerTensor(), form)
    low, high = found(observer, column, PerChannel(-1), form)
    assert torch.equal(low, lo[None]) and torch.equal(high, hi[None])


@each
@watched
def test_an_empty_batch_changes_nothing(observer, granularity):
    data = [torch.randn(7, 3, generator=torch.Generator().manual_seed(0))]
    empty = torch.empty(0, 3)
    assert_same(observer, found(observer, [empty, *data, empty], granularity), found(observer, data, granularity))
    start = observer.start()
    again = observer.merge(observer.merge(start, seen(observer, data, granularity)), start)
    assert_same(observer, observer.range(again, UINT6, granularity), found(observer, data, granularity))


@each
@watched
def test_a_state_is_never_changed(observer, granularity):
    x, y = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0))
    state = seen(observer, [x], granularity)
    before = observer.range(state, UINT6, granularity)
    observer.merge(observer.update(state, y * 100, granularity), state)
    assert all(torch.equal(a, b) for a, b in zip(observer.range(state, UINT6, granularity), before, strict=True))


@each
@watched
def test_zeros_have_a_usable_range(observer, granularity):
    lo, hi = found(observer, [torch.zeros(4, 3)], granularity)
    assert not lo.any() and not hi.any()
    assert not given_spec(UINT6, granularity, lo, hi).fake_quantize(torch.zeros(4, 3)).any()


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_floats_are_watched_as_float32(observer, dtype):
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert_same(observer, found(observer, [x], PerTensor()), found(observer, [x.float()], PerTensor()))


@each
@watched
def test_a_state_is_small_beside_the_data(observer, granularity):
    data = [torch.randn(4096, 64, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    size = len(pickle.dumps(seen(observer, data, granularity)))
    assert size < 0.3 * sum(x.numel() * 4 for x in data)


@each
def test_nothing_seen_is_an_error(observer):
    with pytest.raises(CalibrationError, match="no data was seen"):
        observer.range(observer.start(), UINT6, PerTensor())


@each
@watched
def test_a_nan_is_counted(observer, granularity):
    x = torch.ones(4, 3)
    x[1, 2], x[3, 0] = torch.nan, -torch.inf
    with pytest.raises(CalibrationError, match="2 of 12 values"):
        observer.update(observer.start(), x, granularity)


@each
def test_what_is_no_batch_is_refused(observer):
    start = observer.start()
    with pytest.raises(RecipeError, match=r"granularity PerToken\(\); use PerTensor"):
        observer.update(start, torch.ones(2, 3), PerToken())
    with pytest.raises(CalibrationError, match=r"shape \[2, 3, 4\]"):
        observer.update(start, torch.ones(2, 3, 4), PerTensor())
    with pytest.raises(CalibrationError, match=r"dtype torch.int64"):
        observer.update(start, torch.ones(2, 3, dtype=torch.int64), PerTensor())
    state = observer.update(start, torch.ones(2, 3), PerChannel(-1))
    with pytest.raises(CalibrationError, match="watched 3 channels is shown 4"):
        observer.update(state, torch.ones(2, 4), PerChannel(-1))
    with pytest.raises(CalibrationError, match="watched 3 channels is shown 1"):
        observer.range(state, UINT6, PerTensor())


@each
def test_an_observer_travels_through_json(observer):
    recipe = Recipe(activations=Spec(UINT6, PerTensor(), observer))
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert recipe.activations is not None and recipe.activations.is_static


@pytest.mark.parametrize(
    "make",
    [
        lambda: MovingAverage(0), lambda: MovingAverage("0.9"), lambda: Percentile(0.5), lambda: Percentile(1.01),
        lambda: Percentile(torch.tensor(0.9)), lambda: MinMSE(0), lambda: MinMSE(lowest=1.0), lambda: GoldenMSE(2.0),
        lambda: Entropy(True), lambda: TokenWise(0.0), lambda: TokenWise(float("nan")), lambda: TokenWise(fine=1),
        lambda: TokenWise.candidates(8, 0, 128),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_when_it_is_written(make):
    with pytest.raises(RecipeError, match="needed"):
        make()


# A tensor at hand


@st.composite
def at_hand(draw: st.DrawFn) -> tuple[Granularity, Tensor]:
    x = draw(tensors(st.sampled_from([torch.float32, torch.float64])))
    return draw(granularities(tuple(x.shape))), x


@for_weights
@given(at_hand(), formats)
def test_every_block_of_a_weight_gets_a_range_within_its_own(observer, case, form):
    granularity, x = case
    blocks = granularity.split(x)
    lo, hi = observer.of(blocks, granularity, lambda lo, hi: blocks)
    least, most = Dynamic().of(blocks, granularity, lambda lo, hi: blocks)
    assert lo.shape == least.shape and hi.shape == most.shape
    assert (lo >= least.clamp(max=0)).all() and (hi <= most.clamp(min=0)).all()
    assert Spec(form, granularity, observer).fake_quantize(x).isfinite().all()


@for_weights
def test_blocks_do_not_see_each_other(observer):
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    x[1] *= 100
    whole = UINT6.fit(x, PerGroup(4), observer).scale
    alone = torch.stack([UINT6.fit(row, PerGroup(4), observer).scale for row in x])
    assert torch.equal(whole, alone)


@for_weights
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerGroup(4)], ids=str)
def test_the_range_of_a_weight_traces(observer, granularity):
    def fn(x: Tensor) -> tuple[Tensor, ...]:
        qparams = UINT6.fit(x, granularity, observer)
        assert qparams.zero_point is not None
        return qparams.scale, qparams.zero_point

    graph = make_fx(fn, tracing_mode="symbolic")(torch.randn(6, 8))
    for rows in (6, 11):
        x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(rows))
        assert all(torch.equal(a, b) for a, b in zip(graph(x), fn(x), strict=True))


@for_weights
@given(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
def test_no_observer_hides_a_nan_in_a_weight(observer, bad):
    weight = torch.tensor([[1.0, bad, 0.5], [1.0, 2.0, -1.0]])
    scale = UINT6.fit(weight, PerChannel(0), observer).scale
    assert scale[0].isnan().all() and scale[1].isfinite().all()


@pytest.mark.parametrize("kind", FOR_ACTIVATIONS)
def test_an_observer_of_activations_takes_no_weight(kind):
    with pytest.raises(RecipeError, match=r"it is for activations that calibration watches\. Use MinMSE"):
        Spec(UINT6, PerChannel(0), EXAMPLES[kind]).fake_quantize(torch.ones(2, 2))


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


def test_the_fields_of_an_observer_are_json_values():
    for observer in EXAMPLES.values():
        assert all(isinstance(getattr(observer, f.name), int | float | None) for f in fields(observer))
