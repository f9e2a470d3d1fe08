"""A fingerprint changes with the contents: flipped signs, powers of two and swapped places do not cancel."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxquant.graph.fingerprint import CHUNK, WIDTH, fingerprint

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.int8)
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**16)


def numbers(dtype: torch.dtype, seed: int, rows: int = 32, columns: int = 32) -> Tensor:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x if dtype.is_floating_point else 50 * x).to(dtype)


def bits(x: Tensor) -> Tensor:
    return x.view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[x.element_size()])


def flipped(x: Tensor, places: Tensor) -> Tensor:
    """``x`` with the top bit of the elements at ``places`` turned."""
    y = bits(x.clone())
    y[places] ^= torch.iinfo(y.dtype).min
    return y.view(x.dtype)


@given(dtypes, seeds, st.sampled_from([1, 2, 4, 8]), st.booleans())
def test_signs_that_change_in_every_nth_column_are_seen(dtype, seed, n, last):
    x, places = numbers(dtype, seed), torch.zeros(32, 32, dtype=torch.bool)
    places[:, n - 1 if last else 0 :: n] = True
    assert fingerprint(flipped(x, places)) != fingerprint(x)


@given(dtypes, seeds, st.sets(st.tuples(st.integers(0, 31), st.integers(0, 31)), min_size=1, max_size=4))
def test_a_few_signs_that_change_are_seen(dtype, seed, where):
    x, places = numbers(dtype, seed), torch.zeros(32, 32, dtype=torch.bool)
    for i, j in where:
        places[i, j] = True
    assert fingerprint(flipped(x, places)) != fingerprint(x)


@given(st.sampled_from(DTYPES[:4]), seeds, st.sampled_from([2.0, 4.0, 0.5, -1.0, -2.0]), st.booleans())
def test_a_tensor_times_a_power_of_two_is_another(dtype, seed, factor, same):
    x = torch.ones(64, 64, dtype=dtype) if same else numbers(dtype, seed)
    assert fingerprint(x * factor) != fingerprint(x)


@given(dtypes, seeds, st.integers(1, 31))
def test_rows_that_change_places_are_seen(dtype, seed, other):
    x = numbers(dtype, seed)
    order = torch.arange(32)
    order[0], order[other] = other, 0
    assert fingerprint(bits(x)[order].view(dtype)) != fingerprint(x)


@pytest.mark.parametrize("count", [WIDTH - 1, WIDTH, WIDTH + 1, WIDTH * CHUNK, WIDTH * CHUNK + WIDTH + 1])
def test_every_word_counts_however_many_there_are(count):
    x = torch.zeros(count, dtype=torch.int64)
    whole = fingerprint(x)
    for place in (0, count // 2, count - 1):
        x[place] ^= torch.iinfo(torch.int64).min
        assert fingerprint(x) != whole
        x[place] = 0
    assert fingerprint(x) == whole


def test_where_a_tensor_lies_does_not_matter():
    base = torch.arange(100, dtype=torch.uint8)
    for offset in (0, 1, 8):
        assert fingerprint(base[offset : offset + 24]) == fingerprint(base[offset : offset + 24].clone())
    x = numbers(torch.float32, 0)
    assert fingerprint(x.t()) == fingerprint(x.t().contiguous())
    assert fingerprint(torch.empty(0, 3)) != fingerprint(torch.empty(3, 0))
