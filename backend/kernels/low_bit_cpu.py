"""Weights of 1 to 8 bits on a CPU: our own C++ (cpu/low_bit.cpp) reads them packed, once, and decodes them in registers.

W4A8 and its like take codes, W4A16 and W8A16 floats. One layout serves both.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from fxquant.graph.match import Miss
from fxquant.numerics.affine import IntAffine
from fxquant.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from fxquant.numerics.ranges import DYNAMIC
from fxquant.recipe import Spec

from ..cpu import build, low_bit, ops
from .int8_onednn import Int8Linear
from .kernel import Claim, Product, misfit


def why_not(product: Product) -> str:
    """Why ``product`` is not for these kernels, whatever its activations; empty if it is."""
    w = product.weight_spec
    if product.x.device.type != "cpu":
        return f"the site is on {product.x.device.type}, this kernel is for CPUs"
    if reason := build.why_not():
        return reason
    if product.x.dtype not in ops.DTYPES or product.out_dtype not in ops.DTYPES:
        return f"activations have dtype {product.x.dtype}; float32, bfloat16 or float16 is needed"
    if product.bias is not None and product.bias.dtype not in ops.DTYPES:
        return f"the bias has dtype {product.bias.dtype}; float32, bfloat16 or float16 is needed"
    if w is None or not isinstance(w.format, IntAffine) or not isinstance(w.granularity, PerChannel | PerGroup):
        return f"weights are {w and w.brief}, integers per channel or group are needed"
    if isinstance(w.granularity, PerChannel) and w.granularity != PerChannel(0):
        return f"weights are {w.brief}, one scale per output is needed"
    return misfit(product, low_bit.MOST_INPUTS)


def group_size(spec: Spec, inner: int) -> int:
    """How many of ``inner`` inputs share a scale."""
    return spec.granularity.size if isinstance(spec.granularity, PerGroup) else inner


def weight_arguments(packed: tuple[Tensor, ...], bias: Tensor | None, like: Product) -> tuple[object, ...]:
    """The arguments of a product behind its activations."""
    spec, (outputs, inner) = like.weight_spec, like.weight.shape
    assert spec is not None and isinstance(spec.format, IntAffine)
    epilogue = like.epilogue or "none"
    return *packed, bias, spec.format.bits, group_size(spec, inner), outputs, epilogue, like.out_dtype


class _LowBit:
    """What both have in common: the packed weight, and what is applied to the result."""

    epilogues = ops.ACTIVATIONS[1:]

    def pack(self, weight: Tensor, spec: Spec) -> tuple[Tensor, ...]:
        """[N, K] -> weight int8 [N/64, G, bytes], scale float32 and terms int32 [N/64, G, 64]; low_bit.py has the layout."""
        assert isinstance(spec.format, IntAffine)
        qparams = spec.fit(weight)
        scale, zero_point = (None if t is None else t.reshape(weight.shape[0], -1) for t in qparams)
        assert scale is not None
        size = group_size(spec, weight.shape[1])
        return low_bit.pack(spec.encode(weight, qparams), scale, zero_point, spec.format.bits, size)


class LowBitLinear(_LowBit):
    """Activations of up to 8 bits, per token or tensor; weights of any width, symmetric or not, per channel or in groups."""

    @property
    def name(self) -> str:
        """It says what multiplies: AMX, AVX512-VNNI or AVX2."""
        return f"low-bit {build.unit()} (u8 x codes, fused epilogue)"

    def supports(self, product: Product) -> Claim | Miss:
        x = product.activation
        if x is None or not isinstance(x.format, IntAffine) or not isinstance(x.granularity, PerToken | PerTensor):
            return Miss(f"activations are {x and x.brief}, integers per token or per tensor are needed")
        if reason := why_not(product):
            return Miss(reason)
        return Claim(self.name)

    def prologue(self, x: Tensor, spec: Spec) -> tuple[Tensor, ...]:
        """[..., K] -> codes uint8 [..., K padded to 64], scale float32 and zero point int32, [..., 1] or []."""
        if isinstance(spec.granularity, PerToken) and spec.range == DYNAMIC:
            assert isinstance(spec.format, IntAffine)
            return tuple(ops.quantize_rows(x, spec.format.bits, spec.format.symmetric))
        codes, scale, *rest = Int8Linear().prologue(x, spec)
        zero_point = rest[0] if rest else torch.full_like(scale, 128, dtype=torch.int32)
        return pad(codes, (0, -x.shape[-1] % ops.DEPTH)), scale.to(torch.float32), zero_point

    def product(self, prepared: tuple[Tensor, ...], packed: tuple[Tensor, ...], bias: Tensor | None, like: Product) -> Tensor:
        y: Tensor = low_bit.linear_u8(*prepared, *weight_arguments(packed, bias, like))
        return y


class LowBitFloatLinear(_LowBit):
    """Activations in floating point; weights of any width, symmetric or not, per channel or in groups."""

    name = "low-bit C++ (float x codes, fused epilogue)"

    def supports(self, product: Product) -> Claim | Miss:
        if product.activation is not None:
            return Miss("activations are quantized, and this kernel takes floats")
        if reason := why_not(product):
            return Miss(reason)
        return Claim(self.name)

    def prologue(self, x: Tensor, spec: Spec) -> tuple[Tensor, ...]:
        raise AssertionError("activations stay in floating point")

    def product(self, prepared: tuple[Tensor, ...], packed: tuple[Tensor, ...], bias: Tensor | None, like: Product) -> Tensor:
        y: Tensor = low_bit.linear_float(prepared[0], *weight_arguments(packed, bias, like))
        return y
