"""Hypothesis strategies: tensors as models have them and as nobody wants them, formats, granularities, recipes."""

import math
from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

from fxquant.numerics.affine import IntAffine
from fxquant.numerics.granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from fxquant.numerics.ranges import Dynamic, Given, MinMSE
from fxquant.recipe import ROLES, Override, Recipe, Spec

float_dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])

# What a tensor may hold: shape and generator -> float64. `ordinary` kinds stay within what every float dtype can scale.
ORDINARY: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "gaussian": lambda shape, g: torch.randn(shape, generator=g, dtype=torch.float64),
    "shifted": lambda shape, g: torch.randn(shape, generator=g, dtype=torch.float64) + 5,
    "one-sided": lambda shape, g: torch.nn.functional.gelu(torch.randn(shape, generator=g, dtype=torch.float64) * 2),
    "outlier channel": lambda shape, g: _spike(torch.randn(shape, generator=g, dtype=torch.float64), (..., 0), 300.0),
    "outlier element": lambda shape, g: _spike(torch.randn(shape, generator=g, dtype=torch.float64), (0,) * len(shape), -900.0),
    "constant": lambda shape, g: torch.full(shape, float(torch.randn((), generator=g)), dtype=torch.float64),
    "zero": lambda shape, g: torch.zeros(shape, dtype=torch.float64),
    "zero row": lambda shape, g: _spike(torch.randn(shape, generator=g, dtype=torch.float64), (0,), 0.0),
    "integers": lambda shape, g: torch.randint(-9, 10, shape, generator=g).double(),
}
EXTREME: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "denormal": lambda shape, g: torch.randn(shape, generator=g, dtype=torch.float64) * 1e-40,
    "tiniest": lambda shape, g: torch.randn(shape, generator=g, dtype=torch.float64) * 5e-324,
    "huge": lambda shape, g: torch.randn(shape, generator=g, dtype=torch.float64) * 1e38,
    "all scales": lambda shape, g: torch.randn(shape, generator=g, dtype=torch.float64)
    * 10.0 ** torch.randint(-44, 38, shape, generator=g).double(),
}


def _spike(x: Tensor, where: tuple[object, ...], factor: float) -> Tensor:
    if x.numel():
        x[where] *= factor
    return x


def _saturating(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A finite float64 tensor in ``dtype``, still finite."""
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


@st.composite
def layouts(draw: st.DrawFn, x: Tensor) -> Tensor:
    """The same values (but for `expanded`, which repeats the first row) under other strides."""
    layout = draw(st.sampled_from(["contiguous", "transposed", "strided", "expanded"]))
    if layout == "transposed" and x.ndim > 1:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided":
        return torch.stack([x, x + 1], dim=-1)[..., 0]
    if layout == "expanded" and x.shape[0] > 0:
        return x[:1].expand(x.shape)
    return x


@st.composite
def tensors(draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = float_dtypes, *, extreme: bool = False) -> Tensor:
    """Finite tensors [..., K] of 1 to 3 axes, with few tokens (none at all included) and few channels."""
    tokens = draw(st.sampled_from([(), (1,), (2,), (5,), (0,), (2, 3), (1, 1)]))
    shape = (*tokens, draw(st.sampled_from([1, 2, 3, 4, 7, 8, 12, 16, 33])))
    kinds = ORDINARY | EXTREME if extreme else ORDINARY
    kind = draw(st.sampled_from([*kinds, "listed"]))
    if kind == "listed":  # shrinks to the smallest numbers that break a law
        bound = 3e38 if extreme else 1e4
        numbers = st.floats(-bound, bound).filter(lambda v: extreme or v == 0 or abs(v) > 1e-4)
        size = math.prod(shape)
        x = torch.tensor(draw(st.lists(numbers, min_size=size, max_size=size)), dtype=torch.float64).reshape(shape)
    else:
        x = kinds[kind](shape, torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1))))
    return draw(layouts(_saturating(x, draw(dtypes))))


def granularities(shape: tuple[int, ...]) -> st.SearchStrategy[Granularity]:
    """The granularities that fit a tensor of this shape."""
    groups = [PerGroup(g) for g in (1, 2, 4, 8, 128) if shape and shape[-1] % g == 0]
    axes = [PerChannel(a) for a in range(-len(shape), len(shape))]
    return st.sampled_from([PerTensor(), *axes, *groups, *([PerToken()] if shape else [])])


formats = st.one_of(
    st.builds(IntAffine, st.integers(2, 8), symmetric=st.just(True)),
    st.builds(IntAffine, st.integers(1, 8), symmetric=st.just(False)),
)

_ends = st.tuples(*[st.floats(-1e6, 1e6, width=32)] * 2).map(sorted)
given_ranges = st.one_of(st.just(Given()), _ends.map(lambda ends: Given(*ends)))
searched_ranges = st.one_of(
    st.just(Dynamic()), st.builds(MinMSE, st.integers(1, 30), st.floats(0, 1, exclude_min=True, exclude_max=True))
)

specs = st.one_of(
    st.builds(Spec, formats, granularities((8, 8)), searched_ranges),
    st.builds(Spec, formats, st.just(PerTensor()), given_ranges),
)

_dotted = st.lists(st.sampled_from(["layers", "0", "mlp", "up", "weight", "größe"]), min_size=1, max_size=4).map(".".join)
_rules = _dotted | _dotted.map("re:{}$".format)
_ranges = st.lists(
    st.tuples(_dotted, _ends).map(lambda r: (r[0], *r[1])), max_size=3, unique_by=lambda r: r[0].removesuffix(".weight")
)


@st.composite
def recipes_of(draw: st.DrawFn) -> Recipe:
    """Recipes of all kinds; ranges are listed where the activations are static."""
    roles = {role: draw(st.none() | specs) for role in ROLES}
    static = roles["activations"] is not None and roles["activations"].is_static
    return Recipe(
        name=draw(st.text(max_size=8)),
        **roles,
        overrides=draw(st.lists(st.builds(Override, _rules, st.sampled_from(ROLES), st.none() | specs), max_size=2)),
        transforms=draw(st.lists(st.sampled_from(["migrate_gain", "smooth"]), max_size=2)),
        ignore=draw(st.lists(_rules, max_size=3)),
        ranges=draw(_ranges) if static else (),
    )


recipes = recipes_of()
