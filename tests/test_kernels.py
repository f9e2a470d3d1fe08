"""Every kernel equals the plain product of fake-quantized operands; the integer part to the last bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from instruction_sets import ISAS, needs_library, on
from strategies import tensors
from torch import Tensor

from fxquant.backend.cpu import ops
from fxquant.backend.kernels import KERNELS
from fxquant.backend.kernels.kernel import Kernel, Product, reference
from fxquant.backend.kernels.low_bit_cpu import LowBitFloatLinear
from fxquant.graph.match import Miss
from fxquant.numerics.affine import IntAffine
from fxquant.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from fxquant.numerics.ranges import Dynamic, Given, MinMSE
from fxquant.recipe import Spec

ACTIVATIONS = st.one_of(
    st.none(),
    st.builds(
        lambda b, s, r: Spec(IntAffine(b, symmetric=s), PerToken(), r),
        st.integers(2, 8),
        st.booleans(),
        st.sampled_from([Dynamic(), Dynamic(), MinMSE(3)]),
    ),
    st.builds(lambda b, s: Spec(IntAffine(b, symmetric=s), PerTensor(), Given(-3.0, 5.0)), st.integers(2, 8), st.booleans()),
)
WEIGHTS = st.one_of(
    st.builds(lambda b, s: Spec(IntAffine(b, symmetric=s), PerChannel(0)), st.integers(2, 8), st.booleans()),
    st.builds(
        lambda b, s, g: Spec(IntAffine(b, symmetric=s), PerGroup(g)), st.integers(2, 8), st.booleans(), st.integers(1, 8)
    ),
)


# Those for GPUs decline whatever lies on a CPU; tests/test_gpu_lowering.py holds them to the same law.
CPU_KERNELS = [kernel for kernel in KERNELS if "Triton" not in type(kernel).__name__]


@st.composite
def products(draw: st.DrawFn) -> tuple[Product, Tensor, Tensor, Tensor | None]:
    """A product with its data: any lead shape, odd sizes, a bias or none, half types."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    weight_spec = draw(WEIGHTS)
    n, k = draw(st.integers(1, 70)), draw(st.integers(1, 17))
    k = weight_spec.granularity.size * k if isinstance(weight_spec.granularity, PerGroup) else k
    lead = [*draw(st.lists(st.integers(0, 3), max_size=2)), draw(st.integers(0, 9))]
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, k, generator=generator) * draw(st.sampled_from([0.1, 1.0, 20.0]))
    x[..., 0] *= draw(st.sampled_from([1.0, 40.0]))
    weight = torch.randn(n, k, generator=generator)
    bias = torch.randn(n, generator=generator) if draw(st.booleans()) else None
    x, weight, bias = (None if t is None else t.to(dtype) for t in (x, weight, bias))
    return Product(x, weight, bias, draw(ACTIVATIONS), weight_spec), x, weight, bias


