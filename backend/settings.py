"""What the user may say to the backend: ``mode`` and ``options``, read once and refused early."""

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from fxquant.errors import RecipeError, nearest
from fxquant.plan import Plan
from fxquant.recipe import Recipe, refuse_tensors

OPTIONS = ("recipe", "plan", "calibration_steps", "ignore", "ranges", "transforms", "fuel", "trace", "inductor")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Settings:
    """One reading of ``torch.compile``'s ``mode`` and ``options``.

    ``recipe``: what to quantize; ``plan``: what calibration found for it; ``calibration_steps``: how many calls to calibrate on
    before quantizing (0: none); ``fuel``: how many rewrites may happen (None: all); ``trace``: folder for every stage as
    Python, or None; ``inductor``: config patches for Inductor, or False to run the lowered graph op by op without it.
    """

    recipe: Recipe
    plan: Plan | None = None
    calibration_steps: int = 0
    fuel: int | None = None
    trace: str | None = None
    inductor: dict[str, Any] | Literal[False] = field(default_factory=dict)

    @staticmethod
    def read(mode: str | None, options: Mapping[str, Any] | None) -> "Settings":
        """Raises RecipeError on an unknown option, a wrong type or a tensor; an unknown mode is a warning."""
        given = dict(options or {})
        for key, value in given.items():
            if key not in OPTIONS:
                raise RecipeError(f"option {key!r} is not known; {nearest(key, OPTIONS)}")
            refuse_tensors(f"option '{key}'", value)
        plan = _plan(given["plan"]) if given.get("plan") is not None else None
        if plan is not None and (beside := [k for k in ("recipe", "transforms", "ranges") if given.get(k) is not None]):
            raise RecipeError(f"options hold a plan and {beside[0]}, for which the plan was not made; leave {beside[0]} out")
        recipe = plan.recipe if plan is not None else _recipe(given.get("recipe", "W8A8"))
        if isinstance(given.get("ranges"), Mapping):
            given["ranges"] = [(site, *_pair(site, ends)) for site, ends in given["ranges"].items()]
        recipe = recipe.replace(**{k: given[k] for k in ("ignore", "ranges", "transforms") if k in given})
        fuel = _typed(given, "fuel", int, os.environ.get("FXQUANT_FUEL") or None)
        trace = _typed(given, "trace", str, os.environ.get("FXQUANT_TRACE") or None)
        of_mode = _mode_patches(mode)
        try:
            fuel = None if fuel is None else int(fuel)
        except ValueError:
            raise RecipeError(f"FXQUANT_FUEL is {fuel!r}; a number of rewrites is needed") from None
        if fuel is not None and fuel < 0:
            raise RecipeError(f"option 'fuel' is {fuel}; a number of rewrites, 0 or more, is needed")
        steps = _typed(given, "calibration_steps", int, 0)
        if steps < 0 or (steps and plan is not None):
            what = "and a plan, which has what they would find" if steps > 0 else "which is negative"
            raise RecipeError(f"option 'calibration_steps' is {steps} {what}; give a number of calls alone, 0 for none")
        if given.get("inductor") is False:
            return Settings(recipe, plan, steps, fuel, trace, False)
        patches = dict(_typed(given, "inductor", dict, None) or {})
        return Settings(recipe, plan, steps, fuel, trace, {**of_mode, **patches})


def _recipe(given: Any) -> Recipe:
    if isinstance(given, str):
        return Recipe.preset(given)
    if isinstance(given, Mapping):
        return Recipe.from_dict(dict(given))
    if isinstance(given, Recipe):
        return given
    raise RecipeError(f"option 'recipe' is {given!r}; a preset name, a Recipe or its to_dict() is needed")


def _plan(given: Any) -> Plan:
    if isinstance(given, Plan):
        return given
    if isinstance(given, str | os.PathLike):
        return Plan.load(given)
    raise RecipeError(f"option 'plan' is {given!r}; a Plan, or the path of a saved one, is needed")


_ARTICLE = {int: "an int", str: "a string", dict: "a dict"}


def _pair(site: str, ends: Any) -> tuple[Any, Any]:
    if not isinstance(ends, list | tuple) or len(ends) != 2:
        raise RecipeError(f"the range of site {site!r} is {ends!r}; (lo, hi) is needed")
    return ends[0], ends[1]


def _typed(given: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    value = given.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or isinstance(value, bool):
        raise RecipeError(f"option {key!r} is {value!r}; {_ARTICLE[kind]} is needed")
    return value


def _mode_patches(mode: str | None) -> dict[str, Any]:
    if mode in (None, "default"):
        return {}
    if mode not in MODES:
        warnings.warn(f"mode {mode!r} is not known and is taken as 'default'; {nearest(str(mode), MODES)}", stacklevel=2)
        return {}
    return dict(torch._inductor.list_mode_options(mode))
