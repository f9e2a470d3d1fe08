"""The equivalence transforms by name, in the order in which they are listed; adding one is a file and a line here."""

import ast
import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, fx

from fxquant.errors import RecipeError, nearest
from fxquant.graph.equivalence import Note
from fxquant.graph.fuel import Fuel

from . import awq, shift_scale, smooth, split_channels
from .cross_layer import cross_layer
from .measured import Measured
from .migrate_gain import migrate_gain
from .rotate import rotate


@dataclass(frozen=True)
class Transform:
    """``run(gm, fuel, **arguments)`` changes ``gm`` in place, computes the same function, and says where it did what.

    ``needs`` are the arguments without a default: what data must be measured first. ``choose(measured)`` picks them for one
    linear input, a tensor for each need, or says in a sentence why that input is left alone; ``run`` takes them by site:
    ``scale={"encoder.layer.0.attention.self.query.weight": tensor}``.
    """

    name: str
    run: Callable[..., list[Note]]
    needs: tuple[str, ...] = ()
    choose: Callable[[Measured], dict[str, Tensor] | str] | None = None


TRANSFORMS: tuple[Transform, ...] = (
    Transform("migrate_gain", migrate_gain),
    Transform("balance", smooth.balance),
    Transform("smooth", smooth.smooth, needs=("statistics",), choose=smooth.choose),
    Transform("split_channels", split_channels.split_channels, needs=("copies",), choose=split_channels.choose),
    Transform("shift_scale", shift_scale.shift_scale, needs=("scale", "shift"), choose=shift_scale.choose),
    Transform("awq", awq.awq, needs=("scale",), choose=awq.choose),
    Transform("cross_layer", cross_layer),
    Transform("rotate", rotate),
)


def get(name: str) -> Transform:
    """The transform of that name; RecipeError, naming the nearest, if there is none."""
    for transform in TRANSFORMS:
        if transform.name == name:
            return transform
    raise RecipeError(f"there is no transform {name!r}; {nearest(name, [t.name for t in TRANSFORMS])}")


def read(written: Sequence[str]) -> tuple[Transform, ...]:
    """The transforms that a recipe lists, with the arguments that it sets: ``("migrate_gain", "smooth(alpha=0.75)")``.

    What may be set are the arguments of ``run`` and ``choose`` that have a default. Raises RecipeError for what is no name, no
    such argument, or of another type than its default, and for a transform that needs data listed twice, for data go by name.
    """
    found = tuple(_read(text) for text in written)
    for name, times in Counter(transform.name for transform in found if transform.needs).items():
        if times > 1:
            raise RecipeError(f"the transform {name!r} is listed {times} times; what needs data is measured once, list it once")
    return found


def _read(text: str) -> Transform:
    try:
        parsed = ast.parse(text, mode="eval").body
        call = parsed if isinstance(parsed, ast.Call) else ast.Call(parsed, [], [])
        given = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords if k.arg}
        if not isinstance(call.func, ast.Name) or call.args or len(given) < len(call.keywords):
            raise SyntaxError
    except (SyntaxError, ValueError, TypeError, RecursionError):  # TypeError: of "smooth(alpha={[]: 1})"
        example = "a name is needed, or a name and arguments such as 'smooth(alpha=0.75)'"
        raise RecipeError(f"the transform {text!r} cannot be read; {example}") from None
    transform = get(call.func.id)
    of_run, of_choose = _settable(transform.run), _settable(transform.choose) if transform.choose else {}
    settable = of_run | of_choose
    for name, value in given.items():
        if name not in settable:
            known = nearest(name, list(settable)) if settable else "it has no arguments"
            raise RecipeError(f"the transform {text!r} sets {name!r}: {known}")
        if not _fits(value, settable[name]):
            like = f"something like its default, {settable[name].default!r}, is needed"
            raise RecipeError(f"the transform {text!r} sets {name!r} to {value!r}; {like}")
    run, choose = ({n: v for n, v in given.items() if n in keywords} for keywords in (of_run, of_choose))
    return replace(
        transform,
        run=partial(transform.run, **run),
        choose=transform.choose and partial(transform.choose, **choose),
    )


def _settable(fn: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword arguments of ``fn`` that have a default which a recipe can spell."""
    keywords = [p for p in inspect.signature(fn).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return {p.name: p for p in keywords if isinstance(p.default, bool | int | float)}


def _fits(value: Any, parameter: inspect.Parameter) -> bool:
    """A number for a number (a count where the default is one), a bool for a bool; or names of places where those may stand."""
    if isinstance(parameter.default, bool):
        names = parameter.annotation is not bool and isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)
        return isinstance(value, bool) or names
    counts = parameter.annotation is int
    if isinstance(value, bool) or not isinstance(value, int if counts else int | float):
        return False
    least = 1 if counts and parameter.default > 0 else 0
    return least <= value < math.inf


def equalize(gm: fx.GraphModule, written: Sequence[str], fuel: Fuel, **measured: Mapping[str, Any]) -> list[Note]:
    """Run the transforms of a recipe, in that order; ``measured`` are their needs by name: ``smooth={"statistics": ...}``.

    Raises RecipeError for what ``read`` refuses, or a transform that lacks what it needs, before anything is changed.
    """
    chosen = read(written)
    for transform in chosen:
        for need in transform.needs:
            if need not in measured.get(transform.name, {}):
                raise RecipeError(f"the transform {transform.name!r} needs {need}, which only data can give; calibrate first")
    return [note for transform in chosen for note in transform.run(gm, fuel, **measured.get(transform.name, {}))]
