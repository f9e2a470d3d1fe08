"""A recipe is a value: it prints, hashes, travels through JSON, and refuses what it does not know."""

import copy
import json
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from strategies import recipes, specs

from fxquant import recipe as recipe_module
from fxquant.errors import RecipeError
from fxquant.numerics import affine, granularity, ranges
from fxquant.numerics.affine import IntAffine
from fxquant.numerics.formats import FORMATS
from fxquant.numerics.granularity import GRANULARITIES, PerChannel, PerGroup, PerTensor, PerToken
from fxquant.numerics.observers import AverageMinMax, MinMSE, TokenWise
from fxquant.numerics.ranges import RANGES, Dynamic, Given, OutputMSE
from fxquant.recipe import Override, Recipe, Spec

NAMES = {
    name: thing for module in (recipe_module, affine, granularity, ranges) for name, thing in vars(module).items()
}  # what a reader of a repr would import


@given(recipes)
def test_json_brings_a_recipe_back(recipe):
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict(), allow_nan=False))) == recipe


@given(recipes)
def test_a_repr_can_be_pasted_back(recipe):
    assert eval(repr(recipe), NAMES) == recipe


@given(recipes)
def test_equal_recipes_hash_alike(recipe):
    twin = Recipe.from_dict(recipe.to_dict())
    assert twin is not recipe and hash(twin) == hash(recipe) and {twin: 1}[recipe] == 1


@given(recipes, recipes)
def test_recipes_are_equal_exactly_when_their_dicts_are(one, other):
    assert (one == other) == (one.to_dict() == other.to_dict())


@given(recipes)
def test_a_recipe_can_be_pickled_and_copied(recipe):
    assert pickle.loads(pickle.dumps(recipe)) == recipe == copy.deepcopy(recipe)


@given(recipes)
def test_the_fields_of_the_dict_can_be_left_out(recipe):
    written = recipe.to_dict()
    for field in ("version", "transforms", "ignore", "ranges"):
        del written[field]
    assert Recipe.from_dict(written) == recipe.replace(transforms=(), ignore=(), ranges=())


@given(specs)
def test_json_brings_a_spec_back(spec):
    assert Spec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (Spec(IntAffine(8), PerChannel(0)), "int8 per channel"),
        (Spec(IntAffine(4, symmetric=False), PerGroup(128)), "uint4 per group of 128"),
        (Spec(IntAffine(8, symmetric=False), PerTensor(), Given()), "uint8 per tensor static"),
    ],
)
def test_a_spec_has_a_few_words_for_a_report(spec, words):
    assert spec.brief == words


@given(specs)
def test_a_spec_delegates_to_its_format(spec):
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    if spec.range == Given():
        return
    qparams = spec.fit(x)
    assert torch.equal(spec.decode(spec.encode(x, qparams), qparams, x.dtype), spec.fake_quantize(x))


def test_a_frozen_recipe_cannot_be_changed():
    with pytest.raises(AttributeError):
        Recipe.preset("W8A8").name = "other"


def test_every_kind_has_a_name_of_its_own():
    names = [kind.__name__ for kind in (*FORMATS, *GRANULARITIES, *RANGES)]
    assert len(set(names)) == len(names)


# Presets


def test_the_presets_are_those_promised():
    assert Recipe.presets() == tuple(PROMISED)


@pytest.mark.parametrize("name", Recipe.presets())
def test_every_preset_quantizes_a_weight_and_an_activation(name):
    recipe = Recipe.preset(name)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    assert recipe.name == name and recipe.weights is not None
    weights = replace(recipe.weights, range=Dynamic()) if recipe.weights.range == OutputMSE() else recipe.weights
    assert (weights.fake_quantize(x) - x).norm() < 0.15 * x.norm()
    if (spec := recipe.activations) is not None and spec.range == Dynamic():
        assert (spec.fake_quantize(x) - x).norm() < 0.01 * x.norm()


_W8, _W4 = Spec(IntAffine(8), PerChannel(0)), Spec(IntAffine(4), PerGroup(128))
_UW4 = Spec(IntAffine(4, symmetric=False), PerGroup(128))
_TOKENS = Spec(IntAffine(8, symmetric=False), PerToken())