def run(kernel: Kernel, product: Product, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    prepared = (x,) if product.activation is None else kernel.prologue(x, product.activation)
    packed = (weight,) if product.weight_spec is None else kernel.pack(weight, product.weight_spec)
    return kernel.product(prepared, packed, bias, product)


def bound(product: Product, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What rounding in float32, and once in the dtype of the result, may cost: relative to the sum of magnitudes."""
    xq = x if product.activation is None else product.activation.fake_quantize(x)
    wq = weight if product.weight_spec is None else product.weight_spec.fake_quantize(weight)
    size = xq.float().abs() @ wq.float().abs().t() + (0 if bias is None else bias.float().abs())
    return size * (4 * torch.finfo(x.dtype).eps + x.shape[-1] * torch.finfo(torch.float32).eps) + 1e-30


def half_steps(product: Product, x: Tensor, weight: Tensor) -> Tensor:
    """What making integers of float activations may cost: tests/test_low_bit.py. A row's largest is no less than a group's."""
    assert product.weight_spec is not None
    most = x.float().abs().amax(-1, keepdim=True) if x.numel() else torch.zeros(())
    half_step = 2.0 ** (-23 if x.dtype == torch.float32 else -15) * most
    return 1.02 * half_step * product.weight_spec.fake_quantize(weight).float().abs().sum(-1)


@pytest.mark.parametrize("kernel", CPU_KERNELS, ids=lambda k: type(k).__name__)
@settings(suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])  # each supports a part of the products
@given(case=products())
def test_a_kernel_is_the_product_of_fake_quantized_operands(
    kernel: Kernel, case: tuple[Product, Tensor, Tensor, Tensor | None]
) -> None:
    product, x, weight, bias = case
    assume(kernel.supports(product))
    y = run(kernel, product, x, weight, bias)
    wide = [None if t is None else t.float() for t in (x, weight, bias)]
    expected = reference(*wide, product.activation, product.weight_spec)
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    limit = bound(product, x, weight, bias)
    if isinstance(kernel, LowBitFloatLinear):
        limit = limit + half_steps(product, x, weight)
    assert bool(((y.float() - expected).abs() <= limit).all())


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: type(k).__name__)
@given(case=products())
def test_a_kernel_that_declines_says_why(kernel: Kernel, case: tuple[Product, Tensor, Tensor, Tensor | None]) -> None:
    answer = kernel.supports(case[0])
    assert answer or (isinstance(answer, Miss) and len(answer.reason) > 10)


_W8 = Spec(IntAffine(8), PerChannel(0))
_A8 = Spec(IntAffine(8, symmetric=False), PerToken())


@pytest.mark.parametrize(
    ("weights", "activations", "kernel"),
    [
        pytest.param(_W8, _A8, "Int8CpuLinear", marks=needs_library),
        pytest.param(_W8, Spec(_A8.format, PerToken(), MinMSE()), "Int8Linear", marks=needs_library),
        pytest.param(Spec(IntAffine(4), PerGroup(8)), _A8, "LowBitLinear", marks=needs_library),
        pytest.param(Spec(IntAffine(4, symmetric=False), PerChannel(0)), _A8, "LowBitLinear", marks=needs_library),
        pytest.param(Spec(IntAffine(4), PerGroup(8)), None, "LowBitFloatLinear", marks=needs_library),
        (Spec(IntAffine(4), PerTensor()), None, "DequantizedLinear"),
        (Spec(IntAffine(4), PerTensor()), _A8, "SimulatedLinear"),
    ],
)
def test_the_first_kernel_that_supports_a_product_is_the_one_meant_for_it(
    weights: Spec, activations: Spec | None, kernel: str
) -> None:
    product = Product(torch.zeros(2, 16), torch.zeros(4, 16), None, activations, weights)
    assert next(type(k).__name__ for k in KERNELS if k.supports(product)) == kernel


@needs_library
@given(x=tensors(extreme=True), bits=st.integers(1, 8), symmetric=st.booleans())
@example(x=torch.tensor([[1.0, 2.0], [1.0, -torch.inf], [-torch.nan, 2.0]]), bits=8, symmetric=False)
@example(x=torch.tensor([[1.0, 2.0], [1.0, -torch.inf]]), bits=2, symmetric=True)
def test_rows_are_quantized_to_the_last_bit_of_the_contract(x: Tensor, bits: int, symmetric: bool) -> None:
    """Scales and zero points everywhere; codes where a row is finite, as under a scale of NaN they stand for nothing."""
    assume(bits > 1 or not symmetric)
    if x.dtype == torch.float64:
        x = x.float()
    (codes, *mine), (wanted, *plain) = ops.quantize_rows(x, bits, symmetric), ops.quantize_rows_reference(x, bits, symmetric)
    for found, told in zip(mine, plain, strict=True):
        torch.testing.assert_close(found, told, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(mine[0].isfinite().squeeze(-1), x.isfinite().all(-1) | (x.shape[-1] == 0))
    assert torch.equal(*(t.where(mine[0].isfinite(), 0) for t in (codes, wanted)))


@needs_library
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_decodes_to_nan_and_the_others_do_not(bad: float) -> None:
    x = torch.randn(3, 20)
    x[1, 17] = bad
    _, scale, _ = ops.quantize_rows(x, 8, False)
    assert scale.isnan().flatten().tolist() == [False, True, False]
    assert torch.equal(ops.quantize_rows(x, 8, True)[2], ops.quantize_rows_reference(x, 8, True)[2])


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@given(st.integers(0, 100), st.integers(1, 200), st.integers(1, 200), st.sampled_from(ops.ACTIVATIONS), st.integers(0, 2**16))
def test_the_integer_part_is_exact_and_the_epilogue_close(isa: str, m: int, k: int, n: int, activation: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
    codes = torch.randint(0, 256, (m, k), generator=generator, dtype=torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, -k % ops.DEPTH))
    zero = torch.randint(0, 256, (m, 1), generator=generator, dtype=torch.int32)
    ones, sums = torch.ones(n), weight.sum(1, dtype=torch.int32)
    args = (codes, torch.ones(m, 1), zero, ops.pack_panels(weight), ones, sums, None, n)
    assert torch.equal(on(isa, ops.linear, *args, "none", torch.float32), ops.linear_reference(*args, "none", torch.float32))
    small = (codes, torch.full((m, 1), 1e-4), zero, *args[3:])
    size = ops.linear_reference(*small, "none", torch.float32).abs().max().item() if m else 0.0
    close = {"rtol": 2e-6, "atol": 2e-7 * size}  # a curve of GELU is good to 3e-8, and floats to 6e-8
    torch.testing.assert_close(
        on(isa, ops.linear, *small, activation, torch.float32), ops.linear_reference(*small, activation, torch.float32), **close
    )


@st.composite
def passes(draw: st.DrawFn, rows: int, inner: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[object, ...]:
    """The arguments of a row's way behind ``x``: a residual or none, a norm or none, what is kept."""
    make = lambda *size: torch.randn(*size, generator=generator).to(dtype)  # noqa: E731
    norm, symmetric = draw(st.sampled_from(ops.NORMS)), draw(st.booleans())
    residual = make(rows, inner) if draw(st.booleans()) else None
    scale = make(inner) if residual is not None and draw(st.booleans()) else None
    weight, bias = (make(inner) if norm != "none" and draw(st.booleans()) else None for _ in range(2))
    bias = None if norm == "rms" else bias
    kept = draw(st.booleans()), draw(st.booleans())
    return residual, scale, norm, weight, bias, 1e-5, draw(st.integers(2, 8)), symmetric, *kept


FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@needs_library
@given(st.data(), st.integers(0, 20), st.integers(1, 150), FLOATS, st.integers(0, 2**16))
def test_a_row_is_added_normalised_and_quantized(data: st.DataObject, m: int, k: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator).to(dtype)
    residual, scale, norm, weight, bias, eps, bits, symmetric, _, _ = data.draw(passes(m, k, dtype, generator))
    how = (residual, scale, norm, weight, bias, eps, bits, symmetric, True, True)
    *codes, total, normed = ops.normalize_rows(x, *how)
    *_, expected_total, expected = ops.normalize_rows_reference(x, *how)
    assert torch.equal(total, expected_total)
    for mine, plain in zip(codes, ops.quantize_rows_reference(normed, bits, symmetric), strict=True):
        assert torch.equal(mine, plain)
    # Rounding in float32 of a sum of k terms, whose mean is subtracted and may be all there is (k = 1); and once in the dtype.
    largest = 0 if total.numel() == 0 else float(total.double().abs().max())
    gain = 1 if weight is None else float(weight.double().abs().max())
    by = 1 if norm == "none" or not m else float((total.double().var(1, correction=0) * (norm == "layer") + eps).rsqrt().max())
    by = min(by, 1e-5**-0.5)
    loss = (k + 8) * torch.finfo(torch.float32).eps * largest * by * gain * (1 + largest * by)
    torch.testing.assert_close(normed, expected, rtol=torch.finfo(dtype).eps, atol=loss + 1e-7)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
def test_operands_that_do_not_agree_are_refused(isa: str) -> None:
    codes, weight = torch.zeros(4, 64, dtype=torch.uint8), torch.zeros(3, 64, dtype=torch.int8)
    one, each = torch.ones(1), torch.ones(4, 1)
    for scale, zero in ((each, one), (one, each), (torch.ones(3, 1), torch.ones(3, 1))):
        with pytest.raises(RuntimeError, match="the sizes do not agree"):
            packed = (ops.pack_panels(weight), torch.ones(3), torch.zeros(3, dtype=torch.int32), None, 3)
            on(isa, ops.linear, codes, scale, zero.int(), *packed, "none", torch.float32)
    nothing = (torch.empty(0, 16, 64, 4, dtype=torch.int8), torch.empty(0), torch.empty(0, dtype=torch.int32), None, 0)
    with pytest.raises(RuntimeError, match="to 0 outputs"):
        on(isa, ops.linear, codes, one, one.int(), *nothing, "none", torch.float32)
    no_inputs = (torch.empty(1, 0, 64, 4, dtype=torch.int8), torch.ones(3), torch.zeros(3, dtype=torch.int32), None, 3)
    with pytest.raises(RuntimeError, match="the sizes do not agree"):
        on(isa, ops.linear, codes[:, :0], each, each.int(), *no_inputs, "none", torch.float32)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("k", [33024, 33088, 66048])
def test_sums_of_many_inputs_are_exact(isa: str, k: int) -> None:
    weight = torch.full((3, k), 127, dtype=torch.int8)  # the largest sums there are, of both signs
    weight[1] = -127
    codes, zero = torch.full((20, k), 255, dtype=torch.uint8), torch.tensor([0, 128, 254, 255]).int().repeat(5)[:, None]
    args = (codes, torch.ones(20, 1), zero, ops.pack_panels(weight), torch.ones(3), weight.sum(1, dtype=torch.int32), None, 3)
    assert torch.equal(on(isa, ops.linear, *args, "none", torch.float32), ops.linear_reference(*args, "none", torch.float32))


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@given(
    st.data(), st.integers(0, 300), st.integers(1, 100), st.integers(1, 150), st.sampled_from(ops.ACTIVATIONS), FLOATS,
    st.integers(0, 2**16),
)  # fmt: skip
def test_a_product_that_ends_in_codes_is_the_product_and_then_the_codes_to_the_last_bit(
    isa: str, data: st.DataObject, m: int, k: int, n: int, activation: str, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
    prepared = ops.quantize_rows(torch.randn(m, k, generator=generator), 8, False)
    packed = (ops.pack_panels(weight), torch.rand(n, generator=generator) / 100, weight.sum(1, dtype=torch.int32))
    args = (*prepared, *packed, torch.randn(n, generator=generator), n, activation, dtype)
    how = data.draw(passes(m, n, dtype, generator))
    apart = ops.normalize_rows(on(ISAS[0], ops.linear, *args), *how)
    for one, two in zip(on(isa, ops.linear_rows, *args, *how), apart, strict=True):
        assert torch.equal(one, two)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@given(
    st.integers(0, 300), st.integers(1, 100), st.integers(1, 4), st.booleans(), st.sampled_from(ops.ACTIVATIONS), FLOATS,
    st.integers(2, 8), st.booleans(), st.integers(0, 2**16),
)  # fmt: skip
def test_a_gated_product_is_two_products_one_times_the_other_and_then_the_codes_to_the_last_bit(
    isa: str, m: int, k: int, panels: int, with_bias: bool, activation: str, dtype: torch.dtype, bits: int, symmetric: bool,
    seed: int,
) -> None:  # fmt: skip
    generator, n = torch.Generator().manual_seed(seed), panels * ops.PANEL
    how = (activation, dtype, bits, symmetric)
    weight = torch.randint(-127, 128, (2 * n, k), generator=generator, dtype=torch.int8)
    prepared = ops.quantize_rows(torch.randn(m, k, generator=generator), 8, False)
    bias = torch.randn(2 * n, generator=generator) if with_bias else None
    packed = (ops.pack_panels(weight), torch.rand(2 * n, generator=generator) / 100, weight.sum(1, dtype=torch.int32), bias)
    halves = zip(*((None, None) if t is None else t.chunk(2) for t in packed), strict=True)
    gate, up = (
        on(ISAS[0], ops.linear, *prepared, *half, n, applied, dtype)
        for half, applied in zip(halves, (activation, "none"), strict=True)
    )
    made = on(isa, ops.linear_gated, *prepared, *packed, n, *how)
    for one, two in zip(made, ops.quantize_rows(gate * up, bits, symmetric), strict=True):
        assert torch.equal(one, two)
    if activation == "none" and not with_bias:  # else one of them rounds once more
        for one, two in zip(made, ops.linear_gated_reference(*prepared, *packed, n, *how), strict=True):
            assert torch.equal(one, two)


@needs_library
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("m", [1, 40, 50, 1000])
def test_results_do_not_depend_on_the_number_of_threads(isa: str, m: int) -> None:
    x, weight = torch.randn(m, 96), torch.randint(-127, 128, (200, 96), dtype=torch.int8)
    threads = torch.get_num_threads()
    panels, sums = ops.pack_panels(weight), weight.sum(1, dtype=torch.int32)
    scale, residual = torch.rand(200), torch.randn(m, 200)
    wide = (ops.pack_panels(weight[:128]), scale[:128], sums[:128], None, 64)
    results = []
    for number in (1, 2, 8):  # the last: more threads than bands of 50 rows
        torch.set_num_threads(number)
        args = (*ops.quantize_rows(x, 8, False), panels, scale, sums, None, 200, "gelu", torch.float32)
        passed = on(isa, ops.linear_rows, *args, residual, scale, "layer", scale, None, 1e-5, 8, False, True, True)
        gated = on(isa, ops.linear_gated, *args[:3], *wide, "silu", torch.float32, 8, False)
        results.append((on(isa, ops.linear, *args), *passed, *gated))
    torch.set_num_threads(threads)
    for found in zip(*results, strict=True):
        assert all(torch.equal(found[0], other) for other in found[1:])


@needs_library
@pytest.mark.parametrize(("isa", "unit"), [("vnni", "VNNI"), ("avx2", "AVX2"), ("sse", "")])
def test_an_environment_variable_chooses_the_instruction_set(isa: str, unit: str) -> None:
    code = (
        "from fxquant.backend.cpu import build; from fxquant.backend.kernels.int8_cpu import Int8CpuLinear; "
        "print(build.isa(), Int8CpuLinear().name)"
    )
    env = {**os.environ, "FXQUANT_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    if unit:
        assert done.stdout.split()[:3] == [isa, "int8", unit]
    else:
        assert "FXQUANT_CPU_ISA is 'sse'; one of avx2, vnni, bf16, amx is needed" in done.stderr


@given(st.integers(1, 200), st.integers(1, 40))
def test_panels_are_unpacked_to_what_was_packed(n: int, k: int) -> None:
    codes = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    assert torch.equal(ops.unpack_panels(ops.pack_panels(codes), n, k), codes)


WITHOUT_KERNELS = (
    "import sys\n"
    "from fxquant.backend.cpu import build\n"
    "import torch, fxquant\n"
    "m = torch.nn.Module(); m.linear = torch.nn.Linear(8, 8)\n"
    "f = lambda x: m.linear(x)\n"
    "y = torch.compile(f, backend='outlierq', options={'inductor': False})(torch.randn(2, 8))\n"
    "assert sys.argv[1] in build.why_not(), build.why_not()\n"
    "print(fxquant.explain(m))\n"
)


def test_without_a_compiler_another_kernel_runs_and_the_reason_is_known() -> None:
    _another_kernel_runs({"CXX": "no-such-compiler", "PATH": ""}, "no-such-compiler")


@needs_library
def test_where_the_compiled_kernels_cannot_be_kept_another_kernel_runs_and_the_reason_is_known(tmp_path: Path) -> None:
    (file := tmp_path / "file").touch()
    _another_kernel_runs({**os.environ, "FXQUANT_CACHE": str(file / "cache")}, "cannot be kept in")


def _another_kernel_runs(env: dict[str, str], reason: str) -> None:
    command = [sys.executable, "-c", WITHOUT_KERNELS, reason]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "oneDNN" in done.stdout or "simulated" in done.stdout
    assert "is not used" not in done.stderr  # no instruction set is to blame


@needs_library
@pytest.mark.parametrize("works", [True, pytest.param(False, id="fails")])
def test_while_the_kernels_are_compiled_a_trial_answers_and_the_build_has_the_last_word(works: bool, tmp_path: Path) -> None:
    """The compiler knows the flags and waits; what it then cannot compile makes the graph be lowered again, without it."""
    compiler, go = tmp_path / "compiler", tmp_path / "go"
    wait = f'while [ ! -e "{go}" ]; do sleep 0.05; done'
    end = 'exec g++ "$@"' if works else 'echo "error: disk full" >&2; exit 1'
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-fsyntax-only*|*--version*) exec g++ "$@";; esac\n{wait}\n{end}\n')
    compiler.chmod(0o755)
    code = (
        "import pathlib, torch, fxquant\n"
        "from fxquant.backend.cpu import build\n"
        "from fxquant.backend import pipeline\n"
        "m = torch.nn.Module(); m.linear = torch.nn.Linear(8, 8); x = torch.randn(2, 8)\n"
        "asked = []\n"
        "compile_runtime = pipeline.compile_runtime\n"
        "def compiling(gm, inductor):\n"
        "    asked.append((build.running(), build.why_not()))\n"
        f"    pathlib.Path({str(go)!r}).touch()\n"
        "    return compile_runtime(gm, inductor)\n"
        "pipeline.compile_runtime = compiling\n"
        "f = lambda x: m.linear(x)\n"
        "y = torch.compile(f, backend='outlierq', options={'inductor': False})(x)\n"
        "assert (y - m.linear(x)).norm() < 0.05 * y.norm()\n"
        "print(asked, build.why_not(), fxquant.explain(m))\n"
    )
    env = {**os.environ, "CXX": str(compiler), "FXQUANT_CACHE": str(tmp_path), "FXQUANT_CPU_ISA": "vnni"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "[(True, '')" in done.stdout
    if works:
        assert "int8 VNNI" in done.stdout
    else:
        assert done.stdout.count("error: disk full") == 2  # of the second compilation, and in the end
        assert "int8 VNNI" not in done.stdout
