"""How a graph reaches the Triton kernels: what they mean (on a CPU), and which of them fake tensors on a GPU get."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from blocks import (
    CHANNELS,
    COUNTS,
    NORMS,
    RECIPES,
    TOKENS,
    Block,
    D,
    data,
    norm,
    on_gpu,
    post_ln,
    pre_ln,
    pre_rms,
    quantized,
    two_norms_of_one_sum,
)
from graphs import distance, ops, run
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._functorch.aot_autograd import aot_module_simplified
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode

from fxquant import recipe as recipe_module
from fxquant.backend.fuse_norms import fuse_norms
from fxquant.backend.kernels import KERNELS
from fxquant.backend.kernels.attention_triton import lower_int8_attention
from fxquant.backend.kernels.int8_triton import Int8TritonLinear
from fxquant.backend.kernels.kernel import Kernel, Product, reference
from fxquant.backend.kernels.low_bit_triton import LowBitTritonLinear
from fxquant.backend.kernels.weight_only_triton import WeightOnlyTritonLinear
from fxquant.backend.lower import lower
from fxquant.backend.triton import launch
from fxquant.backend.triton.codes import NF4
from fxquant.backend.triton.fuse_epilogue import arguments, fuse_epilogues
from fxquant.graph.fold import fold
from fxquant.graph.fuel import Fuel
from fxquant.graph.match import Miss
from fxquant.numerics.affine import IntAffine, QParams
from fxquant.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from fxquant.numerics.ranges import DYNAMIC, Given, MinMSE
from fxquant.recipe import Override, Recipe, Spec

INT8, LOW_BIT, WEIGHT_ONLY = Int8TritonLinear(), LowBitTritonLinear(), WeightOnlyTritonLinear()
GEMM = torch.ops.fxquant.a8_gemm.default
FLOATS, HALVES = (torch.float32, torch.bfloat16, torch.float16), (torch.bfloat16, torch.float16)


@pytest.fixture
def everywhere() -> Iterator[None]:
    """Kernels for GPUs claim sites on any device; there the ops run their plain PyTorch meaning."""
    with patch.object(launch, "why_not", lambda where: ""):
        yield


# ---- what the kernels mean -------------------------------------------------------------------------------------------
@st.composite
def products(draw: st.DrawFn) -> tuple[Kernel, Product]:
    """A product that one of the kernels takes: any lead shape (none, empty), any strides, a bias or none."""
    kernel = draw(st.sampled_from([INT8, LOW_BIT, WEIGHT_ONLY]))
    symmetric = draw(st.booleans())
    if kernel is not WEIGHT_ONLY:
        static = Spec(IntAffine(draw(st.integers(4, 8)), symmetric=symmetric), PerTensor(), Given(-3.0, 5.0))
        activation = draw(st.sampled_from([TOKENS[symmetric], static]))
    if kernel is INT8:
        weight_spec, k = Spec(IntAffine(draw(st.integers(2, 8))), PerChannel(0)), draw(st.integers(1, 70))
    elif kernel is LOW_BIT:
        bits, size = draw(st.integers(2, 4)), draw(st.sampled_from([None, 32, 64, 128]))
        k = draw(st.integers(1, 300)) if size is None else size * draw(st.integers(1, 3))
        weight_spec = Spec(IntAffine(bits), PerChannel(0) if size is None else PerGroup(size))
    elif draw(st.booleans()):
        activation, weight_spec = None, Spec(IntAffine(8, symmetric=symmetric), PerChannel(0))
        k = draw(st.integers(1, 300))
    else:
        activation, weight_spec = None, Spec(IntAffine(4, symmetric=symmetric), PerGroup(128))
        k = 128 * draw(st.integers(1, 5))
    dtype = draw(st.sampled_from(HALVES if kernel is WEIGHT_ONLY else FLOATS))
    n, lead = draw(st.integers(1, 70)), draw(st.lists(st.integers(0, 4), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x = torch.randn(*lead, k, generator=generator) * draw(st.sampled_from([0.1, 1.0, 20.0]))
    x[..., 0] *= draw(st.sampled_from([1.0, 40.0]))
    x, weight, bias = (t.to(dtype) for t in (x, torch.randn(n, k, generator=generator), torch.randn(n, generator=generator)))
    if len(lead) > 1 and draw(st.booleans()):
        x = x.transpose(0, 1)
    return kernel, Product(x, weight, bias if draw(st.booleans()) else None, activation, weight_spec)


def computed(kernel: Kernel, p: Product) -> Tensor:
    prepared = (p.x,) if p.activation is None else kernel.prologue(p.x, p.activation)
    return kernel.product(prepared, kernel.pack(p.weight, p.weight_spec), p.bias, p)


@given(case=products())
def test_a_triton_kernel_is_the_product_of_fake_quantized_operands(case: tuple[Kernel, Product]) -> None:
    kernel, p = case
    with patch.object(launch, "why_not", lambda where: ""):
        assert kernel.supports(p)
    y = computed(kernel, p)
    operands = (None if t is None else t.float() for t in (p.x, p.weight, p.bias))
    expected = reference(*operands, p.activation, p.weight_spec)
    xq, wq = p.x if p.activation is None else p.activation.fake_quantize(p.x), p.weight_spec.fake_quantize(p.weight)
    size = xq.float().abs() @ wq.float().abs().t() + (0 if p.bias is None else p.bias.float().abs())
    limits = torch.finfo(p.x.dtype)
    half = limits.tiny * limits.eps / 2  # a step of the subnormal numbers, which a small result in float16 is one of
    bound = size * (4 * limits.eps + p.x.shape[-1] * torch.finfo(torch.float32).eps) + half
    assert y.dtype == p.x.dtype
    assert y.shape == expected.shape
    assert bool(((y.float() - expected).abs() <= bound).all())


DECLINED = {
    "the site is on cpu": (INT8, {}),
    "8 bits per token are needed": (INT8, {"activation": Spec(IntAffine(7), PerToken())}),
    "the range per tensor is Dynamic": (INT8, {"activation": Spec(IntAffine(8), PerTensor())}),
    "the range of a token is MinMSE": (INT8, {"activation": Spec(IntAffine(8), PerToken(), MinMSE())}),
    "symmetric integers per channel": (INT8, {"weight_spec": Spec(IntAffine(8, symmetric=False), PerChannel(0))}),
    "dtype torch.float64": (INT8, {"x": torch.zeros(2, 128, dtype=torch.float64)}),
    r"shape \[3, 65537\]": (INT8, {"weight": torch.zeros(3, 65537)}),
    "weights are int8 per channel, symmetric integers of 2, 3 or 4 bits": (LOW_BIT, {}),
    "symmetric integers of 2, 3 or 4": (LOW_BIT, {"weight_spec": Spec(IntAffine(4, symmetric=False), PerChannel(0))}),
    "int4 per tensor, one scale per channel": (LOW_BIT, {"weight_spec": Spec(IntAffine(4), PerTensor())}),
    "groups of a power of two times 32": (LOW_BIT, {"weight_spec": Spec(IntAffine(4), PerGroup(16))}),
    "activations are quantized": (WEIGHT_ONLY, {"activation": TOKENS[True]}),
    "activations have dtype torch.float32": (WEIGHT_ONLY, {"x": torch.zeros(2, 128)}),
    "activations are torch.bfloat16 and the result is torch.float32": (WEIGHT_ONLY, {"dtype": torch.float32}),
    "weights are int4 per group of 64": (WEIGHT_ONLY, {"weight_spec": Spec(IntAffine(4), PerGroup(64))}),
    "weights are int3 per channel": (WEIGHT_ONLY, {"weight_spec": Spec(IntAffine(3), PerChannel(0))}),
}


@pytest.mark.parametrize("sentence", DECLINED)
def test_a_triton_kernel_says_why_it_declines(sentence: str) -> None:
    kernel, changes = DECLINED[sentence]
    x = torch.zeros(2, 128, dtype=torch.bfloat16)
    activation = None if kernel is WEIGHT_ONLY else TOKENS[True]
    given = {"x": x, "weight": x, "bias": None, "activation": activation, "weight_spec": CHANNELS}
    with patch.object(launch, "why_not", launch.why_not if sentence.startswith("the site") else lambda where: ""):
        answer = kernel.supports(Product(**{**given, **changes}))
    assert isinstance(answer, Miss)
    assert re.search(sentence, answer.reason)


@pytest.mark.parametrize("kernel", [INT8, LOW_BIT, WEIGHT_ONLY])
def test_without_triton_a_site_on_a_gpu_is_declined(kernel: Kernel) -> None:
    with patch.object(launch, "INSTALLED", False), FakeTensorMode():
        x = torch.empty(2, 128, device="cuda")
        answer = kernel.supports(Product(x, x, None, None, CHANNELS))
    assert isinstance(answer, Miss) and "triton is not installed" in answer.reason


@dataclass(frozen=True)
class Normal4:
    """NF4 as a format: absolute maximum as the scale, the nearest entry as the code."""

    codebook: tuple[float, ...] = NF4
    bits: int = 4
    dtype: torch.dtype = torch.uint8

    def fit(self, x, granularity, range=DYNAMIC):
        return QParams(granularity.split(x.float()).abs().amax(-1, keepdim=True))

    def encode(self, x, qparams, granularity):
        steps = granularity.split(x.float()) / qparams.scale
        return granularity.join((steps[..., None] - torch.tensor(self.codebook)).abs().argmin(-1).to(torch.uint8))

    def decode(self, codes, qparams, granularity, dtype):
        return granularity.join(torch.tensor(self.codebook)[granularity.split(codes).long()] * qparams.scale).to(dtype)

    def fake_quantize(self, x, granularity, range=DYNAMIC):
        qparams = self.fit(x, granularity)
        return self.decode(self.encode(x, qparams, granularity), qparams, granularity, x.dtype)

    pack = unpack = None


@pytest.mark.parametrize("granularity", [PerGroup(64), PerGroup(128), PerChannel(0)])
def test_a_format_with_a_codebook_runs_in_the_weight_only_kernel(granularity, monkeypatch, everywhere: None) -> None:
    monkeypatch.setitem(recipe_module._PARTS, "format", (IntAffine, Normal4))
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 256, generator=generator).half() for n in (3, 40))
    p = Product(x, weight, torch.ones(40).half(), None, Spec(Normal4(), granularity))
    assert WEIGHT_ONLY.supports(p)
    for kernel in KERNELS[: KERNELS.index(next(k for k in KERNELS if isinstance(k, WeightOnlyTritonLinear)))]:
        assert not kernel.supports(p)
    truth = reference(x.double(), weight.double(), p.bias.double(), None, p.weight_spec)
    assert distance([truth], [computed(WEIGHT_ONLY, p).double()]) < 2e-3
    answer = WEIGHT_ONLY.supports(replace(p, weight_spec=Spec(Normal4(NF4[:8]), granularity)))
    assert isinstance(answer, Miss) and "a codebook of 16 entries" in answer.reason


# ---- which kernels a graph gets --------------------------------------------------------------------------------------
def lowered(gm: fx.GraphModule) -> tuple[dict[str, str], list[str]]:
    """Lower and fuse in place: which kernel took each parameter, and why rows were not fused with a norm."""
    fuel = Fuel()
    outcome = lower(gm, KERNELS, fuel)
    fuse_epilogues(gm, fuel)
    misses = fuse_norms(gm, fuel)
    gm.graph.lint()
    return {site: done.kernel for site, done in outcome.items()}, [miss.reason for miss in misses]




@pytest.mark.parametrize(
    ("block", "dtype", "dynamic"),
    [(pre_ln, torch.float32, False), (post_ln, torch.float16, True), (pre_rms, torch.bfloat16, True)],
)
def test_a_block_on_a_gpu_is_all_triton_with_its_norms_fused(block: Block, dtype: torch.dtype, dynamic: bool) -> None:
    gm = quantized(block, "cuda", dtype, dynamic=dynamic)
    kernels, _ = lowered(gm)
    found, (norms, linears, products) = ops(gm), COUNTS[block]
    assert set(kernels.values()) == {INT8.name}
    assert len(kernels) == linears
    assert found["a8_gemm"] == products
    assert found[NORMS[block]] == norms
    assert not {"linear", "gelu", "silu", "fake_quantize", "rms_norm"} & set(found)
    assert all(node.meta["val"].dtype is dtype for node in gm.graph.find_nodes(op="call_function", target=GEMM))
    runtime = fold(gm).runtime
    assert not {"amin", "amax", "round"} & set(ops(runtime))  # weights are packed once


@pytest.mark.parametrize(("block", "recipe"), [(pre_rms, "W4A16"), (post_ln, "W8A16")])
def test_weights_alone_are_quantized_for_triton_too(block: Block, recipe: str) -> None:
    gm = quantized(block, "cuda", torch.bfloat16, recipe)
    kernels, _ = lowered(gm)
    assert set(kernels.values()) == {WEIGHT_ONLY.name}
    assert ops(gm)["a16_gemm"] == COUNTS[block][2]
    assert not {"linear", "gelu", "silu"} & set(ops(gm))


@pytest.mark.parametrize(("recipe", "bits"), [("W4A8", 4), ("ternary", 2), ("W3A8", 3)])
def test_weights_of_few_bits_stay_packed_until_they_are_multiplied(recipe: str, bits: int) -> None:
    gm = quantized(pre_rms, "cuda", torch.bfloat16, recipe)
    kernels, _ = lowered(gm)
    assert set(kernels.values()) == {LOW_BIT.name}
    products = [arguments(node) for node in gm.graph.find_nodes(op="call_function", target=GEMM)]
    assert [p["bits"] for p in products] == [bits] * COUNTS[pre_rms][2]
    assert all(w.meta["val"].shape[1] < D for p in products for w in p["weights"][::3] if bits < 4)


class Driver:
    """As much of a driver as Triton needs to name a kernel's specialisation."""

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


