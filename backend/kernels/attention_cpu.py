"""Attention on a CPU: our own C++ (cpu/attention.cpp) in place of PyTorch's, where it pays.

Nothing is quantized here: beside integer linears, PyTorch's float attention is what an encoder then spends its time on.
"""

import math

import torch
from torch import Tensor, fx

from fxquant.graph.effects import family
from fxquant.graph.fuel import Fuel
from fxquant.graph.match import Miss
from fxquant.graph.rewrite import replace
from fxquant.graph.tidy import is_impure, value
from fxquant.patterns.attention import ungrouped
from fxquant.patterns.linear import same_sizes
from fxquant.patterns.mask import essential_mask

from ..cpu import build, ops
from .kernel import Claim

aten = torch.ops.aten


def lower_attention(gm: fx.GraphModule, fuel: Fuel) -> None:
    """Replace every scaled dot-product attention that the kernel supports, in place."""
    writes = any(is_impure(node) for node in gm.graph.nodes if node.op == "call_function")
    leaving = set(gm.graph.output_node().all_input_nodes)
    for node in list(gm.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)):
        if not supports(node) or not fuel.take(f"lower {node.name}"):
            continue
        query, key, val, mask, _, is_causal = _arguments(node)
        scale = node.kwargs.get("scale")
        scale = 1 / math.sqrt(value(query).shape[-1]) if scale is None else scale

        # Token by token is how the next product reads it. Where strides can be seen they are those of the op replaced.
        seen = writes or bool(family(node) & leaving)
        other = seen and not token_by_token(value(node))

        def attention(
            q: Tensor, k: Tensor, v: Tensor, m: Tensor | None, causal: bool = is_causal, s: float = scale, other: bool = other
        ) -> Tensor:
            y: Tensor = ops.attention(q, k, v, m, causal, s)
            return y.contiguous() if other else y

        if mask is not None and not writes:  # else what is true here may be written over, and what is left be read too late
            mask = essential_mask(mask)
        replace(gm, node, attention, query, key, val, mask)


def token_by_token(y: Tensor) -> bool:
    """[B, H, L, D] that lies as [B, L, H, D], as PyTorch's fast attention leaves it; an axis of one has any stride."""
    _, heads, length, width = y.shape
    wanted = (length * heads * width, width, heads * width, 1)
    told = [(found, s) for found, s, size in zip(y.stride(), wanted, y.shape, strict=True) if not same_sizes((size,), (1,))]
    return same_sizes(*zip(*told, strict=True)) if told else True


def supports(node: fx.Node) -> Claim | Miss:
    """Whether the kernel computes this attention, or why not."""
    query, key, val, mask, dropout, _ = _arguments(node)
    q, k, v, m = (value(n) for n in (query, key, val, mask))
    if q.device.type != "cpu":
        return Miss(f"the attention is on {q.device.type}, this kernel is for CPUs")
    if reason := build.why_not():
        return Miss(reason)
    if dropout:
        return Miss(f"probabilities are dropped ({dropout})")
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        return Miss(f"the query has {q.dim()} axes, [B, H, L, D] is needed")
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16) or {k.dtype, v.dtype} != {q.dtype}:
        return Miss(f"the operands are {q.dtype}, {k.dtype} and {v.dtype}; one of float32, bfloat16, float16 is needed for all")
    if not all(isinstance(s, int) for t in (q, k, v) for s in (t.shape[1], t.shape[3])) or q.shape[3] != v.shape[3]:
        return Miss("the number of heads or their width is not fixed, or differs between keys and values")
    heads, groups = q.shape[1], k.shape[1]
    if not same_sizes(q.shape[:1] * 2, (k.shape[0], v.shape[0])) or groups != v.shape[1] or not groups or heads % groups:
        shapes = [list(t.shape) for t in (q, k, v)]
        return Miss(f"the operands broadcast, {shapes}; equal batches and grouped heads are needed")
    if not same_sizes((k.shape[2],), (v.shape[2],)):
        return Miss("the number of keys is not that of the values")
    if m is not None and (m.dtype not in (torch.bool, q.dtype) or m.dim() > 4):
        return Miss(f"the mask is {m.dtype} with {m.dim()} axes")
    return Claim("attention (C++, float32 inside)")


def _arguments(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node | None, float, bool]:
    """Query, key, value, mask, dropout and causality; keys and values once per group of heads, where the heads repeat them."""
    given = [*node.args, *(None, 0.0, False)[len(node.args) - 3 :]]
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    query, key, val, *rest = (node.kwargs.get(name, given[i]) for i, name in enumerate(names))
    assert isinstance(key, fx.Node) and isinstance(val, fx.Node)
    once = ungrouped(key, node), ungrouped(val, node)
    if same_sizes(*(value(n).shape[1:2] for n in once)):
        key, val = once
    return query, key, val, *rest  # type: ignore[return-value]  # by the op's schema
