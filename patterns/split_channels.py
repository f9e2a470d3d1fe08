"""Channel splitting: a channel that reaches far is read several times, each time a part of it, by copies of its weights.

    w_j x_j  ==  w_j (x_j / c_j) + ... + w_j (x_j / c_j)      c_j times      (Zhao et al., 2019: outlier channel splitting)

A scale would move the outlier into the weight, where it costs all other inputs of that output; copies move nothing. ``x / c``
is a scale, and goes where scales go; the copies are one op before the linear, on a few channels more.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx

from fxquant.errors import RecipeError
from fxquant.graph.equivalence import Note, PositiveScale, Refusal, constant, site_name, weight_algebra
from fxquant.graph.fuel import Fuel
from fxquant.graph.rewrite import WRITTEN
from fxquant.graph.tidy import value

from .inputs import check_lengths, linear_inputs, put, sites_of
from .measured import Measured
from .output_error import OutputError, check_finite, left_alone, reach_of
from .shift_scale import FAMILIES

NAME = "split_channels"
WORTH_AN_OP = 0.5  # the error must fall below this fraction: the copies are an op at run time
SHARE = 32  # one copy for so many channels,
MULTIPLE = 16  # rounded up to this, which kernels ask of an inner size


def split_channels(gm: fx.GraphModule, fuel: Fuel, *, copies: Mapping[str, Tensor]) -> list[Note]:
    """Read channel j of the linear inputs listed ``copies[j]`` times [K], a part each; in place, one Note per site.

    ``copies``: whole numbers from 1, by the path of the weight of the first linear that reads the value. All linears that read
    it do so through the copies. Raises RecipeError for another length or other numbers.
    """
    check_lengths(gm, "number of copies", copies)
    for where, c in copies.items():
        if not bool((c.isfinite() & (c >= 1) & (c == c.round())).all()):
            raise RecipeError(f"the copies of '{where}' hold {c.min():.3g} to {c.max():.3g}; whole numbers from 1 are needed")
    sites, notes = sites_of(gm, NAME, copies)
    for where, linear in sites:
        c = copies[where]
        if bool((c == 1).all()):
            notes.append(Note(NAME, where, "refused", "one copy of every channel: nothing to do"))
            continue
        if not fuel.take(f"{NAME} {where}"):
            break
        applied = put(gm, linear, PositiveScale, c)
        if isinstance(applied, Refusal):
            notes.append(Note(NAME, where, "refused", str(applied)))
            continue
        readers = _read_copies(gm, linear, c)
        more = f"{int(c.sum()) - len(c)} copies of {int((c > 1).sum())} channels of {len(c)}"
        ops = 1 + len(applied.explicit)
        cost = "one op" if ops == 1 else f"{ops} ops"
        names = ", ".join(map(site_name, readers))
        notes.append(Note(NAME, where, "explicit", f"{more}, read by {names}; costs {cost} at run time"))
    gm.recompile()
    return notes


def _read_copies(gm: fx.GraphModule, linear: fx.Node, c: Tensor) -> list[fx.Node]:
    """``x[index]`` before the linears that read ``x / c``, whose weights ``W diag(c)`` become ``W[:, index]``; the linears."""
    x: fx.Node = linear.args[0]  # type: ignore[assignment]  # a node, by the schema
    readers = linear_inputs(gm)[x]
    device = value(x).device
    index = constant(gm, index_of(c).to(device), "copies")
    parts = constant(gm, c.to(device, value(x).dtype), "parts")
    with gm.graph.inserting_before(min(readers)):
        copied = gm.graph.call_function(torch.ops.aten.index_select.default, (x, -1, index))
    with value(x).fake_mode:
        copied.meta["val"] = torch.index_select(value(x), -1, value(index))
    copied.meta[WRITTEN] = True
    for reader in readers:
        reader.update_arg(0, copied)
        reader.update_arg(1, weight_algebra(gm, _spread, reader.args[1], index, parts, memo=NAME))
    return readers


def _spread(W: Tensor, index: Tensor, parts: Tensor) -> Tensor:
    return (W / parts.to(W.dtype)).index_select(-1, index)


def index_of(copies: Tensor) -> Tensor:
    """The channels that are read [K + extra]: all of them in their order, then the further copies."""
    channels = torch.arange(len(copies), device=copies.device)
    return torch.cat([channels, channels.repeat_interleave(copies.long() - 1)])


# ---- the choice


def choose(measured: Measured, *, rows: int = 128, outputs: int = 128) -> dict[str, Tensor] | str:
    """The copies [K] that spread the channels of farthest reach, or why the site is left alone.

    Split channels and whole ones are both given the best of a coarse grid of scales (``shift_scale``'s families): copies are
    for what a scale cannot mend. Errors are relative to each token's outputs, or the massive one would decide alone.
    Raises CalibrationError for NaN, and where no token was seen.
    """
    check_finite(measured)
    if measured.activation is None:
        return f"the recipe does not quantize the input of '{measured.where}'"
    if reason := left_alone(measured):
        return reason
    reach = reach_of(measured)
    extra = -(-len(reach) // (SHARE * MULTIPLE)) * MULTIPLE
    copies = greedy(reach, extra)
    divided = split(measured, copies)
    if reason := left_alone(divided):
        return reason
    whole, parted = (_least(m, rows, outputs) for m in (measured, divided))
    if parted < WORTH_AN_OP * whole:
        return {"copies": copies}
    return f"{extra} copies of channels of the input of '{measured.where}' save less than half of the error"


def greedy(reach: Tensor, extra: int) -> Tensor:
    """The copies [K] of channels, ``extra`` more than there are: one by one to the channel whose parts reach farthest."""
    copies = torch.ones_like(reach)
    for _ in range(extra):
        copies[(reach / copies).argmax()] += 1
    return copies


def split(measured: Measured, copies: Tensor) -> Measured:
    """What would be measured behind the copies."""
    index = index_of(copies)
    low, high, mean, rows = ((x / copies)[..., index] for x in (measured.low, measured.high, measured.mean, measured.rows))
    weights = tuple(w[:, index] for w in measured.weights)
    return replace(measured, low=low, high=high, mean=mean, rows=rows, weights=weights)


def _least(measured: Measured, rows: int, outputs: int) -> float:
    error = OutputError.of(measured, rows=rows, outputs=outputs, exact_ranges=False).relative()
    weight = torch.stack([w.float().abs().amax(0) for w in measured.weights]).amax(0)
    reach = reach_of(measured)
    return min(error(family(reach, weight, step / 6)) for family in FAMILIES for step in range(7))
