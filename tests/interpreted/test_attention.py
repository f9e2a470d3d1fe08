"""int8 attention against exact integer scores and a softmax in float64: every size, mask, grouping and scale. float16 only."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxquant.backend.triton import attention
from fxquant.backend.triton.language import KernelError
from fxquant.backend.triton.tile import Tile

TILES = (Tile(16, 16, 0, 4, 2), Tile(16, 32, 0, 4, 2), Tile(32, 16, 0, 4, 2))
MASKS = ("none", "keys", "bool", "float", "lowest", "infinite", "2d")


@dataclass
class Case:
    """Operands of one attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale_q: Tensor
    scale_k: Tensor
    mask: Tensor | None
    causal: bool
    scale: float

    @property
    def coded(self) -> tuple:
        """Codes and scales of queries and of keys."""
        return (self.q, self.scale_q), (self.k, self.scale_k)

    @property
    def operands(self) -> tuple:
        return self.q, self.k, self.v, self.scale_q, self.scale_k, self.mask, self.causal, self.scale


def case_of(
    B: int, G: int, per: int, L: int, T: int, D: int, E: int, mask: str, causal: bool, tensors: tuple[bool, bool], seed: int
) -> Case:
    """Codes and values that lie token by token; scores of a few units, so that no one key takes all."""
    generator, H = torch.Generator().manual_seed(seed), G * per

    def codes(*shape: int) -> Tensor:
        return torch.randint(-128, 128, shape, generator=generator).to(torch.int8).transpose(1, 2)

    q, k = codes(B, L, H, D), codes(B, T, G, D)
    v = torch.randn(B, T, G, E, generator=generator).half().transpose(1, 2)
    size = 0.05  # of scores: a deviation of 3 or so
    scales = [torch.rand(shape, generator=generator) * size for shape in ((B, H, L), (B, G, T))]
    scale_q, scale_k = (torch.tensor(size / 2) if one else s for one, s in zip(tensors, scales, strict=True))
    return Case(q, k, v, scale_q, scale_k, mask_of(mask, B, H, L, T, generator), causal, D**-0.5)


def mask_of(kind: str, B: int, H: int, L: int, T: int, generator: torch.Generator) -> Tensor | None:
    """Of each shape that broadcasts; some rows are hidden whole."""
    if kind == "none":
        return None
    shape = {"keys": (B, 1, 1, T), "bool": (B, H, L, T), "float": (1, H, L, T), "2d": (L, T)}.get(kind, (B, 1, L, T))
    seen = torch.rand(shape, generator=generator) > 0.4
    if kind != "keys":
        seen[..., 1::5, :] = False
    if kind == "float":
        return torch.randn(shape, generator=generator).half()
    if kind in ("lowest", "infinite"):
        dtype = torch.float32 if kind == "lowest" else torch.float16
        low = torch.finfo(dtype).min if kind == "lowest" else -math.inf
        return torch.where(seen, 0.0, torch.tensor(low)).to(dtype)
    return seen


def oracle(case: Case) -> tuple[Tensor, Tensor]:
    """The attention in float64, where scores are exact; and by how much the kernel may be off.

    Roundings: the probability of a key by half a step of float16, relative (2**-11) or, below its normal numbers, absolute
    (2**-25, against a largest one of 1, which the sum holds); the result by another (2**-11, or 2**-25 again). In float32 a
    score x is off by 2**-24 for each of its six operations and as much of the running maximum: a probability, relatively, by
    eight times 2**-24 of the largest |x|. exp2 adds 2**-21, the sums over T keys add T 2**-24.
    """
    q, k = (codes.double() * (scale if scale.dim() == 0 else scale[..., None]).double() for codes, scale in case.coded)
    v, mask = case.v.double(), case.mask
    mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    with sdpa_kernel(SDPBackend.MATH):
        attend = torch.nn.functional.scaled_dot_product_attention
        given = dict(is_causal=case.causal and mask is None, scale=case.scale, enable_gqa=True)
        if case.causal and mask is not None:
            seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
            mask = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -math.inf)
        truth, size = attend(q, k, v, mask, **given), attend(q, k, v.abs(), mask, **given)
    per, T = q.shape[1] // k.shape[1], k.shape[2]
    largest = (q @ k.repeat_interleave(per, 1).mT).abs().amax((-2, -1), keepdim=True) * case.scale if T else 0.0
    added = case.mask[case.mask.abs() < 1e4].abs().max() if mask is not None and mask.is_floating_point() else 0.0
    half, single = 2.0**-11, 2.0**-24
    relative = 2 * half + 8 * single * (largest + added) + 2.0**-21 + T * single
    absolute = 2.0**-25 * (1 + v.abs().sum(-2, keepdim=True).repeat_interleave(per, 1))
    return truth, relative * size + absolute


def assert_right(case: Case, y: Tensor) -> None:
    truth, allowed = oracle(case)
    assert y.dtype == case.v.dtype and y.shape == truth.shape
    assert y.transpose(1, 2).is_contiguous()
    assert bool(((y.double() - truth).abs() <= allowed).all())


