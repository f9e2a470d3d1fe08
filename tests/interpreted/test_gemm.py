"""Every product that the generator writes against exact integers: each width of code, split, tile, edge, pair and program."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxquant.backend.triton import gemm, launch
from fxquant.backend.triton.codes import Codes
from fxquant.backend.triton.gpus import H200
from fxquant.backend.triton.language import KernelError
from fxquant.backend.triton.program import OPS, Program
from fxquant.backend.triton.refuse import MAX_K, fits
from fxquant.backend.triton.tile import Tile

PLAIN = (Tile(16, 32, 32, 4, 2), Tile(32, 16, 64, 4, 2), Tile(16, 32, 64, 4, 2, weight_left=True))
TILES = (*PLAIN, *(replace(tile, persistent=n) for tile, n in zip(PLAIN, (1, 2, 1), strict=True)))
SHAPES = st.tuples(st.integers(0, 20), st.sampled_from([1, 16, 31, 32, 40, 64]), st.integers(1, 150))
EXACT = "t0 = add(y0, column0); t1 = maximum(t0, 0.0); t2 = mul(t1, row1); t3 = sub(full2, t2); t4 = mul(t3, scalar3)"
GATED = "t0 = relu(y0); t1 = mul(t0, y1); t2 = add(t1, full0)"


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def integers(low: int, high: int, *shape: int, seed: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=seeded(seed)).to(dtype)


def on_processors(count: int, run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What ``run`` gives where persistent programs find so many processors."""
    token = launch.asked.set((replace(H200, processors=count), launch.chosen))
    try:
        return run()
    finally:
        launch.asked.reset(token)


def operands(M: int, N: int, seed: int) -> list[torch.Tensor]:
    """What EXACT reads: small integers in several dtypes, the full one with rows apart."""
    small = [integers(-4, 5, *shape, seed=seed + i, dtype=torch.float32) for i, shape in enumerate([(N,), (M, 1), (M, 2 * N)])]
    return [small[0].half(), small[1], small[2].half()[:, ::2] if seed % 2 else small[2][:, :N], torch.tensor(0.5)]


@st.composite
def eight_bit(draw: st.DrawFn) -> tuple:
    """(M, N, K), codes and zero points for a8 products of any bits and granularity."""
    M, N, K = draw(SHAPES)
    bits, width = draw(st.sampled_from([2, 3, 4, 8])), draw(st.sampled_from([32, 64]))
    group = draw(st.sampled_from([gemm.ONE_GROUP, 32, 64, 128])) if bits < 8 else gemm.ONE_GROUP
    if group >= K or not fits(Codes(bits), group, width):
        group = gemm.ONE_GROUP
    seed = draw(st.integers(0, 2**20))
    zero = draw(st.sampled_from(["none", "token", "tensor"]))
    q = integers(-128, 128, M, K, seed=seed)
    scale_x = torch.tensor(0.5) if zero == "tensor" else 2.0 ** integers(-3, 1, M, 1, seed=seed + 1, dtype=torch.float32)
    zero_x = None if zero == "none" else integers(-128, 128, *scale_x.shape, seed=seed + 2, dtype=torch.int32)
    return (M, N, K), bits, width, group, q, scale_x, zero_x, seed


