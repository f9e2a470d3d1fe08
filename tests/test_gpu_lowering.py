"""How a graph reaches the Triton kernels: what they mean (on a CPU), and which of them fake tensors on a GPU get."""

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from graphs import distance, ops, run
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._functorch.aot_autograd import aot_module_simplified
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fxquant import recipe as recipe_module
from fxquant.backend.cpu import build
from fxquant.backend.cpu import ops as cpu
from fxquant.backend.fuse_norms import fuse_norms
from fxquant.backend.fuse_products import fuse_products
from fxquant.backend.join_products import join_gates, join_products
from fxquant.backend.kernels import KERNELS
from fxquant.backend.kernels.int8_triton import Int8TritonLinear
from fxquant.backend.kernels.kernel import Kernel, Product, reference
from fxquant.backend.kernels.low_bit_triton import LowBitTritonLinear
from fxquant.backend.kernels.weight_only_triton import WeightOnlyTritonLinear
from fxquant.backend.lower import lower
from fxquant.backend.triton import launch
from fxquant.backend.triton.codes import NF4
from fxquant.backend.triton.fuse_epilogue import arguments, fuse_epilogues
from fxquant.graph.capture import Parameter, trace
from fxquant.graph.fold import fold
from fxquant.graph.fuel import Fuel
from fxquant.graph.match import Miss
from fxquant.graph.tidy import tidy
from fxquant.numerics.affine import IntAffine, QParams
from fxquant.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from fxquant.numerics.ranges import DYNAMIC, Given, MinMSE
from fxquant.patterns.annotate import annotate, quantize
from fxquant.patterns.canonical import canonicalize
from fxquant.patterns.transforms import equalize
from fxquant.recipe import Recipe, Spec

INT8, LOW_BIT, WEIGHT_ONLY = Int8TritonLinear(), LowBitTritonLinear(), WeightOnlyTritonLinear()
TOKENS = {s: Spec(IntAffine(8, symmetric=s), PerToken()) for s in (True, False)}
CHANNELS = Spec(IntAffine(8), PerChannel(0))
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


STATIC = Spec(IntAffine(8, symmetric=False), PerTensor(), Given(-1.0, 1.0))
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
D, H = 128, 256  # of the stream and of the MLP


def pre_ln(x, G, B, WQ, WO, BO, G2, B2, WU, BU, WD):
    y = F.layer_norm(x, (D,), G, B)
    h = x + F.linear(F.linear(y, WQ), WO, BO)
    return h + F.linear(F.gelu(F.linear(F.layer_norm(h, (D,), G2, B2), WU, BU)), WD)


def post_ln(x, WO, BO, G, B, WU, BU, WD, G2, B2):
    h = F.layer_norm(F.linear(x, WO, BO) + x, (D,), G, B, 1e-12)
    return F.layer_norm(F.linear(F.gelu(F.linear(h, WU, BU), approximate="tanh"), WD) + h, (D,), G2, B2, 1e-12)


def rms(x, G):
    """As decoders spell it: in float32 inside, the gain outside."""
    h = x.float()
    return G * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def pre_rms(x, G, WO, G2, WG, WU, WD):
    h = x + F.linear(rms(x, G), WO)
    y = rms(h, G2)
    return h + F.linear(F.silu(F.linear(y, WG)) * F.linear(y, WU), WD)


