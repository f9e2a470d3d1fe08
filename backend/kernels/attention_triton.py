"""Attention of rounded queries and keys on an NVIDIA GPU: scores of int8 codes (triton/attention.py).

Codes are plain PyTorch: Inductor computes them in one kernel with what makes queries and keys, a norm or a rotary embedding.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fxquant.graph.effects import family
from fxquant.graph.fuel import Fuel
from fxquant.graph.match import Miss
from fxquant.graph.ops import fake_quantize, read_spec
from fxquant.graph.rewrite import replace, splice
from fxquant.graph.tidy import is_impure, operand, value
from fxquant.numerics.affine import IntAffine
from fxquant.numerics.granularity import PerTensor, PerToken
from fxquant.patterns.attention import Attention, attention, ungrouped
from fxquant.patterns.linear import same_sizes
from fxquant.recipe import Spec

from ..triton import launch
from ..triton.attention import int8_attention
from ..triton.refuse import WIDTHS
from .attention_cpu import token_by_token
from .int8_triton import quantized
from .kernel import Claim

aten = torch.ops.aten
NAME = "int8 attention (Triton)"
SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)


class Outcome(NamedTuple):
    """``coded``: the queries and keys of which attention now reads codes; ``misses``: why it does not read those of others."""

    coded: frozenset[fx.Node]
    misses: list[Miss]


class Operand(NamedTuple):
    """What attention reads, before it was rounded and before groups of heads were repeated; by which node, and how."""

    node: fx.Node
    rounding: fx.Node | None
    spec: Spec | None


def lower_int8_attention(gm: fx.GraphModule, fuel: Fuel) -> Outcome:
    """Replace every attention whose queries and keys are rounded, where the kernel supports it, in place.

    Runs before ``lower``, which writes out what is left of the roundings: those of values among them.
    """
    writes = any(is_impure(node) for node in gm.graph.nodes if node.op == "call_function")
    leaving = set(gm.graph.output_node().all_input_nodes)
    coded: set[fx.Node] = set()
    misses: list[Miss] = []
    prepared: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for node in list(gm.graph.nodes):
        if (rounded := _rounded_probabilities(node)) is not None:
            misses.append(Miss("the probabilities '{}' of '{}' are rounded, the kernel's are floats", node, 1, (rounded, node)))
        found = attention(node)
        if isinstance(found, Miss) or not {found.q.target, found.k.target} & {fake_quantize}:
            continue
        claim = supports(found)
        if isinstance(claim, Miss):
            misses.append(claim)
        elif fuel.take(f"lower {node.name} to int8"):
            seen = writes or bool(family(node) & leaving)
            _write(gm, found, prepared, seen and not token_by_token(value(node)))
            coded |= {operand(found.q, 0), operand(found.k, 0)}
    return Outcome(frozenset(coded), misses)


def supports(found: Attention) -> Claim | Miss:
    """Whether the kernel computes this attention of rounded queries and keys, or why not."""
    node = found.node
    if reason := launch.why_not(value(node).device):
        return Miss(reason)
    for name, one in (("queries", found.q), ("keys", found.k)):
        spec = _unrounded(one).spec
        if spec is None:
            return Miss("the {} of '{}' are not rounded, codes of queries and of keys are multiplied", node, 1, (name, node))
        symmetric = isinstance(spec.format, IntAffine) and spec.format.symmetric
        if not symmetric or not isinstance(spec.granularity, PerToken | PerTensor):
            return Miss(f"{name} are {spec.brief}, symmetric integers per token or per tensor are needed")
    if not found.fused and (found.mask is not None or found.bias is not None or found.transposed):
        # A softmax that is written out makes NaN of a row that is hidden whole, the fused op zeros.
        return Miss("'{}' is written out with a mask or with keys transposed; the fused op is needed", node, 1, (node,))
    if found.fused and (dropped := node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0)):
        return Miss(f"probabilities are dropped ({dropped})")
    q, k, v = (value(n) for n in (found.q, found.k, found.v))
    if (q.dim(), k.dim(), v.dim()) != (4, 4, 4):
        return Miss(f"the query has {q.dim()} axes, [B, H, L, D] is needed")
    if v.dtype not in (torch.float16, torch.bfloat16) or value(node).dtype != v.dtype:
        return Miss(f"values are {v.dtype} and the result is {value(node).dtype}; float16 or bfloat16 is needed for both")
    if not all(isinstance(size, int) and size in WIDTHS for size in (q.shape[3], v.shape[3])):
        return Miss(f"heads are {q.shape[3]} and {v.shape[3]} wide; multiples of 16 up to 256 are needed")
    heads, groups = q.shape[1], k.shape[1]
    if not isinstance(heads, int) or not isinstance(groups, int) or not groups or heads % groups:
        return Miss(f"there are {heads} heads of queries and {groups} of keys; a fixed multiple is needed")
    if not same_sizes((q.shape[0], *k.shape[:3]), (v.shape[0], *v.shape[:3])):
        return Miss(f"the operands broadcast, {[list(t.shape) for t in (q, k, v)]}; equal batches and grouped heads are needed")
    m = value(found.mask)
    if m is not None:
        whole = (q.shape[0], heads, q.shape[2], k.shape[2])
        pairs = zip(m.shape[::-1], whole[::-1], strict=False)
        fits = m.dim() <= 4 and all(same_sizes((a,), (1,)) or same_sizes((a,), (b,)) for a, b in pairs)
        if not fits or not (m.dtype == torch.bool or m.is_floating_point()):
            return Miss(f"the mask is {m.dtype} {list(m.shape)}, which does not broadcast to {list(whole)}")
    return Claim(NAME)


def codes_of(x: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """[B, H, L, D] -> codes int8 alike, scale float32 [B, H, L], or [] if there is one per tensor."""
    if spec.is_static:
        codes, scale = quantized(x, spec)
        return codes, scale
    qparams = spec.fit(x)
    scale = qparams.scale if isinstance(spec.granularity, PerTensor) else qparams.scale.squeeze(-1)
    return spec.encode(x, qparams), scale


def _unrounded(node: fx.Node) -> Operand:
    """``node`` before it was rounded and before its heads were repeated, which changes no scale per token or per tensor."""
    if node.target is not fake_quantize:
        return Operand(node, None, None)
    return Operand(ungrouped(operand(node, 0), node), node, read_spec(str(node.args[1])))


def _rounded_probabilities(node: fx.Node) -> fx.Node | None:
    """The rounded result of a softmax, if ``node`` multiplies by it."""
    left = node.args[0] if node.target in (aten.matmul.default, aten.bmm.default) else None
    if isinstance(left, fx.Node) and left.target is fake_quantize and operand(left, 0).target in SOFTMAX:
        return left
    return None


def _write(gm: fx.GraphModule, found: Attention, prepared: dict[fx.Node, tuple[fx.Node, fx.Node]], contiguous: bool) -> None:
    """Codes where the operands were rounded, once for all who read them; the op in the place of the attention."""
    v = _unrounded(found.v) if found.v.target is fake_quantize else Operand(ungrouped(found.v, found.node), None, None)
    k, repeated = _unrounded(found.k), not same_sizes(value(v.node).shape[1:2], value(_unrounded(found.k).node).shape[1:2])
    if repeated:  # of one of them alone groups were seen
        k, v = k._replace(node=operand(found.k, 0)), v._replace(node=found.v if v.rounding is None else operand(found.v, 0))
    coded: list[fx.Node] = []
    for node, rounding, spec in (_unrounded(found.q), k):
        assert rounding is not None and spec is not None
        if rounding not in prepared:
            memo = ("int8 attention", spec)
            prepared[rounding] = tuple(splice(gm, rounding, lambda x, s=spec: codes_of(x, s), node, memo=memo))
        coded += prepared[rounding]
    causal, scale, spec = found.causal, found.scale, v.spec

    def attend(q: Tensor, scale_q: Tensor, k: Tensor, scale_k: Tensor, v: Tensor, mask: Tensor | None) -> Any:
        v = v if spec is None else spec.fake_quantize(v)
        y = int8_attention(q, k, v, scale_q, scale_k, mask, causal, scale)
        return y.clone(memory_format=torch.contiguous_format) if contiguous else y

    replace(gm, found.node, attend, *coded, v.node, found.mask)
