"""Row kernels against IntAffine and torch's norms. Only float16 and float32: the interpreter computes garbage in bfloat16."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxquant.backend.triton import row
from fxquant.backend.triton.language import KernelError

DTYPES = st.sampled_from([torch.float32, torch.float16])
SHAPES = st.tuples(st.integers(0, 5), st.integers(1, 70))


@st.composite
def matrices(draw: st.DrawFn, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Rows of very different size, some constant, some one-sided, some all zero, some views with a gap between rows."""
    T, D = shape
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(T, D, generator=generator) * torch.exp(3 * torch.randn(T, 1, generator=generator))
    kind = torch.randint(0, 6, (T, 1), generator=generator)
    x = torch.where(kind == 0, torch.zeros(()), torch.where(kind == 1, x[:, :1], torch.where(kind == 2, x.abs(), x)))
    x = x.to(dtype)
    layout = draw(st.sampled_from(["contiguous", "gap", "transposed"]))
    if layout == "gap":
        return torch.cat([x, torch.full_like(x, torch.nan)], 1)[:, :D]
    return x.T.contiguous().T if layout == "transposed" else x


@given(st.data(), SHAPES, DTYPES, st.booleans())
def test_quantized_rows_are_those_of_int_affine_bit_for_bit(data, shape, dtype, symmetric):
    x = data.draw(matrices(shape, dtype))
    for ours, truth in zip(row.quantize_rows(x, symmetric), row.reference_quantize(x, symmetric), strict=True):
        assert ours.dtype == truth.dtype
        assert torch.equal(ours, truth)


@given(st.data(), SHAPES, DTYPES, st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_norms_are_torchs_and_their_codes_are_those_of_int_affine(data, shape, dtype, centered, symmetric, affine, shortcut):
    x = data.draw(matrices(shape, dtype))
    residual = data.draw(matrices(shape, dtype)) if shortcut else None
    weight = torch.linspace(-2, 3, shape[1]).to(dtype) if affine else None
    bias = torch.linspace(1, -1, shape[1]).to(dtype) if affine and centered else None
    if centered:
        q, scale, zero_point, total, y = row.layer_norm_quantize(x, residual, weight, bias, 1e-5, symmetric, True, True)
    else:
        q, scale, zero_point, total, y = row.rms_norm_quantize(x, residual, weight, 1e-5, symmetric, True, True)
    true_total, true_y = row.reference_normalize(x, residual, weight, bias, 1e-5, centered)
    assert torch.equal(total, true_total)
    # A mean of large numbers that all but cancel is known to their rounding, times what one over the deviation makes of it.
    h = true_total.float()
    spread = (h - h.mean(1, True) if centered else h).square().mean(1, True)
    largest = true_total.float().abs().amax(1, keepdim=True) if shape[1] else spread
    gain = 1 if weight is None else weight.float().abs().max()
    allowed = 4e-7 * gain * (4 + 4 * largest / (spread + 1e-5).sqrt()) + torch.finfo(dtype).eps * true_y.float().abs()
    finite = true_total.isfinite().all(1, keepdim=True)  # a row that overflows its type is nobody's
    assert (((y.float() - true_y.float()).abs() <= allowed) | ~finite).all()
    kept = finite.flatten()
    for ours, truth in zip((q, scale, zero_point), row.reference_quantize(y, symmetric), strict=True):
        assert torch.equal(ours[kept], truth[kept])


def test_what_is_not_kept_is_empty():
    x = torch.randn(3, 8)
    _, _, _, total, y = row.layer_norm_quantize(x, None, None, None, 1e-5)
    assert total.shape == y.shape == (0,)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_number_that_is_none_spoils_its_row_and_no_other(bad, symmetric):
    x = torch.randn(4, 40)
    x[1, 17] = bad
    q, scale, zero_point = row.quantize_rows(x, symmetric)
    truth = row.reference_quantize(x, symmetric)
    good = torch.tensor([0, 2, 3])
    assert scale[1].isnan().all()
    assert scale[good].equal(truth[1][good]) and q[good].equal(truth[0][good]) and zero_point[good].equal(truth[2][good])


@given(st.integers(-127, 126), st.sampled_from([2.0**-20, 1.0, 2.0**9]))
def test_halves_round_to_even(step, size):
    x = torch.tensor([[127.0, step + 0.5]]) * size  # the scale is a power of two, so that the half is exact
    q, _, _ = row.quantize_rows(x)
    assert q[0, 1] == round(step + 0.5)


def test_subnormal_rows_have_a_normal_scale():
    x = torch.tensor([[1e-42, -3e-43, 0.0]])
    for symmetric in (True, False):
        for ours, truth in zip(row.quantize_rows(x, symmetric), row.reference_quantize(x, symmetric), strict=True):
            assert torch.equal(ours, truth)


def test_rows_of_another_dtype_are_refused_in_a_sentence():
    with pytest.raises(KernelError, match=r"float32, float16 or bfloat16 \[T, D\], not torch.float64"):
        row.quantize_rows(torch.randn(2, 3, dtype=torch.float64))


def test_gains_may_have_any_strides():
    x, vectors = torch.randn(4, 40), torch.randn(40, 2)
    strided = row.layer_norm_quantize(x, None, vectors[:, 0], vectors[:, 1], 1e-5)
    dense = row.layer_norm_quantize(x, None, *vectors.T.contiguous(), 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))
