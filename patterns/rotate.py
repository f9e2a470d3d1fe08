"""Rotation: channels are mixed by an orthogonal matrix, so that no single one is large, and weights undo it.

    rms(x R) == rms(x) R,   (x R) (R^T W) == x W         QuaRot (Ashkboos et al., 2024), SpinQuant (Liu et al., 2024)

R1, the residual stream: every writer is multiplied by ``R``, every reader by ``R^T``. The norms' gains go into their readers
first. LayerNorm takes the mean off, which no rotation passes: all writers are centred (embedding rows, columns and biases of
linears), and on a stream of mean zero it is an RMSNorm, exactly. A stream of RMSNorms is *not* centred: that would change it.
R2, attention's values: the same matrix on every head, made by the value projection and absorbed by the output projection.
R3 and R4, online: queries and keys behind the rotary embedding (``q R (k R)^T == q k^T``), and inputs of linears behind a
non-linearity or a gate. These cost a few small products at run time (``numerics.hadamard.multiply``).
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxquant.errors import RecipeError
from fxquant.graph.equivalence import (
    Applied,
    Centre,
    Explicit,
    Note,
    Refusal,
    Region,
    Rotation,
    Scale,
    Shift,
    apply,
    constant,
    find,
    site_name,
    weight_algebra,
)
from fxquant.graph.fuel import Fuel
from fxquant.graph.laws import ADD, CAT, DIV, EMBEDDING, GROUPED, LAYER_NORM, LINEAR, MUL, NORMS, RMS_NORM, SUB
from fxquant.graph.layout import COPIES, PERMUTES, RESHAPES
from fxquant.graph.match import Match
from fxquant.graph.rewrite import splice
from fxquant.graph.tidy import views_that_may_copy
from fxquant.graph.weights import depends_on_parameters_only, parameter_only
from fxquant.numerics.hadamard import Hadamard, kronecker, multiply

from .attention import Attention, attentions, written_out
from .migrate_gain import bias_of
from .residual import residuals

aten = torch.ops.aten
NAME = "rotate"
ONLINE = ("qk", "down")
ROTATED, READS_ROTATED = "rotated", "reads_rotated"  # in the meta of nodes: where they were rotated, for a second run
DEAREST = 1 / 8  # explicit ops at the ends of a stream may cost this share of its linears


def rotate(gm: fx.GraphModule, fuel: Fuel, *, seed: int = 0, online: bool | Collection[str] = True) -> list[Note]:
    """Rotate residual streams and attention's values; ``online`` also what only a run-time op can; in place, a Note per place.

    ``online``: "down" for the inputs of linears behind a non-linearity (True: this one alone), "qk" for queries and keys (use
    it where they are quantized), several of them, or False. What is rotated already is refused: a second run changes nothing.
    Raises RecipeError for an unknown place.
    """
    places = (("down",) if online else ()) if isinstance(online, bool) else tuple(online)
    for place in places:
        if place not in ONLINE:
            raise RecipeError(f"online rotations are known at {', '.join(ONLINE)}; not at {place!r}")
    work = _Work(gm, fuel, seed)
    notes = [*_streams(work), *_values(work)]
    if "qk" in places:
        notes += _queries_and_keys(work)
    if "down" in places:
        notes += _behind_nonlinearities(work)
    if any(note.outcome != "refused" for note in notes):
        views_that_may_copy(gm)  # an RMSNorm keeps the strides that a LayerNorm does not
    gm.recompile()
    return notes


@dataclass
class _Work:
    """The graph that is rotated, and the rotations in it, one per size."""

    gm: fx.GraphModule
    fuel: Fuel
    seed: int
    held: dict[tuple[int, torch.device], "_Held"] = field(default_factory=dict)

    def rotation(self, value: fx.Node) -> "_Held":
        """The rotation of the last axis of ``value``."""
        x = value.meta["val"]
        key = (x.shape[-1], x.device)
        if key not in self.held:
            rotation = Hadamard.of(x.shape[-1], self.seed)
            signs, *factors = (constant(self.gm, t.to(x.device), "rotation") for t in (rotation.signs, *rotation.factors))
            matrix = weight_algebra(self.gm, lambda signs, factors: signs[:, None] * kronecker(factors), signs, factors)
            self.held[key] = _Held(signs, factors, Rotation(matrix))
        return self.held[key]


@dataclass(frozen=True)
class _Held:
    """A rotation as nodes: its signs and factors, and the matrix that they make."""

    signs: fx.Node
    factors: list[fx.Node]
    map: Rotation

    def of(self, gm: fx.GraphModule, value: fx.Node, before: fx.Node) -> fx.Node:
        """``value R`` by small products, in the dtype of ``value``."""
        dtype = value.meta["val"].dtype
        given = weight_algebra(gm, lambda s, f: [t.to(dtype) for t in (s, *f)], self.signs, self.factors, memo=("to", dtype))
        fast = lambda x, given: multiply(x * given[0], given[1:])  # noqa: E731
        return splice(gm, before, fast, value, given, memo=(NAME, "fast"))  # type: ignore[no-any-return]  # one value, one node


# ---- R1: the residual stream


def _streams(work: _Work) -> Iterator[Note]:
    """Every stream once, found from the first of its residual adds that is not in one that was found."""
    seen: set[fx.Node] = set()
    plain, ends = _gains_that_can_go(work.gm)
    for add in [found.node for found in residuals(work.gm)]:
        if add in seen:
            continue
        where = _reader_of(add)
        if ROTATED in add.meta:
            yield Note(NAME, where, "refused", "this residual stream is rotated already")
            seen |= {node for node in work.gm.graph.nodes if ROTATED in node.meta}
            continue
        region = find(work.gm, add, Rotation, explicit=Explicit.ENDS, plain=plain, ends=ends)
        seen |= set() if isinstance(region, Refusal) else set(region.carried)
        region = _worth_it(work.gm, add, region)
        if isinstance(region, Refusal):
            yield Note(NAME, where, "refused", f"residual stream: {region}")
            continue
        if not work.fuel.take(f"{NAME} stream {where}"):
            return
        yield _rotate_stream(work, add, region, where)
        plain, ends = _gains_that_can_go(work.gm)


def _worth_it(gm: fx.GraphModule, add: fx.Node, region: Region | Refusal) -> Region | Refusal:
    """The region, if all of it can be done and costs little."""
    if isinstance(region, Refusal):
        norms = [reader for reader in add.users if reader.target in NORMS]
        if norms:
            return Refusal(f"the norm that reads it is part of the stream (post-norm) or keeps its gain: {region}", norms[0])
        return region
    if any(norm.target in LAYER_NORM for norm in _norms_of(region)):
        centred = find(gm, add, Centre, explicit=Explicit.ENDS)
        if isinstance(centred, Refusal):
            return Refusal(f"it cannot be centred, which LayerNorm needs: {centred.reason}", centred.node)
        if centred.explicit:
            reader = centred.explicit[0].node
            return Refusal(f"'{reader.name}' reads the stream with its mean, which LayerNorm's rotation takes off", reader)
    share = region.cost * region.channels**2 / _multiplications(region)
    if share > DEAREST:
        ops = f"{region.cost} explicit rotation{'s' * (region.cost != 1)}"
        at = next((site.node for site in region.explicit), next(iter(region.entries), add))
        return Refusal(f"{ops} would cost {share:.0%} of its {len(region.readers)} linears, {DEAREST:.0%} may be spent", at)
    return region


def _multiplications(region: Region) -> int:
    """How many multiply-adds a token costs in the linears of the region."""
    sites = [site for site in (*region.producers, *region.readers) if site.node.target not in EMBEDDING]
    weights: list[Any] = [site.node.args[site.law.weights[0]] for site in sites if site.law and site.law.weights]
    return sum(weight.meta["val"].numel() for weight in weights)


def _rotate_stream(work: _Work, add: fx.Node, region: Region, where: str) -> Note:
    gm = work.gm
    norms = _norms_of(region)
    for norm in norms:
        _take_gain(gm, norm)
    layer_norms = [norm for norm in norms if norm.target in LAYER_NORM]
    if layer_norms:
        size = region.channels
        centre = torch.eye(size, dtype=torch.float64, device=add.meta["val"].device) - 1 / size
        centred = apply(gm, add, Centre(constant(gm, centre, "centre")), explicit=Explicit.ENDS)
        assert isinstance(centred, Applied)
        for norm in layer_norms:
            x, shape, *_ = norm.args
            norm.args = (x, shape, None, norm.args[4] if len(norm.args) > 4 else 1e-5)
            norm.target = RMS_NORM[0]
    applied = apply(gm, add, work.rotation(add).map, explicit=Explicit.ENDS)
    assert isinstance(applied, Applied)  # it was foreseen
    _mark(applied, "stream")
    writers = len(applied.region.producers) + len(applied.region.constants)
    more = f", {len(layer_norms)} LayerNorms are RMSNorms now" if layer_norms else ""
    return _note(applied, where, f"residual stream of {region.channels}, {writers} writers{more}")


def _norms_of(region: Region) -> list[fx.Node]:
    """The norms that the map passes, which must lose their gains for it."""
    return [node for node in region.carried if node.target in NORMS and node not in region.entries]


def _mark(applied: Applied, what: str) -> None:
    """Say so of every value that is rotated, and of what reads it so, for a second run."""
    for node in (*applied.region.carried, *applied.explicit):
        node.meta.setdefault(ROTATED, what)
    for site in applied.region.readers:
        site.node.meta[READS_ROTATED] = what


def _note(applied: Applied, where: str, what: str) -> Note:
    note = applied.note(NAME, where)
    return Note(NAME, where, note.outcome, f"{what}; {note.reason}")


def _reader_of(add: fx.Node) -> str:
    """A name for a stream: the parameter of the first norm or linear that reads it."""
    for reader in add.users:
        if reader.target in (*NORMS, *LINEAR):
            return site_name(reader)
    return add.name


def _gains_that_can_go(gm: fx.GraphModule) -> tuple[set[fx.Node], set[fx.Node]]:
    """Norms that can lose gain and bias to their readers, and the nodes before which an op would then stand."""
    plain, ends = set(), set()
    weights = parameter_only(gm)
    for norm in gm.graph.nodes:
        if norm.target not in NORMS or len(norm.args[1]) != 1:
            continue
        left: list[fx.Node] = []
        maps = [(kind, node) for kind, node in ((Shift, bias_of(norm)), (Scale, _gain_of(norm))) if node is not None]
        for kind, node in maps:
            region = _region_of_gain(gm, norm, kind) if node in weights else Refusal("it depends on an input", norm)
            left += [norm] if isinstance(region, Refusal) else [site.node for site in region.explicit]
        # A sum would be of a normed value and another: the stream itself is normed, which is what post-norm means.
        if not any(node is norm or node.target in (*ADD, *SUB, *CAT, *MUL, *DIV, *NORMS) for node in left):
            plain.add(norm)
            ends |= {node for node in left if node.op != "output"}
    return plain, ends


def _gain_of(norm: fx.Node) -> Any:
    return norm.args[2] if len(norm.args) > 2 else None


def _region_of_gain(gm: fx.GraphModule, norm: fx.Node, kind: Any, ends: Collection[fx.Node] = ()) -> Region | Refusal:
    """Where a gain or bias goes; nothing there divides by the gain, which may be zero."""
    ends = set(ends)
    while True:
        region = find(gm, norm, kind, ends=ends)
        if isinstance(region, Refusal) or not (constants := [site.node for site in region.constants]):
            return region
        ends |= set(constants)


def _take_gain(gm: fx.GraphModule, norm: fx.Node) -> None:
    """Gain and bias of a norm go into its readers; what cannot take them reads them from an op of their own."""
    ends: set[fx.Node] = set()
    for kind, node in ((Shift, bias_of(norm)), (Scale, _gain_of(norm))):
        if node is None:
            continue
        region = _region_of_gain(gm, norm, kind, ends)
        assert isinstance(region, Region)  # it was found before
        applied = apply(gm, region, kind(node))
        assert isinstance(applied, Applied)
        ends |= set(applied.explicit)
    kept = norm.args[3:] if norm.target in RMS_NORM else (None, *norm.args[4:])
    norm.args = (*norm.args[:2], None, *kept)


# ---- R2: attention's values


def _values(work: _Work) -> Iterator[Note]:
    done: set[fx.Node] = set()
    for found in list(attentions(work.gm)):
        v = found.v
        if v in done or not isinstance(v.meta["val"].shape[-1], int):
            continue
        done.add(v)
        where = _name_of(found)
        if ROTATED in v.meta:
            yield Note(NAME, where, "refused", "these values are rotated already")
            continue
        region = find(work.gm, v, Rotation, explicit=Explicit.NOWHERE)
        if isinstance(region, Refusal):
            yield Note(NAME, where, "refused", f"values: {region}")
            continue
        if not work.fuel.take(f"{NAME} values {where}"):
            return
        done |= set(region.carried)
        applied = apply(work.gm, region, work.rotation(v).map)
        assert isinstance(applied, Applied)
        _mark(applied, "values")
        yield _note(applied, where, f"values, {region.channels} channels of every head")


def _name_of(found: Attention) -> str:
    """An attention goes by the weight of the linear behind it, or before its values."""
    node = found.node
    while len(node.users) == 1 and node.target not in LINEAR:
        (node,) = node.users
    return site_name(node) if node.target in LINEAR else found.node.name


# ---- R3: queries and keys


def _queries_and_keys(work: _Work) -> Iterator[Note]:
    for found in list(attentions(work.gm)):
        where = _name_of(found)
        reason = _unlike(found)
        if reason is not None:
            yield Note(NAME, where, "refused", f"queries and keys: {reason}")
            continue
        if not work.fuel.take(f"{NAME} queries and keys {where}"):
            return
        held = work.rotation(found.q)
        match = None if found.fused else written_out.match(found.node)
        readers = [found.node] if match is None else list(match.covered)  # type: ignore[union-attr]  # it is that spelling
        for value, argument in ((found.q, 0), (found.k, 1)):
            rotated = [node for node in readers if value in node.all_input_nodes]
            new = held.of(work.gm, value, min(rotated))
            for node in rotated:
                if found.fused:
                    node.update_arg(argument, new)
                else:
                    node.replace_input_with(value, new)
            new.meta[ROTATED] = "qk"
        channels = found.q.meta["val"].shape[-1]
        yield Note(NAME, where, "explicit", f"queries and keys of {channels} channels; costs two rotations at run time")


def _unlike(found: Attention) -> str | None:
    """Why queries and keys cannot be rotated here, if so."""
    if found.transposed:
        return "the keys have their channels on another axis than the last"
    if found.fused and len(found.node.args) < 2:
        return "they are given by name"
    sizes = {found.q.meta["val"].shape[-1], found.k.meta["val"].shape[-1]}
    if len(sizes) != 1 or not all(isinstance(size, int) and size > 1 for size in sizes):
        return f"their channels number {sizes}"
    if any(node.meta.get(ROTATED) == "qk" for node in (found.q, found.k)):
        return "they are rotated already"
    if not found.fused and (found.q is found.k or not isinstance(written_out.match(found.node), Match)):
        return "one value is both"
    return None


# ---- R4: behind a non-linearity


def _behind_nonlinearities(work: _Work) -> Iterator[Note]:
    for linear in [node for node in work.gm.graph.nodes if node.target in (*LINEAR, *GROUPED)]:
        x: Any = linear.args[0]
        where = site_name(linear)
        if linear.meta.get(READS_ROTATED) == "down":
            yield Note(NAME, where, "refused", "its input is rotated already")
        if not _activated(x) or READS_ROTATED in linear.meta:
            continue
        region = find(work.gm, x, Rotation, explicit=Explicit.SOURCE)
        if isinstance(region, Refusal):
            yield Note(NAME, where, "refused", f"online: {region}")
            continue
        if not work.fuel.take(f"{NAME} online {where}"):
            return
        held = work.rotation(x)
        applied = apply(work.gm, region, held.map)
        assert isinstance(applied, Applied)
        for dense in applied.explicit:
            fast = held.of(work.gm, x, dense)
            dense.replace_all_uses_with(fast)
            work.gm.graph.erase_node(dense)
            fast.meta[ROTATED] = "down"
        for site in region.readers:
            site.node.meta[READS_ROTATED] = "down"
        yield _note(applied, where, f"online, {region.channels} channels behind a non-linearity")


def _activated(x: Any) -> bool:
    """``x`` is an activation function's value, or a product of two values of its size."""
    while isinstance(x, fx.Node) and x.target in _WAYS:
        x = x.args[0]
    if not isinstance(x, fx.Node) or not isinstance(x.meta["val"].shape[-1], int) or x.meta["val"].shape[-1] < 2:
        return False
    if x.target in MUL:
        operands = [a for a in x.args[:2] if isinstance(a, fx.Node)]
        alike = [a for a in operands if a.meta["val"].ndim and a.meta["val"].shape[-1] == x.meta["val"].shape[-1]]
        return len(alike) == 2 and not any(depends_on_parameters_only(a) for a in alike)
    return x.target in _FUNCTIONS


_WAYS = (*RESHAPES, *PERMUTES, *COPIES, aten.to.dtype, aten._to_copy.default)
_FUNCTIONS = (
    aten.gelu.default, aten.silu.default, aten.relu.default, aten.relu6.default, aten.tanh.default, aten.sigmoid.default,
    aten.leaky_relu.default, aten.elu.default, aten.mish.default, aten.hardswish.default, aten.square.default,
    aten.softplus.default, aten.pow.Tensor_Scalar,
)  # fmt: skip