def _static(bits, observer):
    return Spec(IntAffine(bits, symmetric=False), PerTensor(), observer)


PROMISED = {
    "W8A8": (_W8, _TOKENS, ("balance",)),
    "W8A8-static": (_W8, _static(8, AverageMinMax()), ()),
    "W8A16": (_W8, None, ()),
    "W4A16": (_UW4, None, ()),
    "W4A8": (_W4, _TOKENS, ()),
    "QUAROT-W4A8": (_W4, _TOKENS, ("rotate",)),
    "SQ-W8A8": (_W8, _static(8, AverageMinMax()), ("smooth",)),
    "OS-W6A6": (Spec(IntAffine(6), PerChannel(0), MinMSE()), _static(6, TokenWise(fine=True)), ("migrate_gain",)),
    "OS-W4A8": (Spec(IntAffine(4), PerChannel(0), MinMSE()), _static(8, TokenWise(fine=True)), ("migrate_gain",)),
    "OSPLUS-W8A8": (_W8, _static(8, AverageMinMax()), ("shift_scale",)),
    "OSPLUS-W6A6": (Spec(IntAffine(6), PerChannel(0), MinMSE()), _static(6, AverageMinMax()), ("shift_scale",)),
    "AWQ-W4A16": (replace(_UW4, range=OutputMSE()), None, ("awq",)),
}


@pytest.mark.parametrize("name", Recipe.presets())
def test_a_preset_is_what_its_name_says(name):
    recipe = Recipe.preset(name)
    assert (recipe.weights, recipe.activations, recipe.transforms) == PROMISED[name]


def test_a_preset_can_be_changed():
    recipe = Recipe.preset("W8A8", ignore=["lm_head"], transforms=[])
    assert recipe == Recipe.preset("W8A8").replace(ignore=("lm_head",), transforms=())
    assert Recipe.preset("W8A8").ignore == ()


# Ignore rules and ranges

SITE = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "rule",
    [SITE, SITE.removesuffix(".weight"), "up_proj", "up_proj.weight", "mlp.up_proj", "layers.1", "model",
     r"re:layers\.\d+\.mlp", r"re:up_proj$", r"re:\.weight$", r"re:^model\."],
)  # fmt: skip
def test_a_rule_names_the_site(rule):
    assert Recipe(ignore=("nothing", rule)).ignores(SITE) == rule


@pytest.mark.parametrize(
    "rule", ["up", "proj", "layers.10", "layer", "mlp.weight", "model.mlp", "x.up_proj", "re:^layers", "re:up$"]
)
def test_a_rule_names_another_site(rule):
    assert Recipe(ignore=(rule,)).ignores(SITE) is None


def test_layer_one_is_not_layer_ten():
    assert Recipe(ignore=("layers.1",)).ignores("model.layers.10.mlp.weight") is None


def test_a_dot_in_a_plain_rule_is_a_dot():
    assert Recipe(ignore=("a.b",)).ignores("axb.weight") is None


def test_the_range_of_a_site_is_found_with_or_without_weight():
    recipe = Recipe.preset("W8A8-static", ranges=[("a.b", -1, 2.5), ("c.weight", 0, 0)])
    assert recipe.given_range("a.b.weight") == recipe.given_range("a.b") == (-1.0, 2.5)
    assert recipe.given_range("c") == (0.0, 0.0) and recipe.given_range("b") is None


# Refusals


def test_an_unknown_preset_is_refused_with_the_nearest_one():
    with pytest.raises(RecipeError, match="no recipe 'w8a8': did you mean 'W8A8'"):
        Recipe.preset("w8a8")


@pytest.mark.parametrize("door", [lambda **k: Recipe.preset("W8A8", **k), Recipe().replace, lambda **k: Recipe.from_dict(k)])
def test_an_unknown_field_is_refused_with_the_nearest_one(door):
    with pytest.raises(RecipeError, match="no field 'ignored': did you mean 'ignore'"):
        door(ignored=["lm_head"])


