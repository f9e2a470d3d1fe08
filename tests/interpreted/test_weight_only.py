"""Four- and eight-bit weights against their decoded product; float16, in which the interpreter multiplies exactly enough."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxquant.backend.triton import weight_only as wo
from fxquant.backend.triton.epilogue import ACTIVATIONS
from fxquant.backend.triton.language import KernelError
from fxquant.backend.triton.launch import Tile

TILE = Tile(16, 32, 0, 4, 2, weight_left=True)
FORMS = st.sampled_from([(16, 16), (16, 32), (16, 64), (16, 128), (32, 32), (16, 1 << 30)])  # width, group size


def weight(bits: int, signed: bool, N: int, K: int, generator: torch.Generator) -> torch.Tensor:
    top = 1 << bits
    codes = torch.randint(0, top, (N, K), generator=generator)
    return (codes - top // 2).to(torch.int8) if signed else codes.to(torch.uint8)


@given(st.data(), st.sampled_from([4, 8]), st.integers(1, 18), st.integers(1, 34), st.integers(1, 200), FORMS, st.booleans())
def test_the_product_is_that_of_the_decoded_weight(data, bits, M, N, K, form, shifted):
    width, group_size = form
    if group_size > K:
        group_size = 1 << 30
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    groups = -(K // -group_size)
    codes = weight(bits, not shifted, N, K, generator)
    # Small integers and powers of two: every product and every sum is exact, so the answer is too.
    x = torch.randint(-4, 5, (M, K), generator=generator).half()
    scale = 2.0 ** torch.randint(-3, 1, (groups, N), generator=generator)
    zero_point = torch.randint(0, 1 << bits, (groups, N), generator=generator).to(torch.int32) if shifted else None
    bias = torch.randint(-9, 9, (N,), generator=generator).half() if data.draw(st.booleans()) else None
    residual = torch.randint(-9, 9, (M, N), generator=generator).half() if data.draw(st.booleans()) else None
    activation = data.draw(st.sampled_from(["none", "relu"]))
    packed = wo.pack_weight(codes, bits, width)
    parts = data.draw(st.sampled_from([1, 2, 3]))
    ours = wo.launch_weight_only(x, packed, scale, zero_point, bias, residual, bits, group_size, width, activation, TILE, parts)
    truth = wo.reference(x, codes, scale, zero_point, bias, residual, group_size, activation)
    assert ours.dtype == torch.float16
    assert torch.equal(ours, truth)


@given(st.sampled_from([4, 8]), st.booleans(), st.sampled_from(sorted(ACTIVATIONS)), st.integers(0, 2**31))
def test_ordinary_numbers_agree_to_rounding(bits, shifted, activation, seed):
    generator = torch.Generator().manual_seed(seed)
    M, N, K, group_size = 3, 33, 200, 64
    codes = weight(bits, not shifted, N, K, generator)
    x = torch.randn(M, K, generator=generator).half()
    scale = torch.rand(4, N, generator=generator) / (1 << bits)
    zero_point = torch.full((4, N), 1 << bits - 1, dtype=torch.int32) if shifted else None
    op = wo.w4a16_gemm if bits == 4 else wo.w8a16_gemm
    ours = op(x, wo.pack_weight(codes, bits, 32), scale, zero_point, None, group_size, 32, activation)
    truth = wo.reference(x, codes, scale, zero_point, None, None, group_size, activation)
    # What is folded is a few thousand times the code: sums of 200 products of it in float32 lose about 1e-4.
    torch.testing.assert_close(ours.float(), truth.float(), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("M", [0, 1, 8, 9, 16, 17, 32, 33, 70])
def test_the_op_takes_every_bucket_of_rows_and_any_strides(M):
    generator = torch.Generator().manual_seed(0)
    codes = weight(4, True, 35, 260, generator)
    x = torch.randint(-4, 5, (260, M), generator=generator).half().T
    scale = (2.0 ** torch.randint(-3, 1, (35, 3), generator=generator)).T
    # NaN lies behind the last scale: K is filled up to groups that have none.
    scale = torch.cat([scale, torch.full((9, 35), torch.nan)])[:3]
    ours = wo.w4a16_gemm(x, wo.pack_weight(codes, 4), scale)
    assert torch.equal(ours, wo.reference(x, codes, scale, None, None, None, 128, "none"))


def test_groups_that_cut_a_slice_are_refused_in_a_sentence():
    with pytest.raises(KernelError, match="groups of 96 weights do not consist of whole slices of 64"):
        wo.w4a16_gemm(torch.zeros(1, 192).half(), torch.zeros(5, 64, dtype=torch.int16), torch.ones(2, 5), group_size=96)


def test_activations_in_float32_are_refused_on_the_gpu():
    with pytest.raises(KernelError, match=r"torch.float16 or torch.bfloat16"):
        wo.w4a16_gemm(torch.zeros(1, 256), torch.zeros(5, 64, dtype=torch.int16), torch.ones(2, 5))
