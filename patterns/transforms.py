"""The equivalence transforms by name, in the order in which they are listed; adding one is a file and a line here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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


def equalize(gm: fx.GraphModule, names: Sequence[str], fuel: Fuel, **arguments: Mapping[str, Any]) -> list[Note]:
    """Run the transforms named, in that order; ``arguments`` are given by transform: ``smooth={"statistics": ...}``.

    Raises RecipeError for a name that is not known, or a transform that lacks what it needs, before anything is changed.
    """
    chosen = [get(name) for name in names]
    for transform in chosen:
        for need in transform.needs:
            if need not in arguments.get(transform.name, {}):
                raise RecipeError(f"the transform {transform.name!r} needs {need}, which only data can give; calibrate first")
    return [note for transform in chosen for note in transform.run(gm, fuel, **arguments.get(transform.name, {}))]
