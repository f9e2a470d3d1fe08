"""``quantize_rows(norm(x + residual))`` becomes one op that reads each row once; others read sum and norm from it too."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxquant.graph.effects import writers_of
from fxquant.graph.fuel import Fuel
from fxquant.graph.match import Match, Miss, one_of, pattern
from fxquant.graph.rewrite import erase, replace_outputs, splice
from fxquant.graph.spelling import FAMILIES
from fxquant.graph.tidy import value
from fxquant.patterns.linear import same_sizes

from .cpu import ops
from .triton import row

aten = torch.ops.aten
ON_GPU, ON_CPU = torch.ops.fxquant.quantize_rows.default, ops.quantize_rows
NORMS = (aten.layer_norm.default, aten.rms_norm.default)


def fuse_norms(gm: fx.GraphModule, fuel: Fuel) -> list[Miss]:
    """Fuse every ``quantize_rows`` with the norm, and the residual add, that it quantizes; in place. Returns why some were not.

    A graph without rows that are quantized at run time stays as it is.
    """
    misses: list[Miss] = []
    for quantize in [n for target in (ON_GPU, ON_CPU) for n in gm.graph.find_nodes(op="call_function", target=target)]:
        match = _match(quantize)
        if isinstance(match, Miss):
            misses.append(match)
        elif fuel.take(f"fuse {match.root.name} with its quantization"):
            _write(gm, quantize, match)
            gm.recompile()
    return misses


def _match(quantize: fx.Node) -> Match | Miss:
    """The norm whose rows ``quantize`` reads, if the fused op computes the same."""
    rows = _way(quantize)[-1]
    size, asked = value(rows).shape[-1], value(quantize.args[0]).shape[-1]
    if size != asked:
        return Miss("'{}' has rows of {} and is quantized in rows of {}", rows, 0, (rows, size, asked))
    misses: list[Miss] = []
    for norm in (layer_norm, rms_norm):
        found = norm.match(rows)
        if isinstance(found, Match):
            unfit = _runs(quantize, found)
            return found if unfit is None else unfit  # not `or`: a Miss is false
        misses.append(found)
    return max(misses, key=lambda miss: miss.depth)  # the first of them, if they are equally near


def _runs(quantize: fx.Node, match: Match) -> Miss | None:
    """What only one of the two kernels asks for."""
    x, norm = value(match.x), _norm(match)
    if quantize.target is ON_GPU:
        if not isinstance(x.shape[-1], int) or x.shape[-1] > row.WIDEST_NORM:
            return Miss("'{}' has rows of {}, the kernel holds up to {}", norm, 0, (norm, x.shape[-1], row.WIDEST_NORM))
        return None
    if x.dtype not in ops.DTYPES:
        return Miss("'{}' is {}; float32, bfloat16 or float16 is needed", norm, 0, (norm, x.dtype))
    if len(_way(quantize)) > 2:
        return Miss("'{}' is viewed in another shape before it is quantized", norm, 0, (norm,))
    kinds = {value(n).dtype for name in ("weight", "bias") if (n := match.bindings.get(name)) is not None}
    if len(kinds) > 1 or not kinds <= set(ops.DTYPES):
        return Miss("the weight and the bias of '{}' are of the types {}; one is needed", norm, 0, (norm, kinds))
    return None


def _fits(match: Match) -> Miss | None:
    """One kind of number on the way, rows that fit the kernel, and nobody who reads what the kernel keeps to itself."""
    x, norm, sums = value(match.x), _norm(match), [n for n in match.covered if n.target is aten.add.Tensor]
    shape: Any = norm.args[1]
    size, axes = x.shape[-1], len(shape)
    if axes != 1:
        return Miss("'{}' normalises over {} axes, the kernel over the last one", norm, 0, (norm, axes))
    if not isinstance(size, int):
        return Miss("'{}' has rows of {}, a fixed size is needed", norm, 0, (norm, size))
    if len(sums) != (match.residual is not None):
        return Miss("the residual of '{}' is spelled in {} additions", norm, 0, (norm, len(sums)))
    for node in (match.root, *sums, *([match.residual] if sums else [])):
        y = value(node)
        if y.dtype != x.dtype or not same_sizes(y.shape, x.shape):
            details = (node, y.dtype, list(y.shape), match.x, x.dtype, list(x.shape))
            return Miss("'{}' is {} {} and '{}' is {} {}; one dtype and shape is needed", node, 0, details)
    for node in filter(None, (match.x, match.residual)):
        if (writer := next(writers_of(node), None)) is not None:
            return Miss("'{}' is written to by '{}', perhaps before the fused op would read it", node, 0, (node, writer))
    if norm is not match.root and (readers := _readers(norm, match)):
        return Miss("'{}' is also read by '{}' before it is rounded to {}", norm, 0, (norm, readers[0], x.dtype))
    place = _place(match)
    for name in ("weight", "bias"):
        node = match.bindings.get(name)
        if node is not None and not node < place:
            return Miss("the {} '{}' is computed after '{}' reads the sum", node, 0, (name, node, place))
    return None


@pattern(_fits, shared=True, x=(6, 8), residual=(6, 8), weight=(8,), bias=(8,))
def layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``LayerNorm(x + residual)``, or ``LayerNorm(x)``."""
    return F.layer_norm(one_of(x + residual, x), [8], weight, bias, eps)


