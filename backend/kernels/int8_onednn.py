"""W8A8 on a CPU: u8 activations times s8 weights with oneDNN's integer GEMM; everything around it is left to Inductor to fuse.

``sum_k x w = s_x s_w (sum_k q_x q_w - z_x sum_k q_w)``: the integer product is exact, the zero point costs one multiply-add.
Activations are unsigned because VNNI multiplies u8 by s8; a symmetric code is shifted by 128.
"""

import torch
from torch import Tensor

from fxquant.graph.match import Miss
from fxquant.numerics.affine import IntAffine
from fxquant.numerics.granularity import PerChannel, PerTensor, PerToken
from fxquant.recipe import Spec

from ..cpu.features import has_vnni
from .kernel import Claim, Product, misfit

FEWEST_INPUTS = 2  # torch._int_mm is wrong for one


class Int8Linear:
    """Per-token or static per-tensor activations of up to 8 bits, per-channel weights of up to 8 bits."""

    name = "int8 GEMM (u8 x s8, oneDNN)"
    epilogues = ()

    def supports(self, product: Product) -> Claim | Miss:
        x, w = product.activation, product.weight_spec
        if product.x.device.type != "cpu":
            return Miss(f"the site is on {product.x.device.type}, this kernel is for CPUs")
        if not has_vnni():
            return Miss("this CPU has no VNNI: its u8 x s8 products saturate at 16 bits")
        if x is None or not isinstance(x.format, IntAffine) or not isinstance(x.granularity, PerToken | PerTensor):
            return Miss(f"activations are {x}, integers per token or per tensor are needed")
        if w is None or not isinstance(w.format, IntAffine) or not w.format.symmetric or w.granularity != PerChannel(0):
            return Miss(f"weights are {w}, symmetric integers per channel are needed")
        if reason := misfit(product):
            return Miss(reason)
        if product.weight.shape[1] < FEWEST_INPUTS:
            return Miss(f"the inner size is {product.weight.shape[1]}, and oneDNN's integer GEMM needs {FEWEST_INPUTS} or more")
        return Claim(self.name)

    def pack(self, weight: Tensor, spec: Spec) -> tuple[Tensor, ...]:
        """[N, K] -> codes int8 [N, K], scale float32 [N], row sums of the codes int32 [N]."""
        qparams = spec.fit(weight)
        codes = spec.encode(weight, qparams)
        return codes.contiguous(), qparams.scale.view(-1), codes.sum(1, dtype=torch.int32)

    def prologue(self, x: Tensor, spec: Spec) -> tuple[Tensor, ...]:
        """[..., K] -> codes uint8 [..., K], scale float32 [..., 1] or [], and zero point int32, alike, if asymmetric."""
        qparams = spec.fit(x)
        codes = spec.encode(x, qparams)
        if qparams.zero_point is None:
            return (codes.to(torch.int16) + 128).to(torch.uint8), qparams.scale
        return codes, qparams.scale, qparams.zero_point

    def product(self, prepared: tuple[Tensor, ...], packed: tuple[Tensor, ...], bias: Tensor | None, like: Product) -> Tensor:
        codes, scale = prepared[:2]
        zero_point = prepared[2] if len(prepared) == 3 else 128
        weight, weight_scale, sums = packed
        inner = weight.shape[1]
        total = torch._int_mm(codes.reshape(-1, inner), weight.t())
        total = total.reshape(*codes.shape[:-1], weight.shape[0]) - zero_point * sums
        y = total.to(torch.float32) * scale * weight_scale
        if bias is not None:
            y = y + bias
        return y.to(like.out_dtype)
