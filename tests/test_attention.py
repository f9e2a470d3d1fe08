"""The attention kernel is PyTorch's attention, whatever the mask, the strides and the type."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from instruction_sets import ISAS, needs_library, on
from torch import nn

from fxquant.backend.cpu import build, ops

pytestmark = needs_library

# Rounding of the result in its own type, and a few in float32; relative to the largest value, of which the result is a mean.
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}

MASKS = {
    "none": lambda b, h, n, t: None,
    "bool": lambda b, h, n, t: torch.rand(b, 1, n, t) > 0.3,
    "keys": lambda b, h, n, t: torch.rand(b, 1, 1, t) > 0.3,
    "two axes": lambda b, h, n, t: torch.rand(1, t) > 0.3,
    "float": lambda b, h, n, t: torch.randn(b, h, n, t),
    "transposed": lambda b, h, n, t: torch.randn(t, n).t(),
    "one number": lambda b, h, n, t: torch.randn(1, h, n, 1),
}


def bound(isa: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> float:
    """What the result may be off by: it is a mean of the values, with weights that are off by what the scores are.

    On AMX a float is two bfloat16, each nearest to what it stands for (2^-8), so both together are off by 2^-16, and the
    product of the low parts, another 2^-16, is left out. Operands in bfloat16 are what they are;
    probabilities are split in any case.
    """
    closest = CLOSE[v.dtype]
    if isa == "amx":
        split = 3 * 2**-16
        scores = (
            0.0
            if q.dtype is torch.bfloat16
            else split * scale * float(q.float().norm(dim=-1).max() * k.float().norm(dim=-1).max())
        )
        closest += split + 2 * scores  # exp(s) over its sum: the numerator and the denominator
    return closest * float(v.abs().max())


@pytest.mark.parametrize("isa", ISAS)
@given(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 2), st.integers(1, 40), st.integers(1, 150), st.integers(1, 90),
    st.sampled_from(sorted(MASKS)), st.booleans(), st.sampled_from(list(CLOSE)), st.integers(0, 2**16),
)  # fmt: skip
def test_it_is_attention(
    isa: str, b: int, g: int, per: int, n: int, t: int, d: int, kind: str, joined: bool, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    h = g * per

    def make(heads: int, size: int) -> torch.Tensor:
        x = torch.randn(b, size, heads, d).transpose(1, 2) if joined else torch.randn(b, heads, size, d)
        return x.to(dtype)

    q, k, v = make(h, n), make(g, t), make(g, t)
    mask = MASKS[kind](b, h, n, t)
    mask = mask.to(dtype) if mask is not None and mask.dtype is not torch.bool else mask
    wide = mask if mask is None or mask.dtype is torch.bool else mask.double()
    for causal in (False, True) if mask is None else (False,):
        y = on(isa, ops.attention, q, k, v, mask, causal, 1 / math.sqrt(d))
        expected = ops.attention_reference(q.double(), k.double(), v.double(), wide, causal, 1 / math.sqrt(d))
        assert y.shape == expected.shape and y.dtype == dtype
        assert (y.double() - expected.nan_to_num()).abs().max() <= bound(isa, q, k, v, 1 / math.sqrt(d))


@pytest.mark.parametrize("isa", ISAS)
def test_a_row_that_is_masked_throughout_is_zero(isa: str) -> None:
    q = torch.randn(1, 1, 9, 8)
    mask = torch.ones(9, 9, dtype=torch.bool)
    mask[4] = False
    y = on(isa, ops.attention, q, q, q, mask, False, 1.0)
    assert bool((y[0, 0, 4] == 0).all()) and bool((y[0, 0, 5] != 0).all())


def test_there_may_be_no_sequence() -> None:
    code = "import torch; from fxquant.backend.cpu import ops; q = torch.ones(0, 2, 1, 8); k = torch.ones(0, 2, 9, 8); "
    code += "print(tuple(ops.attention(q, k, k, None, False, 1.0).shape))"  # the first that the kernel is asked for
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(0, 2, 1, 8)", done.stderr


@pytest.mark.parametrize("isa", ISAS)
def test_a_nan_stays_in_its_query(isa: str) -> None:
    q, kv = torch.randn(1, 1, 9, 8), torch.randn(1, 1, 20, 8)
    q[0, 0, 3, 2] = float("nan")
    y = on(isa, ops.attention, q, kv, kv, None, False, 1.0)
    assert y.isnan().any(-1).flatten().tolist() == [i == 3 for i in range(9)]


@pytest.mark.parametrize("isa", ISAS)
def test_sums_do_not_depend_on_the_number_of_threads(isa: str) -> None:
    q, threads, found = torch.randn(1, 2, 200, 32), torch.get_num_threads(), []
    for number in (1, 2):
        torch.set_num_threads(number)
        found.append(on(isa, ops.attention, q, q, q, None, True, 0.2))
    torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_few_queries_do_not_depend_on_the_number_of_threads() -> None:
    threads, found = torch.get_num_threads(), []
    q, k, v = torch.randn(2, 6, 3, 40), torch.randn(2, 2, 500, 40), torch.randn(2, 2, 500, 40)
    mask = torch.rand(500) > 0.2
    for number in (1, 2):
        torch.set_num_threads(number)
        found.append(ops.attention(q, k, v, mask, False, 0.2))
    torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_what_lies_behind_the_last_key_in_sight_is_not_read() -> None:
    q, k, v = torch.randn(2, 4, 2, 16), torch.randn(2, 2, 300, 16), torch.randn(2, 2, 300, 16)
    mask = torch.zeros(2, 1, 2, 300, dtype=torch.bool)
    mask[0, :, 0, 70], mask[0, :, 1, :20], mask[1, :, :, :130] = True, True, True
    y = ops.attention(q, k, v, mask, False, 0.2)
    k[0, :, 71:], v[0, :, 71:], k[1, :, 130:], v[1, :, 130:] = (float("nan"),) * 4
    assert torch.equal(ops.attention(q, k, v, mask, False, 0.2), y)
    mask[:] = False
    assert ops.attention(q, k, v, mask, False, 0.2).count_nonzero() == 0


def lowered(model: nn.Module, folder: Path, *inputs: torch.Tensor) -> tuple[torch.Tensor, str]:
    torch._dynamo.reset()
    model.compile(backend="outlierq", options={"inductor": False, "trace": str(folder)})
    y = model(*inputs)
    (stage,) = folder.glob("*/*_lowered.py")
    return y, stage.read_text()


@torch.no_grad()
@pytest.mark.parametrize("queries", [16, 1])
def test_the_pipeline_uses_it(tmp_path: Path, queries: int) -> None:
    class Attention(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    q = torch.randn(1, 2, queries, 16)
    y, text = lowered(Attention().eval(), tmp_path, q, q, q)
    expected = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert (y - expected).abs().max() <= bound(build.isa(), q, q, q, 1 / math.sqrt(16))
    assert "fxquant.attention" in text


@torch.no_grad()
@pytest.mark.parametrize("queries", [16, 1])
@pytest.mark.parametrize("how", ["expand", "written meanwhile", "queries of one head"])
def test_keys_that_heads_share_are_not_repeated(tmp_path: Path, queries: int, how: str) -> None:
    class Grouped(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            axis = 1 if how == "queries of one head" else 2  # heads in another order are another repetition
            keys, values = (t.unsqueeze(axis).expand(*t.shape[:axis], 3, *t.shape[axis:]).reshape(2, 6, 40, 16) for t in (k, v))
            if how == "written meanwhile":
                k.zero_()
            return nn.functional.scaled_dot_product_attention(q, keys, values)

    q, k, v = torch.randn(2, 6, queries, 16), torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16)
    expected = Grouped()(q, k.clone(), v)
    y, text = lowered(Grouped().eval(), tmp_path, q, k.clone(), v)
    assert (y - expected).abs().max() <= bound(build.isa(), q, k, v, 1 / math.sqrt(16))
    assert "fxquant.attention" in text and ("aten.expand" in text) == (how != "expand")
