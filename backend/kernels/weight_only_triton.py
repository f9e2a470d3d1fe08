"""W4A16 and W8A16 on an NVIDIA GPU: Triton widens the codes in registers, so that the weight is read once, packed."""

import torch
from torch import Tensor

from fxquant.graph.match import Miss
from fxquant.numerics.affine import IntAffine
from fxquant.numerics.granularity import PerChannel, PerGroup
from fxquant.recipe import Spec

from ..triton import launch
from ..triton.codes import OFFSET, Codes
from ..triton.gemm import ONE_GROUP, a16_gemm
from .int8_triton import end
from .kernel import Claim, Product, misfit

# What the kernels were compiled and looked at for: bits and granularity of the weight.
FORMS = ((4, PerGroup(128)), (8, PerChannel(0)))
BOOKS = (PerGroup(64), PerGroup(128), PerChannel(0))
WIDTH = 64  # of a slice: with 4 bits, a group is two slices and a block two groups


class WeightOnlyTritonLinear:
    """Weights of 4 bits in groups of 128 or of 8 bits per channel, either symmetric or not; 16-bit floats as activations.

    And any format that has a ``codebook``, a tuple of 16 numbers of which its codes (uint8) are places: a weight is
    ``scale codebook[code]``.
    """

    name = "weight-only Triton (fused epilogue)"
    epilogues = ()  # triton/fuse_epilogue.py takes whatever is pointwise

    def supports(self, product: Product) -> Claim | Miss:
        w = product.weight_spec
        if reason := launch.why_not(product.x.device):
            return Miss(reason)
        if product.activation is not None:
            return Miss("activations are quantized, and this kernel multiplies in floating point")
        if product.x.dtype not in OFFSET:
            return Miss(f"activations have dtype {product.x.dtype}; bfloat16 or float16 is needed")
        if product.out_dtype != product.x.dtype:
            return Miss(f"activations are {product.x.dtype} and the result is {product.out_dtype}; one dtype is needed")
        book = codebook_of(w)
        if w is not None and book:
            if len(book) != 16 or w.format.bits != 4 or w.granularity not in BOOKS:
                return Miss(f"weights are {w.brief}; a codebook of 16 entries per group of 64, 128 or all is needed")
        elif w is None or not isinstance(w.format, IntAffine) or (w.format.bits, w.granularity) not in FORMS:
            return Miss(f"weights are {w and w.brief}; 4 bits per group of 128, or 8 bits per channel, are needed")
        if reason := misfit(product):
            return Miss(reason)
        return Claim(self.name)

    def pack(self, weight: Tensor, spec: Spec) -> tuple[Tensor, ...]:
        """[N, K] -> int16 words of slices [N, ...], scale float32 [G, N], zero point int32 [G, N] if there is one."""
        qparams = spec.fit(weight)
        codes = spec.encode(weight, qparams)
        turned = [t.reshape(weight.shape[0], -1).t() for t in qparams if t is not None]
        blocks = [t.clone(memory_format=torch.contiguous_format) for t in turned]
        words = Codes(spec.format.bits, 16, len(blocks) == 1 and not codebook_of(spec)).pack(codes, WIDTH)
        return words, blocks[0].to(torch.float32), *blocks[1:]

    def prologue(self, x: Tensor, spec: Spec) -> tuple[Tensor, ...]:
        raise AssertionError("activations stay in floating point")

    def product(self, prepared: tuple[Tensor, ...], packed: tuple[Tensor, ...], bias: Tensor | None, like: Product) -> Tensor:
        spec, x = like.weight_spec, prepared[0]
        assert spec is not None
        size = spec.granularity.size if isinstance(spec.granularity, PerGroup) else ONE_GROUP
        rows, bits = x.reshape(-1, x.shape[-1]), spec.format.bits
        book = list(codebook_of(spec)) or None
        y: Tensor = a16_gemm(rows, list(packed), *end(bias), len(packed) == 3, bits, size, WIDTH, codebook=book)
        return y.view(*x.shape[:-1], packed[0].shape[0])


def codebook_of(spec: Spec | None) -> tuple[float, ...]:
    """What the codes of ``spec`` mean, if its format lists that; else nothing."""
    return tuple(getattr(spec.format, "codebook", ())) if spec is not None else ()
