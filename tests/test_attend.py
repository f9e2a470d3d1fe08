"""Products, attention and codes in one op are the three ops one after another; who becomes it in a graph.

To the last bit, but for AVX512-BF16: there what the products made is rounded to bfloat16.
"""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from instruction_sets import ISAS, needs_library, on
from torch import Tensor, fx, nn

from fxquant.backend.cpu import ops
from fxquant.graph.tidy import value
from fxquant.patterns.mask import essential_mask

FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
MASKS = {
    "none": lambda b, h, n: None,
    "padding": lambda b, h, n: torch.rand(b, 1, 1, n) > 0.3,
    "bool": lambda b, h, n: torch.rand(b, 1, n, n) > 0.3,
    "of heads": lambda b, h, n: torch.randn(1, h, n, n),
    "two axes": lambda b, h, n: torch.randn(n, n),
}


def operands(b: int, n: int, k: int, outputs: int, biased: bool, dtype: torch.dtype) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Codes of [b, n, k], and weight, scale, sums and bias of three products."""
    codes = ops.quantize_rows(torch.randn(b, n, k), 8, False)
    weights = []
    for _ in range(3):
        w = torch.randint(-127, 128, (outputs, k), dtype=torch.int8)
        bias = torch.randn(outputs).to(dtype) if biased else None
        weights.append((ops.pack_panels(w), torch.rand(outputs) / 50 / math.sqrt(k), w.sum(1, dtype=torch.int32), bias))
    return codes, [list(column) for column in zip(*weights, strict=True)]


def mask_of(kind: str, b: int, h: int, n: int, dtype: torch.dtype) -> Tensor | None:
    mask = MASKS[kind](b, h, n)
    return mask if mask is None or mask.dtype is torch.bool else mask.to(dtype)


def heads_of(isa: str, codes: list[Tensor], weights: list[list[Tensor]], h: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values, [b, h, n, d] each, of the product alone."""
    return [
        on(isa, ops.linear, *codes, *weight, h * d, "none", dtype).unflatten(-1, (h, d)).transpose(1, 2)
        for weight in zip(*weights, strict=True)
    ]


def rounded_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, float]:
    """Attention as AVX512-BF16 computes it, and how far that may be from attention.

    Operands of a sum are off by 2^-9 of themselves: scores by 2^-8 of the product of two lengths, with their sum of
    products by a little more, and a mean of values with such weights by twice that, as exp(s) stands above and below.
    """
    reach = scale * 2**-8 * float((q.float().norm(dim=-1).max() * k.float().norm(dim=-1).max()) if q.numel() else 0)
    bound = (math.expm1(2 * reach) + 2**-8) * float(v.abs().max()) * 1.01
    q, k, v = (x.bfloat16().float() for x in (q, k, v))
    scores = q @ k.mT * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask
    top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    chances = (scores - top).exp()
    return (chances.bfloat16().float() @ v / chances.sum(-1, keepdim=True)).nan_to_num(0), bound


