"""What a kernel is: a claim on one quantized product, how its weight is packed, its input prepared, and the product itself."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fxquant.graph.match import Miss
from fxquant.recipe import Spec

SITES = "fxquant_sites"  # the keys of the sites that a kernel's node computes, in its meta


@dataclass(frozen=True)
class Claim:
    """A kernel takes a site; truthy, as Miss is falsy."""

    kernel: str

    def __bool__(self) -> bool:
        return True


@dataclass(frozen=True)
class Product:
    """``linear(x, weight, bias)`` with its Specs, as fake values: what a kernel decides on.

    ``x``: [..., K], ``weight``: [N, K]; ``activation`` or ``weight_spec`` is None where that side stays in floating point.
    ``dtype`` is that of the result, where it is not that of ``x`` (under autocast); ``epilogue`` names the function that
    follows ("gelu", "gelu_tanh", "silu", "relu"), if the kernel is to apply it.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    activation: Spec | None
    weight_spec: Spec | None
    dtype: torch.dtype | None = None
    epilogue: str = ""

    @property
    def out_dtype(self) -> torch.dtype:
        """The dtype of the result."""
        return self.dtype or self.x.dtype


MOST_INPUTS = (2**31 - 1) // (255 * 127)  # a sum of more products of u8 and s8 may not fit 32 bits


def misfit(product: Product, most_inputs: int = MOST_INPUTS) -> str:
    """Why the shapes of a product are not those of an integer linear layer; empty if they are."""
    outputs, inner = product.weight.shape
    if not (0 < inner <= most_inputs and outputs > 0):
        return f"the weight has shape [{outputs}, {inner}]; at least one output and 1 to {most_inputs} inputs are needed"
    if product.bias is not None and tuple(product.bias.shape) != (outputs,):
        return f"the bias has shape {list(product.bias.shape)}, [{outputs}] is needed"
    return ""


class Kernel(Protocol):
    """How one family of quantized products runs. All functions are traced into the graph, so they are plain PyTorch.

    ``pack`` is written into the weight graph (run once per parameter version), ``prologue`` into the runtime and shared by all
    products that read the same input with the same Spec, ``product`` once per site.
    """

    @property
    def name(self) -> str: ...

    @property
    def epilogues(self) -> tuple[str, ...]: ...  # the functions that ``product`` can apply to its result

    def supports(self, product: Product) -> Claim | Miss: ...

    def pack(self, weight: Tensor, spec: Spec) -> tuple[Tensor, ...]: ...

    def prologue(self, x: Tensor, spec: Spec) -> tuple[Tensor, ...]: ...

    def product(
        self, prepared: tuple[Tensor, ...], packed: tuple[Tensor, ...], bias: Tensor | None, like: Product
    ) -> Tensor: ...


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Spec | None, weight_spec: Spec | None) -> Tensor:
    """The truth that every kernel must equal: the plain product of fake-quantized operands, in the dtype of ``x``."""
    x = x if activation is None else activation.fake_quantize(x)
    weight = weight if weight_spec is None else weight_spec.fake_quantize(weight)
    return torch.nn.functional.linear(x, weight, bias)