@pattern(_fits, shared=True, x=(6, 8), residual=(6, 8), weight=(8,))
def rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``RMSNorm(x + residual)``, or ``RMSNorm(x)``."""
    return torch.rms_norm(one_of(x + residual, x), [8], weight, eps)


def _write(gm: fx.GraphModule, quantize: fx.Node, match: Match) -> None:
    total, normed, way = _total(match), match.root, _way(quantize)
    for node in match.covered:  # sizes are asked of x, which has the same: they need no sum and no norm
        for user in [u for u in node.users if u.target is aten.sym_size.int]:
            user.replace_input_with(node, match.x)
    readers = [] if total is None else _readers(total, match)
    keep_sum = bool(readers)
    keep_norm = any(user not in way for node in way[1:] for user in node.users)
    centered = _norm(match).target is aten.layer_norm.default
    fused = FUSED[quantize.target](centered, match.eps, keep_sum, keep_norm, *quantize.args[1:])
    memo = ("fuse_norms", quantize.target, centered, match.eps, keep_sum, keep_norm, *quantize.args[1:])
    operands = (match.x, match.residual, match.weight, match.bindings.get("bias"))
    new = splice(gm, _place(match), fused, *operands, memo=memo)
    if total is not None and keep_sum:
        total.replace_all_uses_with(new[3], delete_user_cb=lambda user: user in readers)
    if keep_norm:
        normed.replace_all_uses_with(new[-1])
    replace_outputs(gm, quantize, new)
    if not normed._erased and not normed.users:
        erase(gm, normed)


Fused = Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None], list[Tensor]]
"""x, residual, weight, bias -> codes, scale, zero point, and what is kept: the sum, the norm."""


def _on_gpu(centered: bool, eps: float, keep_sum: bool, keep_norm: bool, symmetric: bool = True) -> Fused:
    def fused(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> list[Tensor]:
        flat, flags = x.reshape(-1, x.shape[-1]), (eps, symmetric, keep_sum, keep_norm)
        added = None if residual is None else residual.reshape(-1, x.shape[-1])
        if centered:
            *codes, total, normed = row.layer_norm_quantize(flat, added, weight, bias, *flags)
        else:
            *codes, total, normed = row.rms_norm_quantize(flat, added, weight, *flags)
        return [*codes, *(rows.view(x.shape) for wanted, rows in ((keep_sum, total), (keep_norm, normed)) if wanted)]

    return fused


def _on_cpu(centered: bool, eps: float, keep_sum: bool, keep_norm: bool, bits: int, symmetric: bool) -> Fused:
    def fused(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> list[Tensor]:
        flags = ("layer" if centered else "rms", weight, bias, eps, bits, symmetric, keep_sum, keep_norm)
        *codes, total, normed = ops.normalize_rows(x, residual, None, *flags)
        return [*codes, *(rows for wanted, rows in ((keep_sum, total), (keep_norm, normed)) if wanted)]

    return fused


FUSED: dict[Any, Callable[..., Fused]] = {ON_GPU: _on_gpu, ON_CPU: _on_cpu}


def _way(quantize: fx.Node) -> list[fx.Node]:
    """``quantize``, the views that it looks through, and the rows that they show."""
    source: Any = quantize.args[0]
    way = [quantize, source]
    while FAMILIES.get(source.target) == "view":
        source = source.args[0]
        way.append(source)
    return way


def _norm(match: Match) -> fx.Node:
    (norm,) = (n for n in match.covered if n.target in NORMS)
    return norm


def _total(match: Match) -> fx.Node | None:
    """The residual add, if there is one."""
    return next((n for n in match.covered if n.target is aten.add.Tensor), None)


def _readers(node: fx.Node, match: Match) -> list[fx.Node]:
    """Who reads ``node`` when the normalised rows come from elsewhere. Its size is no reason to compute it."""
    asking = [user for user in node.users if user is not match.root and user.target is not aten.sym_size.int]
    return [user for user in asking if user not in match.covered or _readers(user, match)]


def _place(match: Match) -> fx.Node:
    """The node that the fused op stands before: the norm, or whoever reads the sum before that."""
    total = _total(match)
    return min([_norm(match), *([] if total is None else _readers(total, match))])
