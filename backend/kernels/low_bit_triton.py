"""W4A8, W3A8 and W2A8 on an NVIDIA GPU: codes are lifted to int8 in registers, on the left of an integer product."""

import torch
from torch import Tensor

from fxquant.graph.match import Miss
from fxquant.numerics.affine import IntAffine
from fxquant.numerics.granularity import PerChannel, PerGroup
from fxquant.recipe import Spec

from ..triton import launch
from ..triton.codes import Codes
from ..triton.gemm import ONE_GROUP, a8_gemm
from ..triton.refuse import MAX_K, fits
from .int8_triton import end, flat, quantized, why_not_activations
from .kernel import Claim, Product, misfit

WIDTHS = (128, 64, 32)
"""Slice widths: a tensor core takes 32 columns of int8 at a time, and wide slices share the cost of an address."""


class LowBitTritonLinear:
    """Symmetric weights of 2 (ternary), 3 or 4 bits, per channel or in groups; activations as in W8A8."""

    name = "low-bit Triton (weight in registers)"
    epilogues = ()  # triton/fuse_epilogue.py takes whatever is pointwise

    def supports(self, product: Product) -> Claim | Miss:
        w = product.weight_spec
        if reason := launch.why_not(product.x.device) or why_not_activations(product):
            return Miss(reason)
        if w is None or not isinstance(w.format, IntAffine) or not w.format.symmetric or w.format.bits not in (2, 3, 4):
            return Miss(f"weights are {w and w.brief}, symmetric integers of 2, 3 or 4 bits are needed")
        if not isinstance(w.granularity, PerGroup) and w.granularity != PerChannel(0):
            return Miss(f"weights are {w.brief}, one scale per channel or group is needed")
        if reason := misfit(product, MAX_K):
            return Miss(reason)
        if width_of(w, product.weight.shape[1]) is None:
            return Miss(f"weights are {w.brief}; groups of a power of two times {WIDTHS[-1]} are needed")
        return Claim(self.name)

    def pack(self, weight: Tensor, spec: Spec) -> tuple[Tensor, ...]:
        """[N, K] -> words int8 [N, ...], scale float32 [N] or [G, N], and the sums that a zero point of x multiplies.

        Those are sum_k q int32 [N] per channel, and sum_g scale sum_k q float32 [N] in groups.
        """
        (N, K), width = weight.shape, width_of(spec, weight.shape[1])
        assert isinstance(spec.format, IntAffine) and width is not None
        qparams = spec.fit(weight)
        codes = spec.encode(weight, qparams)
        words, scale = Codes(spec.format.bits).pack(codes, width), qparams.scale.to(torch.float32)
        if groups_of(spec, K) == 1:
            return words, scale.reshape(-1), codes.sum(1, dtype=torch.int32)
        scale = scale.reshape(N, -1)
        sums = codes.view(N, scale.shape[1], -1).sum(2, dtype=torch.int32)
        return words, scale.t().clone(memory_format=torch.contiguous_format), (sums * scale).sum(1)

    def prologue(self, x: Tensor, spec: Spec) -> tuple[Tensor, ...]:
        """As for W8A8: the two share what they prepare."""
        return quantized(x, spec)

    def product(self, prepared: tuple[Tensor, ...], packed: tuple[Tensor, ...], bias: Tensor | None, like: Product) -> Tensor:
        spec, K, (q, scale, zero) = like.weight_spec, like.weight.shape[1], flat(prepared)
        assert spec is not None
        size = spec.granularity.size if isinstance(spec.granularity, PerGroup) and groups_of(spec, K) > 1 else ONE_GROUP
        bits, width = spec.format.bits, width_of(spec, K)
        y: Tensor = a8_gemm(q, scale, zero, list(packed), *end(bias), bits, size, width, like.out_dtype)
        return y.view(*prepared[0].shape[:-1], packed[0].shape[0])


def groups_of(spec: Spec, K: int) -> int:
    """How many groups a row of K weights has."""
    return K // spec.granularity.size if isinstance(spec.granularity, PerGroup) else 1


def width_of(spec: Spec, K: int) -> int | None:
    """The widest slice that groups consist of and that fills K up by an eighth at most, else the narrowest, or None."""
    codes = Codes(spec.format.bits)
    widths = WIDTHS[len(codes.planes) - 1 :]  # two planes hold twice the words, and shared memory holds no more of them
    whole = groups_of(spec, K) == 1
    fitting = [w for w in widths if whole or (isinstance(spec.granularity, PerGroup) and fits(codes, spec.granularity.size, w))]
    snug = [w for w in fitting if -K % (codes.slices * w) <= K // 8]
    return next(iter(snug or fitting[-1:]), None)