def packed(bits: int, width: int, group: int, N: int, K: int, seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """A weight of powers of two and small sums, as the op takes it; and its codes."""
    top = 1 << bits - 1
    codes = integers(-top, top, N, K, seed=seed)
    words = codes if bits == 8 else Codes(bits).pack(codes, width)
    if group >= K:
        return [words, 2.0 ** integers(-3, 1, N, seed=seed + 1, dtype=torch.float32), codes.sum(1, dtype=torch.int32)], codes
    scale = 2.0 ** integers(-2, 1, -(K // -group), N, seed=seed + 1, dtype=torch.float32)
    sums = torch.stack([part.sum(1) for part in codes.float().split(group, 1)])
    return [words, scale, (sums * scale).sum(0)], codes


@given(
    eight_bit(), st.sampled_from(TILES), st.sampled_from([1, 2, 5]), st.sampled_from([1, 2]), st.booleans(),
    st.sampled_from([1, 3, 8]),
)  # fmt: skip
def test_products_of_integers_are_exact(case, tile, parts, products, ends, processors):
    (M, N, K), bits, width, group, q, scale_x, zero_x, seed = case
    if bits < 8:
        tile = Tile(16, 32, 0, 4, 2, weight_left=True, persistent=tile.persistent)
    parts = 1 if tile.persistent else parts
    made = [packed(bits, width, group, N, K, seed + 10 * i) for i in range(products)]
    weights, plain = [t for w, _ in made for t in w], [(codes, w[1]) for w, codes in made]
    all_of_them = operands(M, N, seed)
    program, inputs = (GATED, all_of_them[2:3]) if products == 2 else (EXACT, all_of_them) if ends else ("", [])
    args = (q, scale_x, zero_x, weights, inputs, program, bits, group, width, torch.float32)
    ours = on_processors(processors, lambda: gemm.launch_a8(*args, tile, parts))
    truth = gemm.reference_a8(q, scale_x, zero_x, plain, group, program, inputs, torch.float32)
    # Sums are integers times powers of two; the product of two of them is not, and is rounded once on either side.
    torch.testing.assert_close(ours, truth, rtol=2e-6 if products == 2 else 0, atol=0)
    if tile.persistent:
        assert torch.equal(ours, gemm.launch_a8(*args, replace(tile, persistent=0), 1))


@given(eight_bit(), st.sampled_from([1, 2]), st.sampled_from([1, 2]))
def test_products_of_one_or_two_tokens_are_exact(case, tokens, products):
    (_, N, K), bits, width, group, q, scale_x, zero_x, seed = case
    K = -(K // -4) * 4
    q = integers(-128, 128, tokens, K, seed=seed)
    scale_x = scale_x if scale_x.dim() == 0 else torch.full((tokens, 1), 0.25)
    if zero_x is not None and scale_x.dim():
        zero_x = torch.tensor([-9, 77], dtype=torch.int32)[:tokens, None]
    made = [packed(bits, width, group, N, K, seed + 10 * i) for i in range(products)]
    weights, plain = [t for w, _ in made for t in w], [(codes, w[1]) for w, codes in made]
    program, inputs = ("t0 = add(y0, y1)", []) if products == 2 else (EXACT, operands(tokens, N, seed))
    tile = Tile(tokens, 16, width, 4, 2)
    ours = gemm.launch_a8(q, scale_x, zero_x, weights, inputs, program, bits, group, width, torch.float32, tile, 1)
    assert torch.equal(ours, gemm.reference_a8(q, scale_x, zero_x, plain, group, program, inputs, torch.float32))


@given(
    st.tuples(st.integers(1, 18), st.sampled_from([1, 31, 32, 64]), st.integers(1, 200)), st.sampled_from([4, 8]),
    st.sampled_from([(16, 16), (16, 32), (16, 64), (16, 128), (32, 32), (16, gemm.ONE_GROUP)]), st.booleans(),
    st.sampled_from([1, 2, 3]), st.sampled_from([1, 2]), st.booleans(), st.integers(0, 2**20),
)  # fmt: skip
def test_products_with_float_activations_are_those_of_the_decoded_weight(
    shape, bits, form, shifted, parts, products, ends, seed
):
    (M, N, K), (width, group) = shape, form
    group = gemm.ONE_GROUP if group > K else group
    # Small integers and powers of two: every product and every sum is exact, so the answer is too.
    x, top, groups = integers(-4, 5, M, K, seed=seed).half(), 1 << bits, -(K // -group)
    weights, plain = [], []
    for i in range(products):
        codes = integers(0, top, N, K, seed=seed + i, dtype=torch.int16) - (0 if shifted else top // 2)
        codes = codes.to(torch.uint8 if shifted else torch.int8)
        scale = 2.0 ** integers(-3, 1, groups, N, seed=seed + 5 + i, dtype=torch.float32)
        zero = integers(0, top, groups, N, seed=seed + 9 + i, dtype=torch.int32)
        weights += [Codes(bits, 16, not shifted).pack(codes, width), scale, *([zero] if shifted else [])]
        plain.append((codes, scale, zero if shifted else None))
    program, inputs = ("t0 = add(y0, y1)", []) if products == 2 else (EXACT, operands(M, N, seed)) if ends else ("", [])
    tile = Tile(16, 32, 0, 4, 2, weight_left=True)
    ours = gemm.launch_a16(x, weights, inputs, program, shifted, bits, group, width, torch.float16, tile, parts)
    assert ours.dtype == torch.float16
    assert torch.equal(ours, gemm.reference_a16(x, plain, group, program, inputs))


@given(
    st.tuples(st.integers(1, 18), st.sampled_from([1, 31, 64]), st.integers(1, 150)),
    st.sampled_from([(16, 16), (16, 64), (16, gemm.ONE_GROUP)]), st.sampled_from([1, 2]), st.sampled_from([1, 2]),
    st.integers(0, 2**20),
)  # fmt: skip
def test_products_of_a_codebook_are_those_of_its_entries(shape, form, parts, products, seed):
    (M, N, K), (width, group) = shape, form
    group = gemm.ONE_GROUP if group > K else group
    # Entries, activations and scales are few bits each: every product and sum is exact.
    x, book = integers(-4, 5, M, K, seed=seed).half(), tuple(float(e) / 4 for e in integers(-64, 64, 16, seed=seed).tolist())
    weights, plain = [], []
    for i in range(products):
        codes = integers(0, 16, N, K, seed=seed + i, dtype=torch.int16).to(torch.uint8)
        scale = 2.0 ** integers(-2, 1, -(K // -group), N, seed=seed + 5 + i, dtype=torch.float32)
        weights += [Codes(4, 16, False, book).pack(codes, width), scale]
        plain.append((codes, scale, None))
    program = "t0 = add(y0, y1)" if products == 2 else ""
    tile = Tile(16, 32, 0, 4, 2, weight_left=True)
    ours = gemm.launch_a16(x, weights, [], program, False, 4, group, width, torch.float16, tile, parts, book)
    assert torch.equal(ours, gemm.reference_a16(x, plain, group, program, [], None, book))
    named = gemm.a16_gemm(x, weights, [], program, False, 4, group, width, codebook=list(book))
    assert torch.equal(ours, named)


@pytest.mark.parametrize("persistent", [0, 1], ids=["plain", "persistent"])
@pytest.mark.parametrize("op", OPS)
def test_every_op_of_a_program_is_its_torch_meaning(op, persistent):
    q, w = torch.eye(16, dtype=torch.int8), torch.arange(-128, 128, dtype=torch.int8).view(16, 16).T.contiguous()
    arguments = ["y0", "scalar0"][: len([c for c in ("{0}", "{1}") if c in OPS[op].triton])]
    program = f"t0 = {op}({', '.join(arguments)})"
    for scale in (0.5, 1 / 16, 2.0**-9, 1e-3):
        args = (q, torch.tensor(scale), None)
        weights = [w, torch.ones(16), torch.zeros(16, dtype=torch.int32)]
        tile = Tile(16, 16, 16, 4, 2, persistent=persistent)
        inputs = [torch.tensor(0.75)]
        end = (weights, inputs, program, 8, gemm.ONE_GROUP, 16, torch.float32, tile, 1)
        ours = on_processors(1, lambda: gemm.launch_a8(*args, *end))  # noqa: B023
        truth = gemm.reference_a8(*args, [(w, weights[1])], gemm.ONE_GROUP, program, inputs, torch.float32)
        torch.testing.assert_close(ours, truth, rtol=2e-6, atol=2e-7 * max(1.0, 128 * scale), equal_nan=True)


@given(eight_bit(), st.booleans(), st.sampled_from([0, 1]))
def test_a_result_that_is_rounded_to_codes_is_so_to_the_last_bit(case, symmetric, persistent):
    (_, N, K), bits, width, group, q, scale_x, zero_x, seed = case
    weights, codes = packed(bits, width, group, N, K, seed)
    step, zero, low = torch.tensor(1 / 24), torch.tensor(3, dtype=torch.int32), -127.0 if symmetric else -128.0
    program = f"t0 = mul(y0, scalar0); t1 = round(t0); t2 = add(t1, scalar1); t3 = maximum(t2, {low}); t4 = minimum(t3, 127.0)"
    args = (q, scale_x, zero_x)
    tile = Tile(16, 32, 32, 4, 2, weight_left=True, persistent=persistent)
    end = (weights, [step, zero], program, bits, group, width, torch.int8, tile, 1)
    ours = on_processors(2, lambda: gemm.launch_a8(*args, *end))
    truth = gemm.reference_a8(*args, [(codes, weights[1])], group, program, [step, zero], torch.int8)
    assert torch.equal(ours, truth)


@pytest.mark.parametrize("M", [0, 1, 3, 8, 9, 16, 17, 65, 70])
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_the_op_takes_every_bucket_of_rows_and_any_strides(M, bits):
    w = integers(-4, 4, 33, 400, seed=1)[:, ::2]
    q, vectors = integers(-128, 128, 200, M, seed=0).T, torch.rand(33, 2)
    weights = [w if bits == 8 else Codes(bits).pack(w, 32), vectors[:, 0], w.sum(1, dtype=torch.int32)]
    args = (q, torch.rand(1, 1).expand(M, 1), None)
    ours = gemm.a8_gemm(*args, weights, [vectors[:, 1]], "t0 = add(y0, column0)", bits, width=32, out_dtype=torch.float16)
    truth = gemm.reference_a8(
        *args, [(w, vectors[:, 0])], gemm.ONE_GROUP, "t0 = add(y0, column0)", [vectors[:, 1]], torch.float16
    )
    assert torch.equal(ours, truth)


@pytest.mark.parametrize("M", [0, 1, 8, 9, 16, 17, 32, 33, 70])
def test_weight_only_products_take_every_bucket_of_rows_and_any_strides(M):
    codes, x = integers(-8, 8, 35, 260, seed=0), integers(-4, 5, 260, M, seed=1).half().T
    scale = (2.0 ** integers(-3, 1, 35, 3, seed=2, dtype=torch.float32)).T
    # NaN lies behind the last scale: K is filled up to groups that have none.
    scale = torch.cat([scale, torch.full((9, 35), torch.nan)])[:3]
    ours = gemm.a16_gemm(x, [Codes(4, 16).pack(codes, 64), scale], [])
    assert torch.equal(ours, gemm.reference_a16(x, [(codes, scale, None)], 128, "", []))


def test_the_largest_sums_do_not_overflow():
    K = MAX_K
    q = torch.full((1, K), 127, dtype=torch.int8)
    zero = torch.full((1, 1), -128, dtype=torch.int32)
    for bits, top in ((8, 128), (2, 2)):
        w = torch.full((2, K), -top, dtype=torch.int8)
        words = w if bits == 8 else Codes(bits).pack(w, 128)
        weights = [words, torch.ones(2), w.sum(1, dtype=torch.int32)]
        y = gemm.a8_gemm(q, torch.ones(1, 1), zero, weights, [], "", bits)
        assert torch.equal(y, torch.full((1, 2), float(-255 * top * K)))


def test_persistent_programs_take_every_tile_once_however_many_there_are():
    q, w = integers(-128, 128, 50, 40, seed=0), integers(-128, 128, 70, 40, seed=1)
    weights, tile = [w, torch.ones(70), w.sum(1, dtype=torch.int32)], Tile(16, 16, 16, 4, 2, persistent=1)
    args = (q, torch.ones(50, 1), None, weights, [], "", 8, gemm.ONE_GROUP, 16, torch.float32, tile)
    for processors in (1, 2, 7, 19, 20, 21, 40):  # 4 x 5 tiles
        ours = on_processors(processors, lambda: gemm.launch_a8(*args, 1))
        assert torch.equal(ours, (q.double() @ w.double().T).float())
    with pytest.raises(KernelError, match="K is split in 2 parts, and persistent programs take whole tiles"):
        gemm.launch_a8(*args, 2)


GOOD = [torch.zeros(3, 8, dtype=torch.int8), torch.ones(3), torch.zeros(3, dtype=torch.int32)]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"program": "t0 = gelo(y0)"}, r"'t0 = gelo\(y0\)' is no step of an epilogue"),
        ({"program": "t0 = add(y0, y1)"}, "y1 of .* is not there yet"),
        ({"program": "t0 = add(y0, row0)", "inputs": [torch.zeros(3)]}, r"row0 of .* must be \[2, 1\], not \[3\]"),
        ({"program": "t0 = add(y0, row0)"}, "row0 of .* is not among 0 operands"),
        ({"weights": [torch.zeros(3, 9, dtype=torch.int8), *GOOD[1:]]}, r"int8 \[3, 8\]"),
        ({"scale_x": torch.ones(2)}, r"must be \[2, 1\] or \[\], not \[2\]"),
        ({"bits": 5}, "codes of 5 bits"),
        ({"bits": 4, "group_size": 4}, "do not consist of whole slices|are int8"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(changes, sentence):
    good = dict(
        q=torch.zeros(2, 8, dtype=torch.int8), scale_x=torch.ones(2, 1), zero_x=None, weights=list(GOOD), inputs=[]
    )
    with pytest.raises(KernelError, match=sentence):
        gemm.a8_gemm(**{**good, **changes})


def test_groups_that_cut_a_slice_are_refused_in_a_sentence():
    with pytest.raises(KernelError, match="groups of 96 weights do not consist of whole slices of 64"):
        gemm.a16_gemm(torch.zeros(1, 192).half(), [torch.zeros(5, 64, dtype=torch.int16), torch.ones(2, 5)], [], group_size=96)


def test_activations_in_float32_are_refused_on_the_gpu():
    with pytest.raises(KernelError, match=r"torch.float16 or torch.bfloat16"):
        gemm.a16_gemm(torch.zeros(1, 256), [torch.zeros(5, 64, dtype=torch.int16), torch.ones(2, 5)], [])


def test_a_program_is_read_back_as_it_was_written():
    assert str(Program.parse(EXACT)) == EXACT
