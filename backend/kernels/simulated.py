"""Any format on any device: fake-quantized operands, multiplied in floating point. Right, no faster than the float model."""

import torch
from torch import Tensor

from fxquant.graph.match import Miss
from fxquant.recipe import Spec

from .kernel import Claim, Product


class SimulatedLinear:
    """The reference itself: what no other kernel supports runs here, and the report says so."""

    name = "simulated (float GEMM of rounded operands)"
    epilogues = ()

    def supports(self, product: Product) -> Claim | Miss:
        return Claim(self.name)

    def pack(self, weight: Tensor, spec: Spec) -> tuple[Tensor, ...]:
        return (spec.fake_quantize(weight),)

    def prologue(self, x: Tensor, spec: Spec) -> tuple[Tensor, ...]:
        return (spec.fake_quantize(x),)

    def product(self, prepared: tuple[Tensor, ...], packed: tuple[Tensor, ...], bias: Tensor | None, like: Product) -> Tensor:
        return torch.nn.functional.linear(prepared[0], packed[0], bias)
