"""The text of generated kernels: golden files for people, and what in it follows from what is known of sizes.

``FXQUANT_ACCEPT=1 python -m pytest tests/test_source.py`` writes the golden files anew. What the texts mean is tested in
``tests/interpreted``, what they compile to in ``tests/test_triton_compile.py``.
"""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from fxquant.backend.triton.codes import Codes
from fxquant.backend.triton.gemv import write_gemv
from fxquant.backend.triton.source import Form, kernel, write, write_sum

GATE = "t0 = silu(y0); t1 = mul(t0, y1)"
RESIDUAL = "t0 = add(y0, column0); t1 = gelu(t0); t2 = add(t1, full1)"
EVEN = dict(even_m=True, even_n=True, even_k=True)
PLAIN = Form(zero_x=True, program=RESIDUAL)
GATED = Form(products=2, codes=Codes(4), chunk=1, zero_x=True, program=GATE, weight_left=True, even_n=True, even_k=True)
FLOAT = Form(floats="bf16", codes=Codes(4, 16), chunk=2, sums_x=True, offset=136, weight_left=True, parts=True, **EVEN)

PERSISTENT = Form(products=2, zero_x=True, program=GATE, persistent=True, even_n=True, even_k=True)

GOLDEN = {
    "w8a8_residual": lambda: write(PLAIN),
    "w8a8_pair_persistent": lambda: write(PERSISTENT),
    "w4a8_gate": lambda: write(GATED),
    "w4a16_parts": lambda: write(FLOAT) + "\n\n" + write_sum(FLOAT),
    "w2a8_one_token": lambda: write_gemv(Form(codes=Codes(2), zero_x=True, tokens=1, even_n=True, even_k=True)),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_a_kernel_reads_as_it_did(name: str) -> None:
    file, text = Path(__file__).parent / "golden" / f"{name}.txt", GOLDEN[name]()
    if os.environ.get("FXQUANT_ACCEPT") == "1":
        file.write_text(text)
    assert file.read_text() == text


@pytest.mark.parametrize("form", [PLAIN, PERSISTENT, GATED, replace(FLOAT, parts=False)], ids=lambda form: form.name)
def test_where_sizes_are_known_to_divide_there_is_no_mask(form: Form) -> None:
    assert "mask" not in write(replace(form, **EVEN))
    for fact in EVEN:
        assert "mask" in write(replace(form, **{**EVEN, fact: False}))


def test_what_is_not_there_is_not_loaded() -> None:
    bare = write(Form())
    assert not {"zero_x", "sum_w0", "column0", "full1", "scale_w1"} & set(bare.replace(",", " ").split())
    assert "column0" in write(Form(program=RESIDUAL))


def test_equal_forms_are_one_kernel() -> None:
    pytest.importorskip("triton")
    assert kernel(write(PLAIN)) is kernel(write(replace(PLAIN)))
    assert kernel(write(PLAIN)) is not kernel(write(GATED))