def broken(path: str, value: object) -> dict:
    """The dict of W4A16 with the value at the dotted path replaced, or the key removed if the value is ``...``."""
    data = Recipe.preset("W4A16").to_dict()
    *outer, last = path.split(".")
    place = data
    for key in outer:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return data


WRONG = [
    ("version", 2, "version 2, this fxquant reads version 1"),
    ("name", 3, "the name of a recipe is 3"),
    ("weights", "int8", "weights of the recipe is 'int8', a dict is needed"),
    ("weights.format", ..., "weights has no 'format'"),
    ("weights.formats", {}, "weights has no field 'formats': did you mean 'format'"),
    ("weights.format.kind", "IntAfine", "weights.format has the kind 'IntAfine': did you mean 'IntAffine'"),
    ("weights.format.kind", ..., "weights.format has the kind None"),
    ("weights.format.bit", 4, "weights.format has no field 'bit': did you mean 'bits'"),
    ("weights.format.bits", "4", "bits='4', an integer from 1 to 8"),
    ("weights.format.bits", 4.0, "bits=4.0, an integer from 1 to 8"),
    ("weights.format.bits", torch.tensor(4), "recipe.weights.format.bits is a tensor"),
    ("weights.granularity.size", ..., "PerGroup.* 'size'"),
    ("weights.granularity.size", 0, "a positive integer"),
    ("weights.range.lo", 1.0, "weights.range has no field 'lo': it has none"),
    ("ignore", "lm_head", r"such as ignore=\['lm_head'\]"),
    ("ignore", [3], "ignore of a recipe holds 3"),
    ("ignore", ["re:("], "no regular expression"),
    ("ignore", [torch.ones(2)], r"recipe.ignore\[0\] is a tensor"),
    ("transforms", None, "transforms of a recipe is None"),
    ("ranges", [["a", 1.0]], "(site, lo, hi) is needed"),
    ("ranges", [["a", 1.0, -1.0]], "swap them"),
    ("ranges", [["a", 0.0, float("nan")]], "a finite Python number"),
    ("ranges", [["a", 0, 1], ["a.weight", 0, 2]], "lists the site 'a.weight' twice"),
]


@pytest.mark.parametrize(("path", "value", "sentence"), WRONG)
def test_a_wrong_dict_is_refused_with_a_sentence_that_says_where(path, value, sentence):
    with pytest.raises(RecipeError, match=sentence.replace("(site", r"\(site").replace("hi)", r"hi\)")):
        Recipe.from_dict(broken(path, value))


def test_something_else_than_a_dict_is_refused():
    with pytest.raises(RecipeError, match="given as list"):
        Recipe.from_dict([])


def test_a_spec_of_wrong_parts_is_refused():
    with pytest.raises(RecipeError, match="format of a Spec is 'int8', one of IntAffine is needed"):
        Spec("int8", PerToken())
    with pytest.raises(RecipeError, match="granularity of a Spec is <class"):
        Spec(IntAffine(8), PerToken)
    with pytest.raises(RecipeError, match="range of a Spec is None"):
        Spec(IntAffine(8), PerToken(), None)


def test_a_given_range_is_per_tensor():
    with pytest.raises(RecipeError, match=r"the granularity is PerToken\(\); use PerTensor"):
        Spec(IntAffine(8), PerToken(), Given(0.0, 1.0))


def test_a_searched_range_travels_through_json():
    recipe = Recipe(weights=Spec(IntAffine(3), PerChannel(0), MinMSE(steps=7, lowest=0.25)))
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_static_ranges_are_per_tensor_in_the_preset():
    spec = Recipe.preset("W8A8-static").activations
    assert spec is not None and spec.granularity == PerTensor() and spec.is_static


def test_specs_are_those_of_the_recipe_and_of_its_overrides() -> None:
    recipe = Recipe.preset("W8A8")
    own = [("weights", recipe.weights), ("activations", recipe.activations)]
    assert recipe.specs() == own
    changed = recipe.replace(overrides=(Override("head", "norms", recipe.activations), Override("tail", "weights", None)))
    assert changed.specs() == [*own, ("norms", recipe.activations)]