def test_a_symbolic_number_of_tokens_is_guarded_on_its_bucket_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    gm = quantized(lambda x, WU, WD, G: (F.linear(F.gelu(F.linear(norm(x, G), WU)), WD),), "cuda", torch.bfloat16)
    lowered(gm)
    runtime, shown = fold(gm).runtime, []
    inputs = [node.meta["val"] for node in runtime.graph.find_nodes(op="placeholder")]
    with tracing(TracingContext(gm.meta["fake_mode"])), torch.no_grad():
        aot_module_simplified(runtime, inputs, fw_compiler=lambda graph, _: shown.append(graph) or graph.forward)
    assert ops(shown[0])["triton_kernel_wrapper_functional"] == 4  # norm, product, rows, product
    guards = [re.sub(r"s\d+\*s\d+", "M", str(guard.expr)) for guard in gm.meta["fake_mode"].shape_env.guards]
    assert guards == ["M > 8", "M <= 16"]


# ---- and that it computes the same -----------------------------------------------------------------------------------
@pytest.mark.parametrize("block", [pytest.param(pre_ln, marks=pytest.mark.slow), post_ln, pre_rms])
def test_in_float32_the_lowered_block_is_the_quantized_one_and_fusing_changes_no_bit(block: Block, everywhere: None) -> None:
    plain, ours = quantized(block, "cpu"), quantized(block, "cpu")
    lower(ours, KERNELS, Fuel())
    shapes = ((2, 5, D), (3, 7, D))  # what the symbols stood for, and other numbers
    apart = [run(ours, data(ours, shape)) for shape in shapes]
    assert fuse_epilogues(ours, Fuel())
    assert not {"gelu", "silu"} & set(ops(ours))
    assert all(torch.equal(*run(ours, data(ours, shape)), *before) for shape, before in zip(shapes, apart, strict=True))
    assert fuse_norms(ours, Fuel()) and NORMS[block] in ops(ours)
    assert not {"linear", "fake_quantize"} & set(ops(ours))
    for shape, before in zip(shapes, apart, strict=True):
        values = data(plain, shape)
        fused = run(ours, values)
        assert torch.equal(*fused, *before)
        assert distance(run(plain, values), fused) < 1e-6


