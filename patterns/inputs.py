"""The inputs of linears, and a map put on one: into what makes the input where that can take it, else as one op before it."""

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from fxquant.errors import RecipeError
from fxquant.graph.equivalence import (
    Applied,
    Explicit,
    Map,
    Note,
    PositiveScale,
    Refusal,
    Region,
    apply,
    constant,
    find,
    site_name,
    source_of,
)
from fxquant.graph.laws import LINEAR, NORMS
from fxquant.graph.layout import Layout
from fxquant.graph.tidy import operand, value


def linear_inputs(gm: fx.GraphModule) -> dict[fx.Node, list[fx.Node]]:
    """Every value that a linear reads, with all linears that read it, in the order of the graph.

    The site of the value is ``site_name`` of the first of them.
    """
    found: dict[fx.Node, list[fx.Node]] = {}
    for linear in gm.graph.find_nodes(op="call_function", target=LINEAR[0]):
        found.setdefault(linear.args[0], []).append(linear)
    return found


def absorbs(gm: fx.GraphModule, linear: fx.Node, kind: type[Map] = PositiveScale) -> bool:
    """What makes the input of ``linear`` takes a map of ``kind`` that leaves no op before the linear."""
    return isinstance(_absorbed(gm, linear, kind), Region)


def region_at(gm: fx.GraphModule, linear: fx.Node, kind: type[Map]) -> Region | Refusal:
    """Where the map on a linear's input may be absorbed; else an explicit op at that input."""
    region = _absorbed(gm, linear, kind)
    return region if isinstance(region, Region) else _explicit(gm, linear, kind)


def put(gm: fx.GraphModule, linear: fx.Node, kind: type[Map], m: Tensor) -> Applied | Refusal:
    """Put the map with the vector ``m`` [K] on the input of ``linear``; others take it too if they read the same channels.

    Query heads that share one value head read its channels several times: where ``m`` differs among these positions the values
    cannot take it, and an op is left at the input.
    """
    x: fx.Node = linear.args[0]  # type: ignore[assignment]  # a node, by the schema
    region = _absorbed(gm, linear, kind)
    numbers = _by_channel(region, linear, m) if isinstance(region, Region) else None
    if numbers is None:
        region, numbers = _explicit(gm, linear, kind), m
    if isinstance(region, Refusal):
        return region
    fake = value(x)
    return apply(gm, region, kind(constant(gm, numbers.detach().to(fake.device, fake.dtype), kind.__name__.lower())))


def sites_of(gm: fx.GraphModule, name: str, given: Mapping[str, Tensor]) -> tuple[list[tuple[str, fx.Node]], list[Note]]:
    """One linear per input for which something is given, in the order of the graph; and why others are refused.

    Linears that take the map of one before them are not listed again. A layer that runs several times has inputs of one name,
    of which some may have been widened before.
    """
    sites: list[tuple[str, fx.Node]] = []
    notes: list[Note] = []
    seen: set[fx.Node] = set()
    for linear, *_ in linear_inputs(gm).values():
        where = site_name(linear)
        if where not in given or linear in seen:
            continue
        if (inputs := _width(linear)) != len(given[where]):
            reason = f"'{linear.name}' reads {inputs} channels by now, not {len(given[where])}"
            notes.append(Note(name, where, "refused", reason))
            continue
        region = region_at(gm, linear, PositiveScale)
        if isinstance(region, Refusal):
            notes.append(Note(name, where, "refused", str(region)))
        else:
            seen |= {site.node for site in region.readers}
            sites.append((where, linear))
    return sites, notes


def check_lengths(gm: fx.GraphModule, what: str, given: Mapping[str, Tensor]) -> None:
    """Raise RecipeError if a vector of ``given`` is not as long as an input of its linear is wide."""
    widths: dict[str, list[int]] = {}
    for linear, *_ in linear_inputs(gm).values():
        widths.setdefault(site_name(linear), []).append(_width(linear))
    for where in given.keys() & widths.keys():
        shape = tuple(given[where].shape)
        if shape not in [(width,) for width in widths[where]]:
            raise RecipeError(f"the {what} of '{where}' has shape {shape}; its linear reads {widths[where][0]} channels")


def _width(linear: fx.Node) -> int:
    return int(value(operand(linear, 0)).shape[-1])


def check_scales(given: Mapping[str, Tensor]) -> None:
    """Raise RecipeError for a scale by which one cannot divide, or that would turn a sign."""
    for where, s in given.items():
        if not bool((s.isfinite() & (s > 0)).all()):
            raise RecipeError(f"the scale of '{where}' holds {s.min():.3g} to {s.max():.3g}; positive numbers are needed")


def _absorbed(gm: fx.GraphModule, linear: fx.Node, kind: type[Map]) -> Region | Refusal:
    x: fx.Node = linear.args[0]  # type: ignore[assignment]  # a node, by the schema
    cut = source_of(x)
    region = find(gm, cut, kind, explicit=Explicit.READERS if cut.target in NORMS else Explicit.NOWHERE)
    if isinstance(region, Region) and not any(site.node is linear for site in region.readers):
        return Refusal(f"the map on '{cut.name}' does not reach '{site_name(linear)}'", cut)
    return region


def _explicit(gm: fx.GraphModule, linear: fx.Node, kind: type[Map]) -> Region | Refusal:
    return find(gm, linear.args[0], kind, explicit=Explicit.SOURCE)  # type: ignore[arg-type]  # a node, by the schema


def _by_channel(region: Region, linear: fx.Node, m: Tensor) -> Tensor | None:
    """``m``, one number per position of the linear's input, as one per channel of the region; None if there is no such."""
    layout: Layout = next(site.layout for site in region.readers if site.node is linear)
    if layout.is_plain(region.channels):
        return m
    entries = layout.index.reshape(-1) % (region.channels + 1)  # -1, no channel, is the entry after the last
    if len(entries) != len(m):
        return None
    index = torch.from_numpy(entries).to(m.device)
    neutral = m.new_full((region.channels + 1,), region.kind.neutral)
    numbers = neutral.scatter(0, index, m)
    numbers[-1] = region.kind.neutral
    return numbers[:-1] if torch.equal(numbers[index], m) else None
