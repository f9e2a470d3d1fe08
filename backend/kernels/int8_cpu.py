"""W8A8 on a CPU: our own C++ (cpu/int8.cpp), a product with a fused epilogue, one pass over a row."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from fxquant.graph.match import Miss
from fxquant.numerics.affine import IntAffine
from fxquant.numerics.granularity import PerChannel, PerTensor, PerToken
from fxquant.numerics.ranges import DYNAMIC
from fxquant.recipe import Spec

from ..cpu import build, ops
from .int8_onednn import Int8Linear
from .kernel import Claim, Product, misfit


class Int8CpuLinear:
    """Per-token or static per-tensor activations of up to 8 bits, symmetric per-channel weights of up to 8 bits."""

    epilogues = ops.ACTIVATIONS[1:]

    @property
    def name(self) -> str:
        """It says what multiplies: AMX, AVX512-VNNI or AVX2."""
        return f"int8 {build.unit()} (u8 x s8, fused epilogue)"

    def supports(self, product: Product) -> Claim | Miss:
        x, w = product.activation, product.weight_spec
        if product.x.device.type != "cpu":
            return Miss(f"the site is on {product.x.device.type}, this kernel is for CPUs")
        if reason := build.why_not():
            return Miss(reason)
        if product.x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return Miss(f"activations have dtype {product.x.dtype}; float32, bfloat16 or float16 is needed")
        if product.bias is not None and product.bias.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return Miss(f"the bias has dtype {product.bias.dtype}; float32, bfloat16 or float16 is needed")
        if reason := misfit(product):
            return Miss(reason)
        if x is None or not isinstance(x.format, IntAffine) or not isinstance(x.granularity, PerToken | PerTensor):
            return Miss(f"activations are {x and x.brief}, integers per token or per tensor are needed")
        if isinstance(x.granularity, PerToken) and x.range != DYNAMIC:
            return Miss(f"the range of a token is {x.range}; this kernel takes the least and the largest number of each row")
        if isinstance(x.granularity, PerTensor) and not x.is_static:
            return Miss("the range per tensor is dynamic; a static one, or one per token, is needed")
        if w is None or not isinstance(w.format, IntAffine) or not w.format.symmetric or w.granularity != PerChannel(0):
            return Miss(f"weights are {w and w.brief}, symmetric integers per channel are needed")
        return Claim(self.name)

    def pack(self, weight: Tensor, spec: Spec) -> tuple[Tensor, ...]:
        """[N, K] -> panels int8 [N/64, K/4, 64, 4], K padded to 64, scale float32 [N], row sums of the codes int32 [N]."""
        qparams = spec.fit(weight)
        codes = spec.encode(weight, qparams)
        return ops.pack_panels(codes), qparams.scale.reshape(-1).to(torch.float32), codes.sum(1, dtype=torch.int32)

    def prologue(self, x: Tensor, spec: Spec) -> tuple[Tensor, ...]:
        """[..., K] -> codes uint8 [..., K padded to 64], scale float32 and zero point int32, [..., 1] or []."""
        if isinstance(spec.granularity, PerToken):
            assert isinstance(spec.format, IntAffine)
            return tuple(ops.quantize_rows(x, spec.format.bits, spec.format.symmetric))
        codes, scale, *rest = Int8Linear.prologue(self, x, spec)  # type: ignore[arg-type]  # it needs no self
        zero_point = rest[0] if rest else torch.full_like(scale, 128, dtype=torch.int32)
        return pad(codes, (0, -x.shape[-1] % ops.DEPTH)), scale.to(torch.float32), zero_point

    def product(self, prepared: tuple[Tensor, ...], packed: tuple[Tensor, ...], bias: Tensor | None, like: Product) -> Tensor:
        y: Tensor = ops.linear(*prepared, *packed, bias, like.weight.shape[0], like.epilogue or "none", like.out_dtype)
        return y
