"""The int8 product against exact sums, for every tile and every split of K."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxquant.backend.triton import int8_gemm as gemm
from fxquant.backend.triton.epilogue import ACTIVATIONS
from fxquant.backend.triton.language import KernelError
from fxquant.backend.triton.launch import Tile

TILES = (Tile(16, 32, 32, 4, 2), Tile(32, 16, 64, 4, 2), Tile(16, 32, 64, 4, 2, weight_left=True))
SHAPES = st.tuples(st.integers(0, 20), st.integers(1, 40), st.integers(1, 150))


def codes(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)


@given(SHAPES, st.sampled_from(TILES), st.sampled_from([1, 2, 5]), st.booleans(), st.integers(0, 2**31))
def test_the_integer_part_is_exact(shape, tile, parts, shifted, seed):
    M, N, K = shape
    x, w = codes(M, K, seed), codes(N, K, seed + 1)
    zero = torch.randint(-128, 128, (M, 1), dtype=torch.int32) if shifted else None
    ones = torch.ones(M, 1), torch.ones(N)
    y = gemm.launch_int8_gemm(
        x, w, ones[0], zero, ones[1], w.sum(1, dtype=torch.int32), None, None, "none", torch.float32, tile, parts
    )
    truth = (x.long() - (0 if zero is None else zero)) @ w.T.long()
    assert torch.equal(y, truth.float())


@given(SHAPES, st.sampled_from(TILES), st.sampled_from([1, 3]), st.sampled_from(sorted(ACTIVATIONS)), st.data())
def test_the_epilogue_is_its_torch_meaning(shape, tile, parts, activation, data):
    M, N, K = shape
    seed = data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    x, w = codes(M, K, seed), codes(N, K, seed + 1)
    scale_x, scale_w = torch.rand(M, 1, generator=generator) / K, torch.rand(N, generator=generator) / 64
    zero = torch.randint(-128, 128, (M, 1), dtype=torch.int32, generator=generator) if data.draw(st.booleans()) else None
    bias = torch.randn(N, generator=generator) if data.draw(st.booleans()) else None
    residual = torch.randn(N, M, generator=generator).T if data.draw(st.booleans()) else None
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    w_sum = w.sum(1, dtype=torch.int32)
    ours = gemm.launch_int8_gemm(x, w, scale_x, zero, scale_w, w_sum, bias, residual, activation, dtype, tile, parts)
    truth = gemm.reference(x, w, scale_x, zero, scale_w, w_sum, bias, residual, activation, dtype)
    assert ours.dtype == dtype
    if activation in ("none", "relu"):  # the same operations in the same order
        assert torch.equal(ours, truth)
    else:
        torch.testing.assert_close(ours.float(), truth.float(), rtol=max(2e-6, torch.finfo(dtype).eps), atol=2e-6)


@pytest.mark.parametrize("M", [3, 20])
def test_scales_and_bias_may_have_any_strides(M):
    x, w, vectors = codes(M, 64, 0), codes(33, 64, 1), torch.rand(33, 2)
    args = (x, w, torch.rand(1, 1).expand(M, 1), None, vectors[:, 0], None, vectors[:, 1])
    assert torch.equal(gemm.int8_gemm(*args), gemm.reference(*args, None, "none", torch.float32))


@pytest.mark.parametrize("M", [1, 16, 17, 65])
def test_the_op_takes_every_bucket_of_rows_and_any_strides(M):
    x, w = codes(200, M, 0).T, codes(33, 400, 1)[:, ::2]
    scale_x, scale_w = torch.rand(M, 1), torch.rand(33)
    y = gemm.int8_gemm(x, w, scale_x, None, scale_w, out_dtype=torch.float16)
    assert torch.equal(y, gemm.reference(x, w, scale_x, None, scale_w, None, None, None, "none", torch.float16))


def test_the_largest_sums_do_not_overflow():
    K = gemm.MAX_K
    x, w = torch.full((1, K), 127, dtype=torch.int8), torch.full((2, K), -128, dtype=torch.int8)
    zero = torch.full((1, 1), -128, dtype=torch.int32)
    y = gemm.int8_gemm(x, w, torch.ones(1, 1), zero, torch.ones(2), w.sum(1, dtype=torch.int32))
    assert torch.equal(y, torch.full((1, 2), float(-255 * 128 * K)))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"activation": "gelo"}, "no activation 'gelo'"),
        ({"q_w": torch.zeros(3, 9, dtype=torch.int8)}, r"not \[2, 8\] and \[3, 9\]"),
        ({"scale_x": torch.ones(2)}, r"scales \[2, 1\] and \[3\], not \[2\] and \[3\]"),
        ({"zero_x": torch.zeros(2, 1, dtype=torch.int32)}, "row sums"),
        ({"bias": torch.zeros(2)}, r"must be \[3\]"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(changes, sentence):
    good = dict(
        q_x=codes(2, 8, 0), q_w=codes(3, 8, 1), scale_x=torch.ones(2, 1), zero_x=None, scale_w=torch.ones(3)
    )
    with pytest.raises(KernelError, match=sentence):
        gemm.int8_gemm(**{**good, **changes})
