"""Weight-only on any device: the packed weight is decoded in the graph and multiplied in floating point."""

import torch
from torch import Tensor

from fxquant.graph.match import Miss
from fxquant.numerics.affine import IntAffine, QParams
from fxquant.recipe import Spec

from .kernel import Claim, Product


class DequantizedLinear:
    """Integer weights of any width and granularity, stored packed; activations in floating point."""

    name = "decode + float GEMM"
    epilogues = ()

    def supports(self, product: Product) -> Claim | Miss:
        w = product.weight_spec
        if product.activation is not None:
            return Miss("activations are quantized, and this kernel multiplies in floating point")
        if w is None or not isinstance(w.format, IntAffine):
            return Miss(f"weights are {w}, integers are needed")
        return Claim(self.name)

    def pack(self, weight: Tensor, spec: Spec) -> tuple[Tensor, ...]:
        """[N, K] -> packed uint8 [N, ceil(K*bits/8)], scale, zero point (alike, if any), shaped as the granularity says."""
        qparams = spec.fit(weight)
        codes = spec.encode(weight, qparams)
        return tuple(t for t in (spec.format.pack(codes), *qparams) if t is not None)

    def prologue(self, x: Tensor, spec: Spec) -> tuple[Tensor, ...]:
        raise AssertionError("activations stay in floating point")

    def product(self, prepared: tuple[Tensor, ...], packed: tuple[Tensor, ...], bias: Tensor | None, like: Product) -> Tensor:
        spec = like.weight_spec
        assert spec is not None
        codes = spec.format.unpack(packed[0], like.weight.shape[1])
        weight = spec.decode(codes, QParams(*packed[1:]), like.x.dtype)
        return torch.nn.functional.linear(prepared[0], weight, bias)
