"""``fxquant.calibrate``: run some data through a model, and keep what a static recipe or a searched transform needs."""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from tqdm import tqdm  # type: ignore[import-untyped]  # it ships no types

if TYPE_CHECKING:
    from .backend.calibration import Progress

from .errors import CalibrationError, RecipeError
from .plan import Plan
from .recipe import Recipe


def calibrate(
    model: nn.Module,
    data: Iterable[Any] | Callable[[nn.Module], Any],
    recipe: Recipe | str,
    *,
    progress: bool = True,
    seed: int = 0,
) -> Plan:
    """The ranges and maps that ``recipe`` needs, found by running ``data`` through ``model``, which stays as it was.

    ``data``: an iterable of batches, each a dict of keyword arguments, a tuple of arguments or one tensor; or a callable that
    is given the model and runs it. It is gone through several times. Tokens that an ``attention_mask`` [B, T] calls padding
    are left out. ``progress``: a bar in the terminal for what takes longer than two seconds. ``seed``: of the sampling.

    >>> plan = fxquant.calibrate(model, batches, "W8A8-static")             # doctest: +SKIP
    >>> model.compile(backend="outlierq", options={"plan": plan})           # doctest: +SKIP

    Raises CalibrationError for data that is none, a model in training mode, or values that are not finite; RecipeError for a
    preset that there is not.
    """
    if not isinstance(model, nn.Module):
        raise CalibrationError(f"calibrate() was given a {type(model).__name__}; the model is needed, before torch.compile()")
    if model.training:
        raise CalibrationError("the model is in training mode, where dropout would be watched; call model.eval() first")
    if isinstance(recipe, str):
        recipe = Recipe.preset(recipe)
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"the recipe is {recipe!r}; a preset name or a Recipe is needed")
    from .backend.calibration import Runner, Session, find_plan  # here: it brings the kernels' languages, and fxquant must not

    session, shown = Session(recipe), bar(progress)
    return find_plan(Runner(model, data, session, shown), recipe, shown, seed)


def bar(progress: bool) -> "Progress":
    """Goes through a list behind a bar in the terminal, if it is one and it takes longer than two seconds."""

    def through(items: Sequence[Any], title: str) -> Iterable[Any]:
        shown = progress and bool(title) and sys.stderr.isatty()
        behind: Iterable[Any] = tqdm(items, title, delay=2, leave=False, disable=not shown)
        return behind

    return through