WIDTHS = st.sampled_from([16, 32, 48, 80, 256])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sizes = [draw(st.integers(1, most)) for most in (2, 2, 3, 70, 70)]
    kinds = draw(st.sampled_from(MASKS)), draw(st.booleans()), (draw(st.booleans()), draw(st.booleans()))
    return case_of(*sizes, draw(WIDTHS), draw(WIDTHS), *kinds, draw(st.integers(0, 2**16)))


@given(cases(), st.sampled_from(TILES))
def test_attention_of_codes_is_that_of_the_numbers_they_mean(case, tile):
    assert_right(case, attention.launch_attention(*case.operands, tile))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("L", "T"), [(32, 64), (33, 47), (20, 5)])
def test_every_mask_where_sizes_divide_and_where_they_do_not(mask, causal, L, T):
    case = case_of(1, 2, 2, L, T, 32, 16, mask, causal, (False, False), 0)
    assert_right(case, attention.launch_attention(*case.operands, TILES[1]))


@pytest.mark.parametrize("width", range(16, 257, 16))
def test_every_width_of_a_head(width):
    case = case_of(1, 1, 2, 20, 24, width, 272 - width, "none", False, (False, True), width)
    assert_right(case, attention.int8_attention(*case.operands))


@pytest.mark.parametrize("mask", ["bool", "infinite"])
def test_a_query_that_sees_no_key_gets_zeros(mask):
    case = case_of(1, 1, 1, 18, 40, 16, 16, mask, False, (False, False), 3)
    assert bool((attention.int8_attention(*case.operands)[0, 0, 1::5] == 0).all())


def test_where_all_is_masked_by_the_lowest_number_all_keys_count_alike():
    case = case_of(1, 1, 1, 8, 40, 16, 16, "none", False, (False, False), 3)
    case.mask = torch.full((8, 40), torch.finfo(torch.float32).min)
    y = attention.int8_attention(*case.operands)
    torch.testing.assert_close(y, case.v.float().mean(2, keepdim=True).expand(1, 1, 8, 16).half(), rtol=2**-10, atol=2**-12)


def test_without_keys_the_result_is_zero_and_without_queries_it_is_empty():
    none = case_of(1, 1, 2, 5, 0, 16, 16, "none", False, (False, False), 0)
    assert bool((attention.int8_attention(*none.operands) == 0).all())
    empty = case_of(1, 1, 2, 0, 5, 16, 16, "none", True, (False, False), 0)
    assert attention.int8_attention(*empty.operands).shape == (1, 2, 0, 16)


@pytest.mark.parametrize("where", ["query", "key"])
def test_a_number_that_is_none_spoils_what_attends_to_it_and_no_other(where):
    case = case_of(1, 1, 2, 20, 20, 16, 16, "none", True, (False, False), 0)
    (case.scale_q if where == "query" else case.scale_k)[:, 0, 7] = torch.nan
    spoilt = attention.int8_attention(*case.operands).isnan().all(-1)
    wanted = torch.zeros(1, 2, 20, dtype=torch.bool)
    if where == "query":
        wanted[:, 0, 7] = True
    else:
        wanted[:, :, 7:] = True
    assert torch.equal(spoilt, wanted)


REFUSED = {
    "queries as int8 codes": dict(q=torch.zeros(1, 2, 5, 16)),
    r"do not fit: \[\[1, 2, 5, 16\], \[1, 1, 7, 32\]": dict(k=torch.zeros(1, 1, 7, 32, dtype=torch.int8)),
    "2 heads of queries are not shared by 3": dict(
        k=torch.zeros(1, 3, 7, 16, dtype=torch.int8), v=torch.zeros(1, 3, 7, 16).half(), scale_k=torch.zeros(1, 3, 7)
    ),
    "values as float16 or bfloat16": dict(v=torch.zeros(1, 1, 7, 16)),
    "a width of 24; multiples of 16 up to 256": dict(v=torch.zeros(1, 1, 7, 24).half()),
    r"the scales of queries must be float32 \[1, 2, 5\] or \[\]": dict(scale_q=torch.zeros(1, 2, 5, 1)),
    r"the scales of keys must be float32 \[1, 1, 7\] or \[\]": dict(scale_k=torch.zeros(()).half()),
    r"a mask of \[2, 7\] does not broadcast to \[1, 2, 5, 7\]": dict(mask=torch.zeros(2, 7)),
    "the mask is torch.int8": dict(mask=torch.zeros(5, 7, dtype=torch.int8)),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_other_operands_are_refused_in_a_sentence(sentence):
    case = case_of(1, 1, 2, 5, 7, 16, 16, "none", False, (False, False), 0)
    for name, changed in REFUSED[sentence].items():
        setattr(case, name, changed)
    with pytest.raises(KernelError, match=sentence):
        attention.int8_attention(*case.operands)