Block = Callable[..., Tensor]
GEMM = torch.ops.fxquant.a8_gemm.default
SHAPES = {
    **dict.fromkeys(("G", "B", "G2", "B2", "BO"), (D,)), "BU": (H,),
    **dict.fromkeys(("WQ", "WO"), (D, D)), **dict.fromkeys(("WG", "WU"), (H, D)), "WD": (D, H),
    "WH": (D, D // 4), "WN": (D - 8, D),
}  # fmt: skip


RECIPES = {
    "no transforms": Recipe.preset("W8A8", transforms=()),
    "static": Recipe(weights=CHANNELS, activations=STATIC),
    "static symmetric": Recipe(weights=CHANNELS, activations=Spec(IntAffine(8), PerTensor(), Given(-4.0, 4.0))),
    "ternary": Recipe(weights=Spec(IntAffine(2), PerChannel(0)), activations=TOKENS[False]),
    "W3A8": Recipe(weights=Spec(IntAffine(3), PerGroup(64)), activations=TOKENS[True]),
}


@lru_cache
def stage(fn: Block, device: str, dtype: torch.dtype, recipe: str, dynamic: bool) -> fx.GraphModule:
    """``fn`` on x [2, 5, D] (``dynamic``: 2 and 5 are hints of symbols) and parameters, all fake, up to the quantized stage."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    example = torch.empty(2, 5, D)
    sizes = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.DYNAMIC, DimDynamic.STATIC])
    shape = mode.from_tensor(example, source=ConstantSource("x"), symbolic_context=sizes).shape if dynamic else example.shape
    names = list(inspect.signature(fn).parameters)
    with mode:
        values = [torch.empty(SHAPES.get(name, shape), device=device, dtype=dtype) for name in names]
    gm = trace(fn, values, mode)
    for name, node in zip(names, gm.graph.find_nodes(op="placeholder"), strict=True):
        if name in SHAPES:
            node.meta["parameter"] = Parameter(name, "parameter")
    settings, fuel = RECIPES[recipe] if recipe in RECIPES else Recipe.preset(recipe), Fuel()
    gm = canonicalize(tidy(gm), fuel)
    equalize(gm, settings.transforms, fuel)
    return quantize(gm, annotate(gm, settings, fuel))


def quantized(
    fn: Block, device: str, dtype: torch.dtype = torch.float32, recipe: str = "W8A8", *, dynamic: bool = True
) -> fx.GraphModule:
    """A copy of ``stage`` to be lowered."""
    made, graph = stage(fn, device, dtype, recipe, dynamic), fx.Graph()
    graph.output(graph.graph_copy(made.graph, {}))
    gm = fx.GraphModule(made, graph)
    gm.meta["fake_mode"] = made.meta["fake_mode"]
    return gm


def lowered(gm: fx.GraphModule) -> tuple[dict[str, str], list[str]]:
    """Lower and fuse in place: which kernel took each parameter, and why rows were not fused with a norm."""
    fuel = Fuel()
    outcome = lower(gm, KERNELS, fuel)
    fuse_epilogues(gm, fuel)
    misses = fuse_norms(gm, fuel)
    gm.graph.lint()
    return {site: done.kernel for site, done in outcome.items()}, [miss.reason for miss in misses]


def data(gm: fx.GraphModule, shape: Sequence[int] = (2, 5, D)) -> list[Tensor]:
    """Values for the placeholders of ``gm``; every input has ``shape``, gains are about 1."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for node in gm.graph.find_nodes(op="placeholder"):
        fake, parameter = node.meta["val"], node.meta.get("parameter")
        drawn = torch.randn(fake.shape if parameter else shape, generator=generator)
        if parameter:
            drawn = drawn / 11 if drawn.dim() == 2 else 1 + drawn / 4
        found.append(drawn.to(fake.dtype))
    return found


NORMS = {pre_ln: "layer_norm_quantize", post_ln: "layer_norm_quantize", pre_rms: "rms_norm_quantize"}
COUNTS = {pre_ln: (2, 4, 4), post_ln: (1, 3, 3), pre_rms: (2, 4, 3)}  # norms that a linear reads, linears, products of them


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
def norm(x: Tensor, g: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    return F.layer_norm(x, (D,), g, b)


def sum_read_before_the_norm(x, y, WO, WQ, G, B):
    h = x + y
    return F.linear(h, WO), F.linear(norm(h, G, B), WQ)


def two_norms_of_one_sum(x, y, WO, WQ, G, B, G2):
    h = x + y
    return h + F.linear(norm(h, G, B), WO) + F.linear(norm(h, G2), WQ)


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


@pytest.mark.skipif(bool(build.why_not()), reason=f"no C++ kernels here: {build.why_not()}")
@pytest.mark.parametrize("block", NORMS)
def test_on_a_cpu_norms_fuse_with_their_quantization_and_products_with_both(block: Block) -> None:
    plain, ours = quantized(block, "cpu"), quantized(block, "cpu")
    lower(ours, KERNELS, Fuel())
    before = run(ours, data(ours))
    assert fuse_norms(ours, Fuel()) is not None and ops(ours)["normalize_rows_u8"] == COUNTS[block][0]
    apart = run(ours, data(ours))
    fuse_products(ours, Fuel())
    ours.graph.lint()
    ours.recompile()
    assert ops(ours)["linear_rows_u8s8"] > 0
    assert torch.equal(*run(ours, data(ours)), *apart)
    for other in (before, run(plain, data(plain))):
        assert distance(other, apart) < 1e-6


@pytest.mark.skipif(bool(build.why_not()), reason=f"no C++ kernels here: {build.why_not()}")
def test_on_a_cpu_rows_that_are_viewed_in_another_shape_before_they_are_quantized_stay_apart() -> None:
    def block(x, G, B, WU):
        h = F.layer_norm(x, (D,), G, B).reshape(-1, D)
        return F.linear(h, WU), h

    gm = quantized(block, "cpu", recipe="W8A8", dynamic=False)
    lower(gm, KERNELS, Fuel())
    before = run(gm, data(gm))
    (miss,) = fuse_norms(gm, Fuel())
    gm.recompile()
    assert "viewed in another shape" in miss.reason and ops(gm)["normalize_rows_u8"] == 0
    assert all(map(torch.equal, run(gm, data(gm)), before))


@pytest.mark.skipif(bool(build.why_not()), reason=f"no C++ kernels here: {build.why_not()}")
def test_on_a_cpu_the_scale_that_a_transform_leaves_on_a_shortcut_goes_along() -> None:
    def block(x, G, B, WU, WD, G2, B2, WO):
        h = F.layer_norm(x, (D,), G, B)
        return F.linear(F.layer_norm(F.linear(F.linear(h, WU), WD) + h, (D,), G2, B2), WO)

    gm = quantized(block, "cpu")
    lower(gm, KERNELS, Fuel())
    fuse_norms(gm, Fuel())
    apart, between = run(gm, data(gm)), ops(gm)["mul"]
    fuse_products(gm, Fuel())
    gm.graph.lint()
    gm.recompile()
    (scaled,) = [n for n in gm.graph.nodes if n.target is cpu.linear_rows and n.args[10] is not None]
    assert scaled.args[11] is not None and ops(gm)["mul"] == between - 1
    assert torch.equal(*run(gm, data(gm)), *apart)


GATED = {  # block -> whether it becomes one op
    "gate first": (lambda x, WG, WU, WD: F.linear(F.silu(F.linear(x, WG)) * F.linear(x, WU), WD), True),
    "gate last": (lambda x, WG, WU, WD: F.linear(F.linear(x, WU) * F.gelu(F.linear(x, WG)), WD), True),
    "no activation": (lambda x, WG, WU, WD: F.linear(F.linear(x, WG) * F.linear(x, WU), WD), True),
    "two activations": (lambda x, WG, WU, WD: F.linear(F.silu(F.linear(x, WG)) * F.silu(F.linear(x, WU)), WD), False),
    "other codes": (lambda x, WG, WU, WD: F.linear(F.silu(F.linear(x.sin(), WG)) * F.linear(x, WU), WD), False),
    "broadcast": (lambda x, WG, WU, WD: F.linear(F.silu(F.linear(x, WG)) * F.linear(x[:1], WU), WD), False),
    "the square of one": (lambda x, WG, WU, WD: F.linear((y := F.linear(x, WG)) * y, WD) + F.linear(x, WU)[..., :D], False),
    "read by others": (lambda x, WG, WU, WD: ((y := F.silu(F.linear(x, WG))).sum(), F.linear(y * F.linear(x, WU), WD)), False),
    "one bias": (lambda x, WG, WU, BU, WD: F.linear(F.silu(F.linear(x, WG)) * F.linear(x, WU, BU), WD), False),
    "two biases": (lambda x, WG, WU, BU, WD: F.linear(F.silu(F.linear(x, WG, BU)) * F.linear(x, WU, BU), WD), True),
}


@pytest.mark.skipif(bool(build.why_not()), reason=f"no C++ kernels here: {build.why_not()}")
@pytest.mark.parametrize("block", GATED)
def test_on_a_cpu_a_gate_what_it_lets_through_and_their_codes_become_one_op(block: str) -> None:
    fn, fuses = GATED[block]
    gm = quantized(fn, "cpu", recipe="W8A8", dynamic=False)
    lower(gm, KERNELS, Fuel())
    before = run(gm, data(gm))
    misses = fuse_products(gm, Fuel())
    gm.graph.lint()
    gm.recompile()
    assert ops(gm)["linear_gated_u8s8"] == fuses
    assert fuses or any(miss.reason for miss in misses)
    assert all(map(torch.equal, run(gm, data(gm)), before))


@pytest.mark.skipif(bool(build.why_not()), reason=f"no C++ kernels here: {build.why_not()}")
@pytest.mark.parametrize("recipe", ["W4A8", "W4A16"])
@pytest.mark.parametrize("block", GATED)
def test_on_a_cpu_a_gate_of_low_bit_weights_and_what_it_lets_through_become_one_op(block: str, recipe: str) -> None:
    fn, joins = GATED[block]
    gm = quantized(fn, "cpu", recipe=recipe, dynamic=False)
    lower(gm, KERNELS, Fuel())
    before = run(gm, data(gm))
    misses = join_gates(gm, Fuel())
    gm.graph.lint()
    gm.recompile()
    assert ops(gm)["low_bit_gated_u8" if recipe == "W4A8" else "low_bit_gated_float"] == joins
    assert joins or any(miss.reason for miss in misses)
    assert all(map(torch.equal, run(gm, data(gm)), before))


def heads(y: Tensor) -> Tensor:
    return y.view(*y.shape[:-1], -1, 32).transpose(1, 2)


def attention_of(x: Tensor, *weights: Tensor) -> list[Tensor]:
    return [heads(F.linear(x, w)) for w in weights]


JOINED = {  # block -> how many products are left
    "queries, keys and values": (lambda x, WQ, WG, WU: sum(h.sum(1).sum(-1) for h in attention_of(x, WQ, WG, WU)), 1),
    "others read between them": (lambda x, WQ, WG: (y := F.linear(x, WQ).exp()) + (F.linear(x, WG) * y.sum())[..., :D], 1),
    "with biases": (lambda x, WG, WU, BU: F.linear(x, WG, BU).cos() + F.linear(x, WU, BU).sin(), 1),
    "other inputs": (lambda x, WG, WU: F.linear(x, WG).cos() + F.linear(x.sin(), WU).sin(), 2),
    "other epilogues": (lambda x, WG, WU: F.silu(F.linear(x, WG)).cos() + F.linear(x, WU).sin(), 2),
    "a bias and none": (lambda x, WG, WU, BU: F.linear(x, WG, BU).cos() + F.linear(x, WU).sin(), 2),
    "no whole panels": (lambda x, WG, WN: F.linear(x, WG)[..., : D - 8] + F.linear(x, WN).sin(), 2),
    "rows are viewed as one": (lambda x, WG, WU: F.linear(x, WG).view(-1).sum() + F.linear(x, WU).sin(), 2),
    "one is returned": (lambda x, WG, WU: (heads(F.linear(x, WG)), F.linear(x, WU).sin()), 2),
    "one is written to": (lambda x, WG, WU: ((y := F.linear(x, WG))[..., :4].mul_(2).sum() + y) * F.linear(x, WU).sin(), 2),
    "strides are asked for": (lambda x, WG, WU: F.linear(x, WG).as_strided((2, 2), (1, 1)).sum() + F.linear(x, WU).sin(), 2),
}


@pytest.mark.skipif(bool(build.why_not()), reason=f"no C++ kernels here: {build.why_not()}")
@pytest.mark.parametrize("recipe", ["W8A8", "W4A8", "W4A16"])
@pytest.mark.parametrize("block", JOINED)
def test_on_a_cpu_products_of_the_same_input_become_one(block: str, recipe: str) -> None:
    fn, left = JOINED[block]
    gm = quantized(fn, "cpu", recipe=recipe, dynamic=False)
    lower(gm, KERNELS, Fuel())
    fuse_products(gm, Fuel())
    before = run(gm, data(gm))
    misses = join_products(gm, Fuel())
    gm.graph.lint()
    gm.recompile()
    counts = ops(gm)
    assert sum(counts[op] for op in ("linear_u8s8", "low_bit_linear_u8", "low_bit_linear_float")) == left
    assert all(miss.reason for miss in misses) and (not misses or left == 2)
    assert all(map(torch.equal, run(gm, data(gm)), before))


def test_a_product_that_others_read_too_is_not_fused_and_says_why() -> None:
    def block(x, WU, WO):
        y = F.linear(x, WU)
        return y.sin(), F.linear(y[..., :D], WO), F.linear(y.relu()[..., :D], WO)

    gm = quantized(block, "cpu", recipe="no transforms", dynamic=False)
    lower(gm, KERNELS, Fuel())
    reasons = [miss.reason for miss in fuse_products(gm, Fuel())]
    assert ops(gm)["linear_rows_u8s8"] == 0
    assert reasons and all(reasons)