@needs_library
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "bf16"])
@given(
    st.integers(0, 3), st.integers(0, 70), st.integers(1, 80), st.integers(1, 5), st.integers(1, 70), st.booleans(),
    st.sampled_from(sorted(MASKS)), FLOATS, st.booleans(), st.booleans(), st.integers(0, 2**16),
)  # fmt: skip
def test_it_is_three_ops_in_one_to_the_last_bit(
    isa: str, b: int, n: int, k: int, h: int, d: int, biased: bool, kind: str, dtype: torch.dtype, causal: bool,
    symmetric: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    codes, weights = operands(b, n, k, h * d, biased, dtype)
    mask = mask_of(kind, b, h, n, dtype)
    causal = causal and mask is None
    made = on(isa, ops.attend, *codes, *weights, h, dtype, mask, causal, 0.3, 8, symmetric)
    q, k_, v = heads_of(isa, codes, weights, h, d, dtype)
    mixed = on(isa, ops.attention, q, k_, v, mask, causal, 0.3) if b * n else q
    apart = ops.quantize_rows(mixed.transpose(1, 2).flatten(2), 8, symmetric)
    assert [tuple(t.shape) for t in made] == [(b, n, h * d + -(h * d) % ops.DEPTH), (b, n, 1), (b, n, 1)]
    for one, other in zip(made, apart, strict=True):
        assert torch.equal(one.nan_to_num(-1), other.nan_to_num(-1))


@needs_library
@pytest.mark.skipif("bf16" not in ISAS, reason="the kernels here are not those for AVX512-BF16")
@given(
    st.integers(1, 3), st.integers(1, 140), st.integers(1, 80), st.integers(1, 5), st.integers(1, 140), st.booleans(),
    st.sampled_from(sorted(MASKS)), FLOATS, st.booleans(), st.booleans(), st.integers(0, 2**16),
)  # fmt: skip
def test_on_bfloat16_only_operands_are_rounded(
    b: int, n: int, k: int, h: int, d: int, biased: bool, kind: str, dtype: torch.dtype, causal: bool, symmetric: bool,
    seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    codes, weights = operands(b, n, k, h * d, biased, dtype)
    mask = mask_of(kind, b, h, n, dtype)
    causal = causal and mask is None
    made = on("bf16", ops.attend, *codes, *weights, h, dtype, mask, causal, 0.3, 8, symmetric)
    q, k_, v = heads_of("bf16", codes, weights, h, d, dtype)
    rounded, bound = rounded_attention(q, k_, v, mask, causal, 0.3)
    rounded = ops.quantize_rows(rounded.to(dtype).transpose(1, 2).flatten(2), 8, symmetric)
    exact = ops.attention(q, k_, v, mask, causal, 0.3).transpose(1, 2).flatten(2).float()
    one, other = ((c[0][..., : h * d].float() - c[2]) * c[1] for c in (made, rounded))
    step = torch.maximum(made[1], rounded[1]) + torch.finfo(dtype).eps * float(v.abs().max())
    assert ((one - exact).abs() <= bound + step).all()
    # An exponential with other last bits may round to the other bfloat16: now and then, and by 1 of 256 parts of a probability.
    assert ((one - other).abs() <= step + 2**-8 * float(v.abs().max())).all()
    assert ((one - other).abs() > 0.6 * step).float().mean() <= 0.05


@needs_library
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "bf16"])
def test_its_meaning_in_plain_pytorch(isa: str) -> None:
    torch.manual_seed(0)
    codes, weights = operands(2, 40, 96, 128, True, torch.float32)
    mask = torch.rand(2, 1, 1, 40) > 0.3
    one = on(isa, ops.attend, *codes, *weights, 4, torch.float32, mask, False, 0.2, 8, False)
    other = ops.attend_reference(*codes, *weights, 4, torch.float32, mask, False, 0.2, 8, False)
    a, b = ((c[0][..., :128].float() - c[2]) * c[1] for c in (one, other))
    assert (a - b).abs().max() <= other[1].max() * 1.01  # one code, where the two differ in the last bits before rounding
    assert (one[0] != other[0]).float().mean() < 0.02


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("b", "h", "n"), [(1, 6, 100), (5, 6, 100), (1, 3, 100), (3, 3, 100), (1, 4, 100), (1, 3, 200), (1, 3, 769)]
)
@pytest.mark.parametrize("kind", ["none", "of heads"])
def test_codes_do_not_depend_on_the_number_of_threads(isa: str, b: int, h: int, n: int, kind: str) -> None:
    """Groups of heads are cut along queries, in up to 16 bands, where some threads would be left without one."""
    codes, weights = operands(b, n, 64, 192, True, torch.float32)
    mask = mask_of(kind, b, h, n, torch.float32)
    threads, found = torch.get_num_threads(), []
    for number in (1, 2, 3, 5, 16):
        torch.set_num_threads(number)
        found.append(on(isa, ops.attend, *codes, *weights, h, torch.float32, mask, mask is None, 0.2, 8, False))
    torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


class Attention(nn.Module):
    """An attention between linears, split or fused, and what may be wrong with it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.qkv = nn.Linear(64, 192)
        self.q, self.k, self.v, self.out = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        batch, length, _ = x.shape
        if self.kind == "fused":
            q, k, v = self.qkv(x).split(64, -1)
        elif self.kind == "sliced":
            y = self.qkv(x)
            q, k, v = y[..., :64], y[..., 64:128], y[..., 128:]
        elif self.kind == "from the end":
            y = self.qkv(x)
            q, k, v = y[..., :-128], y[..., 64:-64], y[..., -64:]
        elif self.kind == "cross":
            q, k, v = self.q(x), self.k(x.flip(1) * 2), self.v(x)
        elif self.kind == "order":
            q, k, v = self.v(x), self.q(x), self.k(x)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        heads = [y.view(batch, length, 4, 16).transpose(1, 2) for y in (q, k, v)]
        if self.kind == "normed":
            heads[0] = nn.functional.rms_norm(heads[0], (16,))
        there = torch.arange(length)[None, None, :, None] >= 0
        y = nn.functional.scaled_dot_product_attention(*heads, mask[:, None, None] & there)
        y = self.out(y.transpose(1, 2).reshape(batch, length, 64))
        return (y, k) if self.kind == "read" else (y,)


@needs_library
@pytest.mark.parametrize("length", [24, None], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("kind", "fused"),
    [("split", 1), ("fused", 1), ("sliced", 1), ("from the end", 1), ("order", 1), ("cross", 0), ("normed", 0), ("read", 0)],
)
@torch.no_grad()
def test_who_becomes_one_op(tmp_path: Path, kind: str, fused: int, length: int | None) -> None:
    torch.manual_seed(1)
    torch._dynamo.reset()
    model = Attention(kind).eval()
    x, mask = torch.randn(2, 24, 64), torch.rand(2, 24) > 0.3
    expected = [y.clone() for y in model(x, mask)]
    model.compile(backend="outlierq", options={"inductor": False, "trace": str(tmp_path)}, dynamic=length is None)
    for y, wanted in zip(model(x, mask), expected, strict=True):
        assert (y - wanted).norm() < 0.03 * wanted.norm()
    (lowered,) = tmp_path.glob("*/*_lowered.py")
    text = lowered.read_text()
    assert text.count("fxquant.attend_u8s8.default(") == fused
    assert text.count("fxquant.attention.default(") == 1 - fused
    assert (text.count("fxquant.linear_u8s8.default(") == 1) == bool(fused)  # the one behind the attention
    assert "ge.Scalar" not in text  # the mask says nothing of queries


class Written(nn.Module):
    """An attention in a graph with writes, and what may be wrong with it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.q, self.k, self.v, self.out = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        mask = mask.clone()
        there = torch.arange(length)[:, None] >= 0
        if self.kind == "a factor":
            there = torch.ones(length, length, dtype=torch.bool)
            there[:, 5:] = False
        seen = mask[:, None, None] & there
        if self.kind == "what is left":
            mask[:, 1::2] = False
        q, k, v = (f(x).view(batch, length, 4, 16).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, seen)
        if self.kind == "the mask, afterwards":
            seen[:, :, :, 1::2] = False
        if self.kind == "elsewhere":
            mask[:, 1::2] = False
        return self.out(y.transpose(1, 2).view(batch, length, 64)) + seen.sum() + mask.sum()


