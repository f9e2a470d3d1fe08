"""Blocks of transformers as functions, parameters in capitals, taken through the stages up to where kernels are chosen."""

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fxquant.graph.capture import Parameter, trace
from fxquant.graph.fuel import Fuel
from fxquant.graph.tidy import tidy
from fxquant.numerics.affine import IntAffine
from fxquant.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from fxquant.numerics.ranges import Given
from fxquant.patterns.annotate import annotate, quantize
from fxquant.patterns.canonical import canonicalize
from fxquant.patterns.transforms import equalize
from fxquant.recipe import Override, Recipe, Spec

TOKENS = {s: Spec(IntAffine(8, symmetric=s), PerToken()) for s in (True, False)}
CHANNELS = Spec(IntAffine(8), PerChannel(0))
STATIC = Spec(IntAffine(8, symmetric=False), PerTensor(), Given(-1.0, 1.0))

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
SHAPES = {
    **dict.fromkeys(("G", "B", "G2", "B2", "BO"), (D,)), "BU": (H,),
    **dict.fromkeys(("WQ", "WK", "WV", "WO"), (D, D)), **dict.fromkeys(("WG", "WU"), (H, D)), "WD": (D, H),
    "WH": (D, D // 4), "WN": (D - 8, D),
}  # fmt: skip


RECIPES = {
    "no transforms": Recipe.preset("W8A8", transforms=()),
    "static": Recipe(weights=CHANNELS, activations=STATIC),
    "static symmetric": Recipe(weights=CHANNELS, activations=Spec(IntAffine(8), PerTensor(), Given(-4.0, 4.0))),
    "attention": Recipe.preset("W8A8", transforms=(), attention=TOKENS[True]),
    "ternary": Recipe(weights=Spec(IntAffine(2), PerChannel(0)), activations=TOKENS[False]),
    "W3A8": Recipe(weights=Spec(IntAffine(3), PerGroup(64)), activations=TOKENS[True]),
    "W4A8, WU W2": Recipe.preset("W4A8", overrides=(Override("WU", "weights", Spec(IntAffine(2), PerGroup(64))),)),
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


def on_gpu(gm: fx.GraphModule) -> fx.GraphModule:
    """``gm``, whose fake values are on a GPU from now on."""
    for node in gm.graph.nodes:
        if isinstance(x := node.meta.get("val"), Tensor):
            with gm.meta["fake_mode"]:
                node.meta["val"] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
    return gm


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


def norm(x: Tensor, g: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    return F.layer_norm(x, (D,), g, b)


def two_norms_of_one_sum(x, y, WO, WQ, G, B, G2):
    h = x + y
    return h + F.linear(norm(h, G, B), WO) + F.linear(norm(h, G2), WQ)
