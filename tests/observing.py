"""What the tests of observers share: batches as models have them, and what an observer finds in them."""

from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from strategies import granularities, tensors
from torch import Tensor

from fxquant.numerics.affine import IntAffine
from fxquant.numerics.granularity import Granularity, PerChannel, PerTensor
from fxquant.numerics.observer import Observer
from fxquant.numerics.ranges import Given
from fxquant.recipe import Spec

UINT6 = IntAffine(6, symmetric=False)

either = st.sampled_from([PerTensor(), PerChannel(-1)])
watched = pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(-1)], ids=str)

seeds = st.integers(0, 2**32 - 1)
channels = st.sampled_from([1, 2, 5])


@st.composite
def batches(draw: st.DrawFn, at_least: int = 1) -> list[Tensor]:
    """A few batches [tokens, channels] as models have them: outliers in a channel or in tokens, zeros, one sign, a shift."""
    width, generator = draw(channels), torch.Generator().manual_seed(draw(seeds))

    def batch() -> Tensor:
        x = torch.randn(draw(st.sampled_from([1, 2, 7, 40])), width, generator=generator)
        kind = draw(st.sampled_from(["plain", "channel", "token", "zero", "one-sided", "shifted", "tiny", "huge"]))
        if kind == "channel":
            x[:, 0] *= 50
        if kind == "token":
            x[0] *= -300
        factor = {"zero": 0.0, "tiny": 2.0**-30, "huge": 2.0**30}.get(kind, 1.0)
        x = x.relu() if kind == "one-sided" else x + 3 if kind == "shifted" else x
        return x * factor

    return [batch() for _ in range(draw(st.integers(at_least, 4)))]


@st.composite
def at_hand(draw: st.DrawFn) -> tuple[Granularity, Tensor]:
    """A tensor, and a granularity that fits it."""
    x = draw(tensors(st.sampled_from([torch.float32, torch.float64])))
    return draw(granularities(tuple(x.shape))), x


def seen(observer: Observer, data: Sequence[Tensor], granularity: Granularity) -> Any:
    state = observer.start()
    for x in data:
        state = observer.update(state, x, granularity)
    return state


def found(
    observer: Observer, data: Sequence[Tensor], granularity: Granularity, form: IntAffine = UINT6
) -> tuple[Tensor, Tensor]:
    return observer.range(seen(observer, data, granularity), form, granularity)


def given_spec(form: IntAffine, granularity: Granularity, lo: Tensor, hi: Tensor) -> Spec:
    return Spec(form, granularity, Given(lo.tolist(), hi.tolist()))
