"""Activations in their decomposed spellings, and the gated feed-forward block."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.graph.match import Match, Miss, one_of, pattern
from fxquant.graph.weights import depends_on_parameters_only


@pattern(x=(2, 8))
def gelu_erf(x: Tensor) -> Tensor:
    """``x Phi(x)`` by the error function (Hendrycks & Gimpel 2016, exact)."""
    return 0.5 * x * (1.0 + torch.erf(x * (1 / math.sqrt(2))))


@pattern(x=(2, 8))
def gelu_tanh(x: Tensor) -> Tensor:
    """``0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))``, or with ``x`` drawn out of the polynomial."""
    c = math.sqrt(2 / math.pi)
    polynomial = one_of(c * (x + 0.044715 * x.pow(3)), c * x * (1 + 0.044715 * x.pow(2)), c * x + c * 0.044715 * x.pow(3))
    return 0.5 * x * (1.0 + torch.tanh(polynomial))


@pattern(x=(2, 8))
def gelu_quick(x: Tensor) -> Tensor:
    """``x sigmoid(1.702 x)``; it stays as it is, for no ATen op computes it."""
    return x * torch.sigmoid(1.702 * x)


@pattern(x=(2, 8))
def silu(x: Tensor) -> Tensor:
    """``x sigmoid(x)`` (Elfwing et al. 2017), also as ``x / (1 + exp(-x))``."""
    return one_of(x * torch.sigmoid(x), x / (1 + torch.exp(-x)))


def _weights(match: Match) -> Miss | None:
    for name in ("gate_weight", "up_weight", "down_weight"):
        if not depends_on_parameters_only(match[name]):
            return Miss("the {} '{}' depends on more than parameters", match[name], 0, (name, match[name]))
    return None


def _activations(x: Tensor) -> Tensor:
    return one_of(
        silu=F.silu(x),
        gelu=F.gelu(x),
        gelu_tanh=F.gelu(x, approximate="tanh"),
        gelu_quick=x * torch.sigmoid(1.702 * x),
        relu=F.relu(x),
        sigmoid=torch.sigmoid(x),
        identity=x,
    )


@pattern(
    _weights,
    x=(2, 3, 8),
    gate_weight=(6, 8),
    gate_bias=(6,),
    up_weight=(6, 8),
    up_bias=(6,),
    down_weight=(8, 6),
    down_bias=(8,),
)
def gated_mlp(
    x: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
) -> Tensor:
    """``down(act(gate(x)) * up(x))`` (Shazeer 2020); ``match.taken`` names the activation. For canonical graphs."""
    inner = _activations(F.linear(x, gate_weight, gate_bias)) * F.linear(x, up_weight, up_bias)
    return F.linear(inner, down_weight, down_bias)