MORE = [(pre_rms, "W4A16", torch.bfloat16), (post_ln, "W8A16", torch.float16)]
MORE += [(block, "W8A8", torch.bfloat16) for block in (pre_ln, post_ln)]
CASES = [(pre_rms, "W8A8", torch.bfloat16), *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]


@pytest.mark.parametrize(("block", "recipe", "dtype"), CASES)
def test_in_16_bits_the_lowered_block_is_as_near_to_float32_as_the_quantized_one(
    block: Block, recipe: str, dtype: torch.dtype, everywhere: None
) -> None:
    truth, plain, ours = (quantized(block, "cpu", d, recipe) for d in (torch.float32, dtype, dtype))
    lowered(ours)
    values = data(plain)
    expected = run(truth, [v.float() for v in values])
    mine, theirs = ([y.float() for y in run(gm, values)] for gm in (ours, plain))
    assert distance(expected, mine) <= distance(expected, theirs)


# ---- when a norm is fused, and with what -----------------------------------------------------------------------------
def sum_read_before_the_norm(x, y, WO, WQ, G, B):
    h = x + y
    return F.linear(h, WO), F.linear(norm(h, G, B), WQ)


def norm_read_in_float(x, y, WO, G, B):
    n = norm(x + y, G, B)
    return n.sin() + F.linear(n, WO)


