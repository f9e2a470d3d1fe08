"""The range of least weighted error: no worse than the one given, blind to what has no weight, and scaled with its values."""

import hypothesis.strategies as st
import torch
from hypothesis import given
from observing import UINT6, seeds
from torch import Tensor

from fxquant.numerics.affine import IntAffine
from fxquant.numerics.granularity import PerToken
from fxquant.numerics.learned import rounded
from fxquant.numerics.weighted import least_weighted

forms = st.sampled_from([UINT6, IntAffine(4), IntAffine(3, symmetric=False)])


def values(seed: int) -> tuple[Tensor, Tensor]:
    """Two rows of values, one with an outlier, and their weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 200, generator=generator)
    x[1, 0] = 40.0
    return x, torch.rand(2, 200, generator=generator)


def error(x: Tensor, weights: Tensor, lo: Tensor, hi: Tensor, form: IntAffine) -> Tensor:
    off = rounded(x, form.from_range(lo[:, None], hi[:, None]), form, PerToken()) - x
    return (weights * off.square()).sum(dim=1, dtype=torch.float64)


@given(seeds, forms)
def test_the_range_is_no_worse_than_the_one_given(seed, form):
    x, weights = values(seed)
    lo, hi = x.amin(1) * 0.31, x.amax(1) * 0.47
    ends = least_weighted(x, weights, lo, hi, form)
    assert (error(x, weights, *ends, form) <= error(x, weights, lo, hi, form)).all()
    assert (ends[0] < ends[1]).all()


@given(seeds, forms)
def test_an_outlier_without_weight_is_cut(seed, form):
    """With three bits the search, which goes from one end to the other, may stop before the least: at 8.24, for one."""
    x, weights = values(seed)
    weights[1, 0] = 0
    without = least_weighted(x, weights, *torch.aminmax(x, dim=1), form)
    weighted = least_weighted(x, weights.index_fill(1, torch.tensor(0), 1e4), *without, form)
    assert without[1][1] < (8 if form.bits > 3 else 10) < weighted[1][1]


@given(seeds, forms)
def test_rows_without_weight_stay_as_they_were(seed, form):
    x, weights = values(seed)
    lo, hi = torch.tensor([-0.3, -0.5]), torch.tensor([0.7, 0.2])
    assert all(map(torch.equal, least_weighted(x, 0 * weights, lo, hi, form), (lo, hi)))


@given(seeds, forms, st.integers(-8, 8))
def test_ranges_scale_with_their_values_and_not_with_their_weights(seed, form, power):
    x, weights = values(seed)
    ends = least_weighted(x, weights, *torch.aminmax(x, dim=1), form)
    scaled = least_weighted(x * 2.0**power, weights * 8, *torch.aminmax(x * 2.0**power, dim=1), form)
    assert all(torch.equal(e * 2.0**power, s) for e, s in zip(ends, scaled, strict=True))