@needs_library
@pytest.mark.parametrize("kind", ["a factor", "what is left", "the mask, afterwards", "elsewhere"])
@torch.no_grad()
def test_what_is_written_to_is_read_when_it_was(kind: str) -> None:
    torch.manual_seed(2)
    torch._dynamo.reset()
    model, x, mask = Written(kind).eval(), 3 * torch.randn(2, 24, 64), torch.rand(2, 24) > 0.3
    mask[:, 0] = True
    expected = model(x, mask)
    model.compile(backend="outlierq", options={"inductor": False})
    centered = expected - expected.mean()
    assert (model(x, mask) - expected).norm() < 0.03 * centered.norm()


@needs_library
@torch.no_grad()
def test_rows_that_leave_a_graph_lie_as_they_would_without_us() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.out = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x).view(2, 24, 4, 16).transpose(1, 2)
            y = nn.functional.scaled_dot_product_attention(q, q, q)
            torch._dynamo.graph_break()
            result: Tensor = self.out(y.transpose(1, 2).view(2, 24, 64))
            return result

    torch._dynamo.reset()
    model, x = Broken().eval(), torch.randn(2, 24, 64)
    expected = model(x)
    model.compile(backend="outlierq", options={"inductor": False})
    assert (model(x) - expected).norm() < 0.03 * expected.norm()


def the_mask(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[fx.Node, fx.Node]:
    """The mask of ``function`` in a graph, and its essential part."""
    from fxquant.graph.capture import capture

    found: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., object]:
        found.append(capture(gm))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=keep)(torch.rand(2, 1, 1, 9) > 0.5, torch.arange(9))
    (output,) = found[0].graph.output_node().args
    node = output[0] if isinstance(output, list | tuple) else output
    assert isinstance(node, fx.Node)
    return node, essential_mask(node)


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda m, i: m & (torch.arange(9)[:, None] >= 0), (2, 1, 1, 9)),
        (lambda m, i: (torch.ones((), dtype=torch.bool) & (torch.arange(9)[:, None] >= 0)) & m, (2, 1, 1, 9)),
        (lambda m, i: (torch.arange(9)[:, None] + 3 >= 0) & m, (2, 1, 1, 9)),
        (lambda m, i: m & (torch.arange(9)[:, None] >= 1), (2, 1, 9, 9)),  # says something
        (lambda m, i: m & ((torch.arange(9, dtype=torch.int8) + 120)[:, None] >= 0), (2, 1, 9, 9)),  # overflows
        (lambda m, i: m & (torch.arange(-2, 7)[:, None] >= 0), (2, 1, 9, 9)),
        (lambda m, i: m & (torch.arange(9)[:, None] - 3 >= 0), (2, 1, 9, 9)),
        (lambda m, i: m & (i[:, None] >= 0), (2, 1, 9, 9)),  # an input may be anything
        (lambda m, i: m.int() & torch.ones(9, 1, dtype=torch.int32), (2, 1, 9, 9)),  # not of truth values
    ],
)
def test_a_mask_loses_what_is_always_true_and_nothing_else(
    function: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    whole, part = the_mask(function)
    assert tuple(value(whole).shape) == (2, 1, 9, 9)
    assert tuple(value(part).shape) == shape
