"""W8A8 on an NVIDIA GPU: Triton quantizes each row once and multiplies int8 by int8 with the whole epilogue in registers."""

import torch
from torch import Tensor

from fxquant.graph.match import Miss
from fxquant.numerics.affine import IntAffine
from fxquant.numerics.granularity import PerChannel, PerTensor, PerToken
from fxquant.numerics.ranges import DYNAMIC, Given
from fxquant.recipe import Spec

from ..triton import launch
from ..triton.gemm import a8_gemm
from ..triton.refuse import MAX_K
from ..triton.row import quantize_rows
from .kernel import Claim, Product, misfit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Int8TritonLinear:
    """Per-token or static per-tensor activations of up to 8 bits, symmetric per-channel weights of up to 8 bits."""

    name = "int8 Triton (fused epilogue)"
    epilogues = ()  # triton/fuse_epilogue.py takes whatever is pointwise

    def supports(self, product: Product) -> Claim | Miss:
        w = product.weight_spec
        if reason := launch.why_not(product.x.device) or why_not_activations(product):
            return Miss(reason)
        if w is None or not isinstance(w.format, IntAffine) or not w.format.symmetric or w.granularity != PerChannel(0):
            return Miss(f"weights are {w and w.brief}, symmetric integers per channel are needed")
        if reason := misfit(product, MAX_K):
            return Miss(reason)
        return Claim(self.name)

    def pack(self, weight: Tensor, spec: Spec) -> tuple[Tensor, ...]:
        """[N, K] -> codes int8 [N, K], scale float32 [N], row sums of the codes int32 [N]."""
        qparams = spec.fit(weight)
        codes = spec.encode(weight, qparams)
        return codes.contiguous(), qparams.scale.reshape(-1).to(torch.float32), codes.sum(1, dtype=torch.int32)

    def prologue(self, x: Tensor, spec: Spec) -> tuple[Tensor, ...]:
        """See ``quantized``."""
        return quantized(x, spec)

    def product(self, prepared: tuple[Tensor, ...], packed: tuple[Tensor, ...], bias: Tensor | None, like: Product) -> Tensor:
        q, scale, zero = flat(prepared)
        y: Tensor = a8_gemm(q, scale, zero, list(packed), *end(bias), out_dtype=like.out_dtype)
        return y.view(*prepared[0].shape[:-1], packed[0].shape[0])


def why_not_activations(product: Product) -> str:
    """Why ``quantized`` cannot prepare the activations of ``product``, in a sentence; empty if it can."""
    x = product.activation
    if product.x.dtype not in DTYPES:
        return f"activations have dtype {product.x.dtype}; float32, bfloat16 or float16 is needed"
    if x is None or not isinstance(x.format, IntAffine) or not isinstance(x.granularity, PerToken | PerTensor):
        return f"activations are {x and x.brief}, integers per token or per tensor are needed"
    if isinstance(x.granularity, PerTensor):
        return "" if _given(x) else f"the range per tensor is {x.range}; a given one, or one per token, is needed"
    if x.format.bits != 8:
        return f"activations are {x.brief}, integers of 8 bits per token are needed"
    if x.range != DYNAMIC:
        return f"the range of a token is {x.range}; the row kernel takes the least and the largest number of each row"
    return ""


def _given(spec: Spec) -> bool:
    """Both ends of the range are numbers."""
    return isinstance(spec.range, Given) and isinstance(spec.range.lo, float | int) and isinstance(spec.range.hi, float | int)


def quantized(x: Tensor, spec: Spec) -> tuple[Tensor, ...]:
    """[..., K] -> codes int8 [..., K], scale float32 and, if asymmetric, zero point int32: [..., 1] each, or [] if static.

    Codes of an asymmetric grid, and its zero points, are stored less 128. Static ones are plain PyTorch, which becomes the end
    of whatever product made ``x`` (triton/fuse_epilogue.py).
    """
    assert isinstance(spec.format, IntAffine)
    symmetric, lead = spec.format.symmetric, x.shape[:-1]
    if isinstance(spec.granularity, PerToken):
        q, scale, zero_point = quantize_rows(x.reshape(-1, x.shape[-1]), symmetric)
        codes, scale = q.view(x.shape), scale.view(*lead, 1)
        return (codes, scale) if symmetric else (codes, scale, zero_point.view(*lead, 1))
    assert isinstance(spec.range, Given) and isinstance(spec.range.lo, float | int) and isinstance(spec.range.hi, float | int)
    # Fitted to the numbers, not to x: what reads x here is pointwise.
    scale, zero_point = spec.format.from_range(spec.range.lo, spec.range.hi, device=x.device)
    steps = (x.to(torch.float32) * scale.reciprocal()).round()
    if zero_point is None:
        return steps.clamp(spec.format.qmin, spec.format.qmax).to(torch.int8), scale
    zero_point = zero_point - 128
    steps = (steps + zero_point).clamp(spec.format.qmin - 128, spec.format.qmax - 128)
    return steps.to(torch.int8), scale, zero_point


def flat(prepared: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor | None]:
    """What ``quantized`` made, as rows: codes [M, K], scale and zero point [M, 1] or []."""
    q, *rest = prepared
    scale, *zero = (t if t.dim() == 0 else t.reshape(-1, 1) for t in rest)
    return q.reshape(-1, q.shape[-1]), scale, zero[0] if zero else None


def end(bias: Tensor | None) -> tuple[list[Tensor], str]:
    """The operands and the text of a program that adds ``bias``."""
    return ([], "") if bias is None else ([bias], "t0 = add(y0, column0)")
