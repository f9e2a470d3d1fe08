"""W8A8 on an NVIDIA GPU: Triton quantizes each row once and multiplies int8 by int8 with the whole epilogue in registers."""

import torch
from torch import Tensor

from fxquant.graph.match import Miss
from fxquant.numerics.affine import IntAffine
from fxquant.numerics.granularity import PerChannel, PerToken
from fxquant.numerics.ranges import DYNAMIC
from fxquant.recipe import Spec

from ..triton import launch
from ..triton.epilogue import ACTIVATIONS
from ..triton.int8_gemm import MAX_K, int8_gemm
from ..triton.row import quantize_rows
from .kernel import Claim, Product, misfit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Int8TritonLinear:
    """Dynamic per-token activations of 8 bits, symmetric per-channel weights of up to 8 bits."""

    name = "int8 Triton (fused epilogue)"
    epilogues = tuple(name for name in ACTIVATIONS if name != "none")

    def supports(self, product: Product) -> Claim | Miss:
        x, w = product.activation, product.weight_spec
        if reason := launch.why_not(product.x.device):
            return Miss(reason)
        if product.x.dtype not in DTYPES:
            return Miss(f"activations have dtype {product.x.dtype}; float32, bfloat16 or float16 is needed")
        if x is None or not isinstance(x.format, IntAffine) or x.format.bits != 8 or x.granularity != PerToken():
            return Miss(f"activations are {x and x.brief}, integers of 8 bits per token are needed")
        if x.range != DYNAMIC:
            return Miss(f"the range of a token is {x.range}; the row kernel takes the least and the largest number of each row")
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
        """[..., K] -> codes int8 [..., K], scale float32 [..., 1] and, if asymmetric, zero point int32 [..., 1]."""
        assert isinstance(spec.format, IntAffine)
        symmetric, lead = spec.format.symmetric, x.shape[:-1]
        q, scale, zero_point = quantize_rows(x.reshape(-1, x.shape[-1]), symmetric)
        codes, scale = q.view(x.shape), scale.view(*lead, 1)
        return (codes, scale) if symmetric else (codes, scale, zero_point.view(*lead, 1))

    def product(self, prepared: tuple[Tensor, ...], packed: tuple[Tensor, ...], bias: Tensor | None, like: Product) -> Tensor:
        codes, (weight, weight_scale, sums) = prepared[0], packed
        q, scale, *zero_point = (t.reshape(-1, t.shape[-1]) for t in prepared)
        zero, row_sums = (zero_point[0], sums) if zero_point else (None, None)
        epilogue = like.epilogue or "none"
        y: Tensor = int8_gemm(q, weight, scale, zero, weight_scale, row_sums, bias, epilogue, None, like.out_dtype)
        return y.view(*codes.shape[:-1], weight.shape[0])
