"""What to do to a model, as a value: which transforms, which format on weights and on activations, what to leave alone.

>>> Recipe.preset("W4A16", ignore=("lm_head",))                             # doctest: +SKIP
Recipe(name='W4A16', weights=Spec(format=IntAffine(bits=4, symmetric=False), granularity=PerGroup(size=128), ...), ...)
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .errors import RecipeError, nearest
from .numerics.affine import IntAffine, QParams
from .numerics.formats import FORMATS, Format
from .numerics.granularity import GRANULARITIES, Granularity, PerChannel, PerGroup, PerTensor, PerToken
from .numerics.observer import Observer
from .numerics.observers import AverageMinMax, TokenWise
from .numerics.ranges import DYNAMIC, RANGES, Given, MinMSE, OutputMSE, Range, check_range

VERSION = 1  # of the dict form; a change that old code would misread raises it


@dataclass(frozen=True)
class Spec:
    """How one edge is quantized: a format, a granularity, and where the range comes from.

    >>> Spec(IntAffine(8), PerToken())
    Spec(format=IntAffine(bits=8, symmetric=True), granularity=PerToken(), range=Dynamic())
    """

    format: Format
    granularity: Granularity
    range: Range = DYNAMIC

    def __post_init__(self) -> None:
        for name, kinds in _PARTS.items():
            if not isinstance(value := getattr(self, name), kinds):
                raise RecipeError(f"the {name} of a Spec is {value!r}, one of {_names(kinds)} is needed")
        if isinstance(self.range, Given) and self.granularity != (wanted := self.range.granularity):
            kind = "one per channel" if self.range.per_channel else "one per tensor"
            raise RecipeError(f"a given range is {kind}, the granularity is {self.granularity}; use {wanted}")

    def fit(self, x: Tensor) -> QParams:
        """The scales and zero points for ``x``."""
        return self.format.fit(x, self.granularity, self.range)

    def encode(self, x: Tensor, qparams: QParams) -> Tensor:
        """The codes of ``x``, in the same shape."""
        return self.format.encode(x, qparams, self.granularity)

    def decode(self, codes: Tensor, qparams: QParams, dtype: torch.dtype) -> Tensor:
        """The values of ``codes``, in the same shape."""
        return self.format.decode(codes, qparams, self.granularity, dtype)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """``x`` quantized and dequantized: same shape, same dtype."""
        return self.format.fake_quantize(x, self.granularity, self.range)

    def to_json(self) -> str:
        """One line of JSON, as an op of the graph carries it; ``from_json`` is the inverse."""
        return json.dumps(_spec_to_dict(self))

    @staticmethod
    def from_json(text: str) -> "Spec":
        """The Spec that ``to_json`` wrote."""
        return _spec_from_dict("spec", json.loads(text))

    @property
    def is_static(self) -> bool:
        """For activations: the range is fixed beforehand, given or observed, not taken from the data at hand."""
        return isinstance(self.range, Given) or self.is_observed

    @property
    def is_observed(self) -> bool:
        """For activations: calibration has to watch them and put a given range in the place of this one."""
        return self.observer is not None or self.range == Given()

    @property
    def observer(self) -> Observer | None:
        """What watches an activation, where one range holds for all tokens; that of weights or of each token does not."""
        fixed = isinstance(self.granularity, PerTensor) or self.granularity == PerChannel(-1)
        return self.range if isinstance(self.range, Observer) and fixed else None

    @property
    def is_of_outputs(self) -> bool:
        """For weights: calibration has to find their ranges, by the outputs of the product."""
        return self.range == OutputMSE()

    @property
    def brief(self) -> str:
        """A few words for a report: ``int4 per group of 128``."""
        sign = "int" if getattr(self.format, "symmetric", True) else "uint"
        size = f" of {self.granularity.size}" if isinstance(self.granularity, PerGroup) else ""
        static = " static" if self.is_static else ""
        return f"{sign}{self.format.bits} per {type(self.granularity).__name__.removeprefix('Per').lower()}{size}{static}"


ROLES = ("weights", "activations", "embeddings", "norms", "attention", "probabilities", "residuals")
"""What a Spec of a recipe may be for; the fields of Recipe of these names say what each is."""


@dataclass(frozen=True)
class Override:
    """Another Spec, or none, for one role at the sites that ``rule`` names (as the rules of ``ignore`` do).

    >>> Override("classifier", "weights", Spec(IntAffine(8), PerChannel(0)))   # doctest: +SKIP
    """

    rule: str
    role: str
    spec: Spec | None

    def __post_init__(self) -> None:
        if not isinstance(self.rule, str) or not self.rule:
            raise RecipeError(f"an override has the rule {self.rule!r}, a name or 're:...' is needed")
        _check_rule(self.rule)
        if self.role not in ROLES:
            raise RecipeError(f"the override of {self.rule!r} has the role {self.role!r}: {nearest(str(self.role), ROLES)}")
        if not isinstance(self.spec, Spec | None):
            raise RecipeError(f"the override of {self.rule!r} has the spec {self.spec!r}, a Spec or None is needed")
        _check_of_outputs(f"the override of {self.rule!r}", self.role, self.spec)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A frozen, hashable, printable choice of transforms and specs; its repr and its dict can be read back.

    What is rounded, each a Spec or None for floating point:
    ``weights`` and ``activations``: the operands of products of an activation with a parameter.
    ``embeddings``: the tables of look-ups. ``norms``: the outputs of norms that a product reads, for the shortcut as well.
    ``attention``: queries, keys and values. ``probabilities``: what the softmax of attention gives.
    ``residuals``: the operands of residual adds and of concatenations of activations; those of one op share a range.

    ``transforms``: in the order they are applied, each a name, with arguments or without: "smooth(alpha=0.75)".
    ``ignore``: sites to leave alone, see ``ignores``.
    ``overrides``: other Specs for some sites; where several name a site, the last one counts.
    ``ranges``: (site, lo, hi) where the activations are static, in the values that are quantized, after the transforms.
    Raises RecipeError for anything of a wrong type, saying where and what is needed.
    """

    name: str = "custom"
    weights: Spec | None = None
    activations: Spec | None = None
    embeddings: Spec | None = None
    norms: Spec | None = None
    attention: Spec | None = None
    probabilities: Spec | None = None
    residuals: Spec | None = None
    overrides: tuple[Override, ...] = ()
    transforms: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    ranges: tuple[tuple[str, float, float], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise RecipeError(f"the name of a recipe is {self.name!r}, a string is needed")
        for role in ROLES:
            if not isinstance(spec := getattr(self, role), Spec | None):
                raise RecipeError(f"{role} of recipe {self.name!r} is {spec!r}, a Spec or None is needed")
            _check_of_outputs(f"recipe {self.name!r}", role, spec)
        object.__setattr__(self, "overrides", tuple(self.overrides))
        for override in self.overrides:
            if not isinstance(override, Override):
                raise RecipeError(f"overrides of recipe {self.name!r} holds {override!r}, an Override is needed")
        for field in ("transforms", "ignore"):
            object.__setattr__(self, field, _strings(field, getattr(self, field)))
        for rule in self.ignore:
            _check_rule(rule)
        object.__setattr__(self, "ranges", _ranges(self.ranges))
        if self.ranges and (self.activations is None or not self.activations.is_static):
            what = "left in floating point" if self.activations is None else f"{self.activations.range}"
            raise RecipeError(f"recipe {self.name!r} lists ranges and its activations are {what}; a static recipe takes them")

    @staticmethod
    def presets() -> tuple[str, ...]:
        """The names that ``preset`` knows."""
        return tuple(recipe.name for recipe in PRESETS)

    @staticmethod
    def preset(name: str, **changes: Any) -> "Recipe":
        """The preset ``name``, with fields changed.

        >>> Recipe.preset("W8A8", ignore=["lm_head"]).ignore
        ('lm_head',)
        """
        for recipe in PRESETS:
            if recipe.name == name:
                return recipe.replace(**changes)
        raise RecipeError(f"there is no recipe {name!r}: {nearest(str(name), Recipe.presets())}")

    def replace(self, **changes: Any) -> "Recipe":
        """This recipe with fields changed; raises RecipeError for a field that there is not."""
        _check_keys("a recipe", changes, Recipe)
        return replace(self, **changes)

    def ignores(self, site: str) -> str | None:
        """The first rule of ``ignore`` that names ``site`` (a parameter's dotted name), or None.

        A plain rule names a module or a parameter by its dotted name or the end of it, and a module stands for all that is
        in it: ``"mlp.up"`` names ``layers.0.mlp.up.weight``, ``"layers.0"`` that whole layer, ``"head"`` not ``lm_head``.
        ``"re:..."`` is a regular expression, searched for in the name with and without a final ``.weight``.
        """
        return next((rule for rule in self.ignore if rule_names(rule, site)), None)

    def spec(self, role: str, names: Iterable[str]) -> Spec | None:
        """The Spec of ``role`` at a site that goes by ``names``: of the last override that names it, else the recipe's own."""
        names = tuple(names)
        for override in reversed(self.overrides):
            if override.role == role and any(rule_names(override.rule, name) for name in names):
                return override.spec
        return getattr(self, role)  # type: ignore[no-any-return]  # a field of this name

    def specs(self) -> list[tuple[str, Spec]]:
        """(role, Spec) of all that is rounded at some site: the recipe's own, and those of its overrides."""
        own = [(role, getattr(self, role)) for role in ROLES]
        return [(role, spec) for role, spec in (*own, *((o.role, o.spec) for o in self.overrides)) if spec is not None]

    def given_range(self, site: str) -> tuple[float, float] | None:
        """(lo, hi) that ``ranges`` lists for ``site`` (a final ``.weight`` may be left out on either side), or None."""
        for listed, lo, hi in self.ranges:
            if listed.removesuffix(".weight") == site.removesuffix(".weight"):
                return lo, hi
        return None

    def to_dict(self) -> dict[str, Any]:
        """This recipe in JSON primitives; ``from_dict`` is the inverse, also after a trip through JSON."""
        return {
            "version": VERSION,
            "name": self.name,
            **{role: _spec_to_dict(getattr(self, role)) for role in ROLES},
            "overrides": [{"rule": o.rule, "role": o.role, "spec": _spec_to_dict(o.spec)} for o in self.overrides],
            "transforms": list(self.transforms),
            "ignore": list(self.ignore),
            "ranges": [list(r) for r in self.ranges],
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "Recipe":
        """The recipe that ``to_dict`` wrote; a key left out has the default of its field.

        Raises RecipeError for unknown keys and kinds (with the nearest known one), wrong types, tensors, and newer versions.
        """
        refuse_tensors("recipe", data)
        if not isinstance(data, Mapping):
            raise RecipeError(f"a recipe is given as {type(data).__name__}, a dict as Recipe.to_dict() writes it is needed")
        given = dict(data)
        if (version := given.pop("version", VERSION)) != VERSION:
            raise RecipeError(f"the recipe has version {version!r}, this fxquant reads version {VERSION}; upgrade it")
        _check_keys("a recipe", given, Recipe)
        for role in ROLES:
            if given.get(role) is not None:
                given[role] = _spec_from_dict(role, given[role])
        given["overrides"] = tuple(_override_from_dict(override) for override in given.get("overrides", ()))
        return Recipe(**given)


# The parts of a Spec and the kinds there are of each.
_PARTS: dict[str, tuple[type[Any], ...]] = {"format": FORMATS, "granularity": GRANULARITIES, "range": RANGES}


def _spec_to_dict(spec: Spec | None) -> dict[str, Any] | None:
    return None if spec is None else {name: _kind_to_dict(getattr(spec, name)) for name in _PARTS}


def _override_from_dict(data: Any) -> Override:
    _check_mapping("an override", data)
    _check_keys("an override", data, Override)
    if missing := [f.name for f in fields(Override) if f.name not in data]:
        raise RecipeError(f"an override has no {missing[0]!r}; it needs a rule, a role and a spec (or None)")
    spec = data["spec"]
    return Override(data["rule"], data["role"], None if spec is None else _spec_from_dict("override.spec", spec))


def _kind_to_dict(value: Any) -> dict[str, Any]:
    given = {f.name: getattr(value, f.name) for f in fields(value)}
    return {"kind": type(value).__name__} | {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}


def _spec_from_dict(where: str, data: Any) -> Spec:
    _check_mapping(where, data)
    _check_keys(where, data, Spec)
    for name in ("format", "granularity"):
        if name not in data:
            raise RecipeError(f"{where} has no {name!r}; a spec needs a format and a granularity")
    return Spec(**{name: _kind_from_dict(f"{where}.{name}", data[name], _PARTS[name]) for name in data})


def _kind_from_dict(where: str, data: Any, kinds: tuple[type[Any], ...]) -> Any:
    _check_mapping(where, data)
    found = next((kind for kind in kinds if kind.__name__ == data.get("kind")), None)
    if found is None:
        known = tuple(kind.__name__ for kind in kinds)
        raise RecipeError(f"{where} has the kind {data.get('kind')!r}: {nearest(str(data.get('kind')), known)}")
    given = {key: value for key, value in data.items() if key != "kind"}
    _check_keys(where, given, found)
    try:
        return found(**given)
    except TypeError as error:  # a required field is missing: PerGroup without a size
        raise RecipeError(f"{where}: {str(error).replace('__init__()', found.__name__)}") from None


def _check_mapping(where: str, data: Any) -> None:
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where} of the recipe is {data!r}, a dict is needed, as Recipe.to_dict() writes it")


def _check_keys(where: str, given: Mapping[str, Any], kind: Any) -> None:
    known = tuple(f.name for f in fields(kind))
    for key in given:
        if key not in known:
            options = nearest(str(key), known) if known else "it has none"
            raise RecipeError(f"{where} has no field {key!r}: {options}")


def refuse_tensors(where: str, data: Any) -> None:
    """Raise RecipeError if ``data`` holds a tensor anywhere: torch.compile compares options, and tensors do not compare."""
    if isinstance(data, Tensor):
        raise RecipeError(f"{where} is a tensor, and options hold JSON values alone; write a number, with .item() or .tolist()")
    if isinstance(data, Mapping):
        for key, value in data.items():
            refuse_tensors(f"{where}.{key}", value)
    elif isinstance(data, list | tuple):
        for index, value in enumerate(data):
            refuse_tensors(f"{where}[{index}]", value)


def _check_of_outputs(where: str, role: str, spec: Spec | None) -> None:
    """Raise RecipeError if something other than a weight is to have the range that is best for a product's outputs."""
    if spec is None or not spec.is_of_outputs:
        return
    if role != "weights":
        raise RecipeError(f"{where} has {spec.range} for its {role}; it is for the weights of products")
    if isinstance(spec.granularity, PerChannel) and spec.granularity != PerChannel(0):
        raise RecipeError(f"{where} has {spec.range} and {spec.granularity}; ranges of rows, groups or all of it are searched")


def _strings(field: str, value: Any) -> tuple[str, ...]:
    """A list will do where a tuple is meant; one string will not, its letters are not names."""
    if isinstance(value, str) or not isinstance(value, Iterable) or isinstance(value, Tensor):
        raise RecipeError(f"{field} of a recipe is {value!r}, a list of names is needed, such as {field}=['lm_head']")
    names = tuple(value)
    for name in names:
        if not isinstance(name, str) or not name:
            raise RecipeError(f"{field} of a recipe holds {name!r}, a name is needed")
    return names


def _ranges(value: Any) -> tuple[tuple[str, float, float], ...]:
    if isinstance(value, str | Tensor) or not isinstance(value, Iterable):
        raise RecipeError(f"ranges of a recipe is {value!r}, a list of (site, lo, hi) is needed")
    found: dict[str, tuple[str, float, float]] = {}
    for entry in value:
        if not isinstance(entry, list | tuple) or len(entry) != 3 or not isinstance(entry[0], str):
            raise RecipeError(f"ranges of a recipe holds {entry!r}, (site, lo, hi) is needed")
        site, lo, hi = entry
        check_range(lo, hi, f"the site {site!r}")
        if found.setdefault(site.removesuffix(".weight"), (site, float(lo), float(hi))) != (site, float(lo), float(hi)):
            raise RecipeError(f"ranges of a recipe lists the site {site!r} twice with different values; keep one")
    return tuple(found.values())


def _check_rule(rule: str) -> None:
    if rule.startswith("re:"):
        try:
            re.compile(rule[3:])
        except re.error as error:
            raise RecipeError(f"the ignore rule {rule!r} is no regular expression: {error}") from None


def rule_names(rule: str, site: str) -> bool:
    """Whether an ignore rule names a site, as ``Recipe.ignores`` says."""
    if rule.startswith("re:"):
        return any(re.search(rule[3:], name) for name in (site, site.removesuffix(".weight")))
    return f".{rule}." in f".{site}."


def _names(kinds: tuple[type[Any], ...]) -> str:
    return ", ".join(kind.__name__ for kind in kinds)


_INT8_CHANNELS = Spec(IntAffine(8), PerChannel(0))
_UINT8_TOKENS = Spec(IntAffine(8, symmetric=False), PerToken())
_INT4_GROUPS = Spec(IntAffine(4), PerGroup(128))
_UINT4_GROUPS = Spec(IntAffine(4, symmetric=False), PerGroup(128))


def _static(bits: int, range: Range) -> Spec:
    """Activations on one asymmetric grid per tensor, whose range calibration finds."""
    return Spec(IntAffine(bits, symmetric=False), PerTensor(), range)


def whole(name: str, widths: tuple[int, int, int], range: Range, *transforms: str) -> Recipe:
    """Every operand of a transformer, in Outlier Suppression's W-E-A ``widths``; rows of tables and outputs have a scale each.

    The tails of probabilities are not those of tokens, so no ratio of tokens clips them; where others are learned, they are.
    """
    weights, embeddings, activations = widths
    rounded = _static(activations, range)
    whole_tokens = TokenWise(1.0, fine=True) if isinstance(range, TokenWise) and range.fine else AverageMinMax()
    return Recipe(
        name=name,
        weights=Spec(IntAffine(weights), PerChannel(0), MinMSE()),
        embeddings=Spec(IntAffine(embeddings), PerChannel(0)),
        activations=rounded,
        norms=rounded,
        attention=rounded,
        probabilities=_static(activations, whole_tokens),
        transforms=transforms,
    )


# Relative error of the output under per-token 8 bits, as benchmarks/transforms.py prints it:
#                                    none    gain migrated   balanced (part of it, against the weights)
#   sentence encoder, last state     0.048      0.052             0.044
#   vision transformer, logits       0.034      0.042             0.038
#   causal model, logits             0.069      0.085             0.076
# The first decides, since only so the encoder stays within 0.05 on all of its test set; the others would rather have none.
# Asymmetric activations: the same encoder is 0.048 off rather than 0.073. A static recipe has no transforms: its ranges were
# watched in the model as it is. Four-bit weights have none either: gains would move the outliers into them.
PRESETS: tuple[Recipe, ...] = (
    Recipe(name="W8A8", weights=_INT8_CHANNELS, activations=_UINT8_TOKENS, transforms=("balance",)),
    Recipe(name="W8A8-static", weights=_INT8_CHANNELS, activations=_static(8, AverageMinMax())),
    Recipe(name="W8A16", weights=_INT8_CHANNELS),
    Recipe(name="W4A16", weights=_UINT4_GROUPS),
    Recipe(name="W4A8", weights=_INT4_GROUPS, activations=_UINT8_TOKENS),
    Recipe(name="QUAROT-W4A8", weights=_INT4_GROUPS, activations=_UINT8_TOKENS, transforms=("rotate",)),
    # The rest need data: fxquant.calibrate(model, batches, name).
    Recipe(name="SQ-W8A8", weights=_INT8_CHANNELS, activations=_static(8, AverageMinMax()), transforms=("smooth",)),
    whole("OS-W6A6", (6, 6, 6), TokenWise(fine=True), "migrate_gain"),
    whole("OS-W4A8", (4, 4, 8), TokenWise(fine=True), "migrate_gain"),
    Recipe(name="OSPLUS-W8A8", weights=_INT8_CHANNELS, activations=_static(8, AverageMinMax()), transforms=("shift_scale",)),
    whole("OSPLUS-W6A6", (6, 6, 6), AverageMinMax(), "shift_scale"),
    Recipe(name="AWQ-W4A16", weights=replace(_UINT4_GROUPS, range=OutputMSE()), transforms=("awq",)),
)
