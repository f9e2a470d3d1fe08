"""Laws of every observer, of merging above all. What each one promises about its range: test_ranges_found.py."""

import json
import pickle
from dataclasses import fields
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given
from observing import UINT6, at_hand, batches, either, found, given_spec, seen, watched
from strategies import formats
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant.errors import CalibrationError, RecipeError
from fxquant.numerics.entropy import Entropy
from fxquant.numerics.extremes import AverageMinMax, MinMax, MovingAverage
from fxquant.numerics.granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from fxquant.numerics.histogram import Histogram
from fxquant.numerics.learned import LSQ, LSQPlus
from fxquant.numerics.least_error import GoldenMSE, MinMSE
from fxquant.numerics.observer import Observer
from fxquant.numerics.observers import OBSERVERS
from fxquant.numerics.percentile import Percentile
from fxquant.numerics.ranges import RANGES, Dynamic
from fxquant.numerics.token_wise import TokenWise
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


def test_the_fields_of_an_observer_are_json_values():
    for observer in EXAMPLES.values():
        assert all(isinstance(getattr(observer, f.name), int | float | None) for f in fields(observer))