def norm_given_back(x, y, WO, G):
    n = norm(x - 1, G)
    return n, F.linear(n, WO)


def a_residual_that_is_broadcast(x, BO, WO, G):
    return F.linear(norm(x + BO, G), WO)


def a_difference(x, y, WO, G):
    return F.linear(norm(x - y, G), WO)


def heads_quantized_one_by_one(x, WH, G):
    return F.linear(norm(x, G).unflatten(-1, (4, D // 4)), WH)


def norm_over_two_axes(x, WO):
    return F.linear(F.layer_norm(x, x.shape[-2:]), WO)


def a_gain_that_is_data(x, y, WO, G):
    h = x + y
    return h.sin(), F.linear(norm(h, x.sin().flatten(0, 1)[0]), WO)


FUSES = {  # how many norms are fused; residual, kept sum and kept norm of each
    sum_read_before_the_norm: [(True, True, False)],
    two_norms_of_one_sum: [(True, True, False), (False, False, False)],
    norm_read_in_float: [(True, False, True)],
    norm_given_back: [(False, False, True)],
    a_residual_that_is_broadcast: [(False, False, False)],
    a_difference: [(False, False, False)],
    a_gain_that_is_data: [(False, False, False)],
    heads_quantized_one_by_one: [],
    norm_over_two_axes: [],
}


@pytest.mark.parametrize("block", FUSES, ids=lambda block: block.__name__)
def test_a_norm_is_fused_with_what_it_reads_and_kept_for_who_else_reads_it(block: Block, everywhere: None) -> None:
    dynamic = block is not norm_over_two_axes
    plain, ours = (quantized(block, "cpu", recipe="no transforms", dynamic=dynamic) for _ in range(2))
    lowered(ours)
    found = []
    for node in ours.graph.find_nodes(op="call_function", target=torch.ops.fxquant.layer_norm_quantize.default):
        keep = (*node.args[6:], *[False] * 2)[:2]
        found.append((node.args[1] is not None, *keep))
    assert found == FUSES[block]
    assert ops(ours)["layer_norm"] == 0 or not found
    values = data(ours)
    assert distance(run(plain, values), run(ours, values)) < 1e-6


MISSES = {
    "'x_1' is x_1, which does not end a layer_norm": lambda x, WO: F.linear(x, WO),
    "'layer_norm' has rows of 128 and is quantized in rows of 32": lambda x, WH: F.linear(norm(x).view(2, 20, D // 4), WH),
    "'layer_norm' normalises over 2 axes, the kernel over the last one": norm_over_two_axes,
    "'eps' of 'rms_norm' is None": lambda x, WO: F.linear(F.rms_norm(x, (D,)), WO),
    "'layer_norm' is also read by 'sin' before it is rounded to torch.bfloat16": lambda x, y, WO: (
        (n := norm((x + y).float())).sin(),
        F.linear(n.bfloat16(), WO),
    ),
}


@pytest.mark.parametrize("sentence", MISSES)
def test_a_norm_that_is_not_fused_says_why(sentence: str, everywhere: None) -> None:
    gm = quantized(MISSES[sentence], "cpu", torch.bfloat16, recipe="no transforms", dynamic=False)
    _, (miss,) = lowered(gm)
    assert miss.startswith(sentence)
    assert ops(gm)["quantize_rows"] == 1


def test_fuel_stops_the_fusion_of_norms(everywhere: None) -> None:
    gm = quantized(two_norms_of_one_sum, "cpu", recipe="no transforms")
    lower(gm, KERNELS, Fuel())
    fuel = Fuel(1)
    fuse_norms(gm, fuel)
    assert fuel.log == ["fuse layer_norm with its quantization"]
    assert (ops(gm)["layer_norm_quantize"], ops(gm)["layer_norm"]) == (1, 1)


@pytest.mark.parametrize(("block", "recipe"), [(post_ln, "W8A8-static"), (pre_rms, "W4A16")])
def test_on_a_cpu_nothing_changes_where_no_row_is_quantized_at_run_time(block: Block, recipe: str) -> None:
    ours, before = quantized(block, "cpu", recipe=recipe), quantized(block, "cpu", recipe=recipe)
    _, misses = lowered(ours)
    for_gpus = Int8TritonLinear | LowBitTritonLinear | WeightOnlyTritonLinear
    lower(before, [k for k in KERNELS if not isinstance(k, for_gpus)], Fuel())
    before.recompile()
    assert misses == []
    assert ours.code == before.code


# ---- attention whose queries and keys are rounded --------------------------------------------------------------------
HEADS = 4
RECIPES["q, k, v per token"] = Recipe(attention=TOKENS[True])
RECIPES["q, k, v of 4 bits"] = Recipe(attention=Spec(IntAffine(4), PerToken()))
RECIPES["q, k, v static"] = Recipe(attention=Spec(IntAffine(8), PerTensor(), Given(-2.0, 3.0)))
RECIPES["q, k, v asymmetric"] = Recipe(attention=TOKENS[False])
RECIPES["probabilities"] = Recipe(attention=TOKENS[True], probabilities=TOKENS[True])
RECIPES["only keys and values"] = Recipe(attention=TOKENS[True], overrides=(Override("re:^transpose$", "attention", None),))


def heads(x, count=HEADS):
    return x.unflatten(-1, (count, D // count)).transpose(1, 2)


def repeated(x):
    """Two groups, each for two heads, as models for ops that know no groups spell it."""
    return x[:, :2, None].expand(x.shape[0], 2, 2, *x.shape[2:]).reshape(x.shape[0], 4, *x.shape[2:])


def fused(x, y, z):
    return F.scaled_dot_product_attention(heads(x), heads(y), heads(z)).transpose(1, 2).flatten(2)


def masked(x, y, z):
    mask = (x[..., 0] * 0 + x[..., 1]).relu()[:, None, None]
    return F.scaled_dot_product_attention(heads(x), heads(y), heads(z), mask, scale=0.3)


def hidden(x, y, z):
    return F.scaled_dot_product_attention(heads(x), heads(y), heads(z), (x[..., 0] > 0)[:, None, :, None]).transpose(1, 2)


def grouped(x, y, z):
    return F.scaled_dot_product_attention(heads(x), repeated(heads(y)), repeated(heads(z)), is_causal=True).transpose(1, 2)


def grouped_by_the_op(x, y, z):
    k, v = (heads(t)[:, :2] for t in (y, z))
    return F.scaled_dot_product_attention(heads(x), k, v, is_causal=True, enable_gqa=True)


def two_readers(x, y, z):
    k = heads(y)
    return F.scaled_dot_product_attention(heads(x), k, heads(z)), F.scaled_dot_product_attention(heads(z), k, heads(x))


def written_out(x, y, z):
    return torch.softmax(heads(x) @ heads(y).transpose(-1, -2) * 0.2, -1) @ heads(z)


def attending(fn, recipe, dtype=torch.float16, *, gpu=False):
    """``fn``, rounded; ``gpu``: moved there once it is traced, as fused attention cannot be for a GPU that is not here."""
    gm = quantized(fn, "cpu", dtype, recipe)
    return on_gpu(gm) if gpu else gm


def lowered_attention(gm):
    """Lower in place, as the pipeline does: why some attention was not."""
    outcome = lower_int8_attention(gm, Fuel())
    lowered(gm)
    return [miss.reason for miss in outcome.misses]


ATTENTIONS = (fused, masked, hidden, grouped, grouped_by_the_op, two_readers, written_out)


@pytest.mark.parametrize("recipe", ["q, k, v per token", "q, k, v of 4 bits", "q, k, v static"])
@pytest.mark.parametrize("fn", ATTENTIONS)
def test_attention_of_rounded_queries_and_keys_is_one_op_on_a_gpu(fn: Block, recipe: str) -> None:
    gm = attending(fn, recipe, torch.bfloat16, gpu=True)
    assert lowered_attention(gm) == []
    found = ops(gm)
    assert found["int8_attention"] == (2 if fn is two_readers else 1)
    assert not {"scaled_dot_product_attention", "softmax", "matmul", "fake_quantize"} & set(found)
    assert not gm.meta["fake_mode"].shape_env.guards
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.fxquant.int8_attention.default):
        k, v = (node.args[i].meta["val"] for i in (1, 2))
        assert k.shape[1] == v.shape[1] == (2 if "grouped" in fn.__name__ else HEADS)


@pytest.mark.parametrize("recipe", ["q, k, v per token", "q, k, v of 4 bits", "q, k, v static"])
@pytest.mark.parametrize("fn", ATTENTIONS)
def test_rounded_attention_means_the_same_before_and_after(fn: Block, recipe: str, everywhere: None) -> None:
    """In 16 bits rounded operands lose their last bits on their way to the product; codes do not, so ours is the nearer one."""
    truth, plain, ours = (attending(fn, recipe, dtype) for dtype in (torch.float32, torch.float16, torch.float16))
    assert lowered_attention(ours) == [] and ops(ours)["int8_attention"]
    for shape in ((2, 5, D), (3, 7, D)):  # what the symbols stood for, and other numbers
        values = data(plain, shape)
        expected = run(truth, [v.float() for v in values])
        theirs, mine = run(plain, values), run(ours, values)
        assert [(y.dtype, y.shape) for y in mine] == [(y.dtype, y.shape) for y in theirs]
        error = distance(expected, [y.float() for y in mine])
        assert error <= distance(expected, [y.float() for y in theirs])
        assert error < 2.0**-10  # probabilities and the result are rounded to 11 bits


DECLINED_ATTENTION = {
    "the site is on cpu": (fused, "q, k, v per token", torch.float16),
    "queries are uint8 per token, symmetric integers": (fused, "q, k, v asymmetric", torch.float16),
    "the probabilities 'fake_quantize.*' of 'matmul.*' are rounded": (fused, "probabilities", torch.float16),
    "the queries of 'scaled_dot_product_attention' are not rounded": (fused, "only keys and values", torch.float16),
    "values are torch.float32": (fused, "q, k, v per token", torch.float32),
    "written out with a mask": (
        lambda x, y, z: torch.softmax(heads(x) @ heads(y).mT * 0.2 + x[:, None, :, :1], -1) @ heads(z),
        "q, k, v per token",
        torch.float16,
    ),
    "heads are 8 and 8 wide": (
        lambda x, y, z: F.scaled_dot_product_attention(heads(x, 16), heads(y, 16), heads(z, 16)),
        "q, k, v per token",
        torch.float16,
    ),
    "the query has 3 axes": (lambda x, y, z: F.scaled_dot_product_attention(x, y, z), "q, k, v per token", torch.float16),
    "the operands broadcast": (
        lambda x, y, z: F.scaled_dot_product_attention(heads(x), heads(y[:1]), heads(z)),
        "q, k, v per token",
        torch.float16,
    ),
}


@pytest.mark.parametrize("sentence", DECLINED_ATTENTION)
def test_attention_that_stays_in_floating_point_says_why(sentence: str) -> None:
    fn, recipe, dtype = DECLINED_ATTENTION[sentence]
    gm = attending(fn, recipe, dtype, gpu=sentence != "the site is on cpu")
    (miss,) = lower_int8_attention(gm, Fuel()).misses
    assert re.search(sentence, miss.reason)
    assert ops(gm)["int8_attention"] == 0


def test_attention_that_is_not_rounded_is_left_alone_without_a_word(everywhere: None) -> None:
    gm = quantized(fused, "cpu", torch.float16, "no transforms")
    assert lower_int8_attention(gm, Fuel()) == (frozenset(), [])
    assert ops(gm)["scaled_dot_product_attention"] == 1


def test_fuel_stops_int8_attention(everywhere: None) -> None:
    gm, fuel = attending(two_readers, "q, k, v per token"), Fuel(1)
    lower_int8_attention(gm, fuel)
    assert fuel.log == ["lower scaled_dot_product_attention to int8"]
    assert (ops(gm)["int8_attention"], ops(gm)["scaled_dot_product_attention"]) == (1, 1)


def test_what_is_written_over_after_it_was_rounded_keeps_its_codes(everywhere: None) -> None:
    def overwritten(x, y, z):
        k = heads(y).clone()
        scores = heads(x) @ k.mT * 0.2
        k.zero_()
        return torch.softmax(scores, -1) @ heads(z)

    plain, ours = (attending(overwritten, "q, k, v per token") for _ in range(2))
    assert lowered_attention(ours) == []
    assert distance(run(plain, data(plain)), run(ours, data(plain))) < 2.0**-8
