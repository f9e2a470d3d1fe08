"""Attention, fused (``scaled_dot_product_attention``) or written out, read as ``softmax(s q k^T + mask) v``."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxquant.graph.effects import writers_between
from fxquant.graph.match import Match, Miss, one_of, pattern
from fxquant.graph.spelling import FAMILIES
from fxquant.graph.tidy import operand, value
from fxquant.graph.weights import depends_on_parameters_only

from .linear import same_sizes

aten = torch.ops.aten


def _axes(match: Match) -> Miss | None:
    """Three activations with a batch."""
    keys = match.keys if match.k is None else match.k
    for node in (match.q, keys, match.v):
        if value(node).dim() < 3:
            return Miss("'{}' of the attention has {} axes, 3 or more are needed", node, 0, (node, value(node).dim()))
    if depends_on_parameters_only(match.q) and depends_on_parameters_only(keys):
        return Miss("'{}' and '{}' are parameters", match.q, 0, (match.q, keys))
    return None


def _masked(scores: Tensor, mask: Tensor, condition: Tensor, floor: Tensor, low: float) -> Tensor:
    """Scores with a mask added, filled in, both, or neither."""
    biased = one_of(scores + mask, scores)
    filled = one_of(torch.where(condition, biased, floor), torch.where(condition, biased, low))
    return one_of(biased, biased.masked_fill(condition, low), filled, filled + mask)


@pattern(
    _axes,
    shared=True,
    q=(8, 5, 8),
    k=(8, 6, 8),
    v=(8, 6, 8),
    keys=(8, 8, 6),
    bias=(8, 5, 6),
    mask=(5, 6),
    condition=torch.empty(5, 6, dtype=torch.bool),
    floor=(),
)
def written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    bias: Tensor,
    mask: Tensor,
    condition: Tensor,
    floor: Tensor,
    scale: float,
    low: float,
    alpha: float,
) -> Tensor:
    """``softmax(q k^T * scale + mask) v`` (Vaswani et al. 2017), batches and heads on one axis or on two.

    A scale on ``q`` or on ``k`` alone belongs to that operand; ``keys`` is ``k^T`` where no transposition of its own is seen.
    Inner nodes may have other readers (``output_attentions``).
    """
    transposed = one_of(k.transpose(-1, -2), keys)
    product = q @ transposed
    scores = one_of(product * scale, product, torch.baddbmm(bias, q, transposed, beta=1, alpha=alpha))
    flat = F.softmax(_masked(scores, mask, condition, floor, low), -1)
    by_head = F.softmax(_masked(one_of(scores, scores + bias).view(2, 4, 5, 6), mask, condition, floor, low), -1).view(8, 5, 6)
    return one_of(flat, by_head) @ v


@dataclass(frozen=True)
class Attention:
    """An attention that was found: ``softmax(scale * q k^T + mask) v`` at ``node``.

    ``bias`` is what was added before batch and heads were parted (relative positions), if that was so.
    ``mask`` is None, or the node that is added or, boolean, decides what is filled in (the outermost where there are two).
    ``scale`` is None where the op's default ``1 / sqrt(d)`` holds. ``causal``: the op itself makes a causal mask.
    ``transposed``: ``k`` holds the keys as ``[..., d, keys]``. ``fused``: one op, not written out.
    """

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    scale: float | None
    bias: fx.Node | None = None
    causal: bool = False
    transposed: bool = False
    fused: bool = False


def attention(node: fx.Node) -> Attention | Miss:
    """The attention that ``node`` is the result of, fused or written out."""
    if node.target is aten.scaled_dot_product_attention.default:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        q, k, v = given["query"], given["key"], given["value"]
        mask, scale = given.get("attn_mask"), given.get("scale")
        return Attention(node, q, k, v, mask, scale, causal=bool(given.get("is_causal")), fused=True)
    found = written_out.match(node)
    if not isinstance(found, Match):
        return found
    k = found.keys if found.k is None else found.k
    mask = found.condition if found.condition is not None else found.mask
    scale = next((s for s in (found.scale, found.alpha) if s is not None), 1.0)
    return Attention(node, found.q, k, found.v, mask, scale, found.bias, transposed=found.k is None)


def attentions(gm: fx.GraphModule) -> Iterator[Attention]:
    """Every attention in ``gm``, in the order of the graph."""
    for node in gm.graph.nodes:
        if isinstance(found := attention(node), Attention):
            yield found


def ungrouped(node: fx.Node, reader: fx.Node) -> fx.Node:
    """The keys or values [B, G, T, D] of which ``node`` [B, G n, T, D] has every head n times, if ``reader`` finds them so.

    Else ``node`` itself, as where they are written in place meanwhile. Grouped-query attention (Ainslie et al. 2023) is mostly
    spelled so, for ops that know no groups.
    """
    repeated = operand(node, 0) if FAMILIES.get(node.target) == "view" else None
    if repeated is None or repeated.target is not aten.expand.default:
        return node
    apart = operand(repeated, 0)
    if apart.target is not aten.unsqueeze.default or apart.args[1] not in (2, -3):
        return node
    source = operand(apart, 0)
    batch, groups, *each = value(source).shape
    n = value(repeated).shape[2]
    expected = (batch, groups, n, *each), (batch, groups * n, *each)
    if len(each) != 2 or not all(same_sizes(value(x).shape, s) for x, s in zip((repeated, node), expected, strict=True)):
        return node
    return node if any(writers_between(source, source, reader)) else source
