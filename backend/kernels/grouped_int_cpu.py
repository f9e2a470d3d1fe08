"""W4A8 on a CPU: one integer GEMM per group of inputs, since each group has its own weight scale."""

import operator
from functools import reduce

import torch
from torch import Tensor

from fxquant.graph.match import Miss
from fxquant.numerics.affine import IntAffine
from fxquant.numerics.granularity import PerGroup, PerToken
from fxquant.recipe import Spec

from ..cpu.features import has_vnni
from .int8_onednn import FEWEST_INPUTS, Int8Linear
from .kernel import Claim, Product, misfit

MOST_GROUPS = 64  # one GEMM each; beyond this the float product is the better deal


class GroupedIntLinear:
    """Per-token activations of up to 8 bits, symmetric weights of up to 8 bits in groups along K, stored packed."""

    name = "grouped int GEMM (u8 x s8, oneDNN)"
    epilogues = ()

    def supports(self, product: Product) -> Claim | Miss:
        x, w = product.activation, product.weight_spec
        if product.x.device.type != "cpu" or not has_vnni():
            return Miss("a CPU with VNNI is needed")
        if x is None or not isinstance(x.format, IntAffine) or not isinstance(x.granularity, PerToken):
            return Miss(f"activations are {x}, integers per token are needed")
        if w is None or not isinstance(w.format, IntAffine) or not w.format.symmetric:
            return Miss(f"weights are {w}, symmetric integers per group are needed")
        if not isinstance(w.granularity, PerGroup):
            return Miss(f"weights are {w}, symmetric integers per group are needed")
        if reason := misfit(product):
            return Miss(reason)
        if w.granularity.size < FEWEST_INPUTS:
            return Miss(f"groups are of {w.granularity.size}, and oneDNN's integer GEMM needs {FEWEST_INPUTS} inputs or more")
        groups = product.weight.shape[1] // w.granularity.size
        if groups > MOST_GROUPS:
            return Miss(f"{groups} groups, at most {MOST_GROUPS} pay")
        return Claim(self.name)

    def pack(self, weight: Tensor, spec: Spec) -> tuple[Tensor, ...]:
        """[N, K] -> packed uint8 [N, K*bits/8], scale float32 [G, N], sums of the codes int32 [G, N]."""
        assert isinstance(spec.granularity, PerGroup)
        groups = weight.shape[1] // spec.granularity.size
        qparams = spec.fit(weight)
        codes = spec.encode(weight, qparams)
        sums = codes.view(weight.shape[0], groups, -1).sum(2, dtype=torch.int32)
        return spec.format.pack(codes), qparams.scale.view(-1, groups).t().contiguous(), sums.t().contiguous()

    prologue = Int8Linear.prologue

    def product(self, prepared: tuple[Tensor, ...], packed: tuple[Tensor, ...], bias: Tensor | None, like: Product) -> Tensor:
        spec = like.weight_spec
        assert spec is not None and isinstance(spec.granularity, PerGroup)
        size = spec.granularity.size
        codes, scale = prepared[:2]
        zero_point = prepared[2] if len(prepared) == 3 else torch.full((), 128, dtype=torch.int32)
        words, weight_scale, sums = packed
        inner = like.weight.shape[1]
        weight = spec.format.unpack(words, inner)
        rows = codes.reshape(-1, inner)
        zero_point = zero_point.reshape(-1, 1)

        def term(g: int) -> Tensor:
            part = slice(g * size, (g + 1) * size)
            exact = torch._int_mm(rows[:, part].contiguous(), weight[:, part].contiguous().t()) - zero_point * sums[g]
            return exact.to(torch.float32) * weight_scale[g]

        total = reduce(operator.add, map(term, range(inner // size)))
        y = total.reshape(*codes.shape[:-1], weight.shape[0]) * scale
        if bias is not None:
            y = y + bias
        return y.to(like.out_dtype)
