"""Layer norm and RMS norm, as the formulas of their papers; the matcher reads every spelling of them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.graph.match import Match, Miss, one_of, pattern
from fxquant.graph.tidy import value
from fxquant.graph.weights import depends_on_parameters_only


def _gains(match: Match) -> Miss | None:
    """Gain and bias are parameter vectors over the last axis of ``x``."""
    size = value(match.x).shape[-1]
    if not isinstance(size, int):
        return Miss("the normalised axis of '{}' has the symbolic size {}, a fixed one is needed", match.x, 0, (match.x, size))
    for name in ("weight", "bias"):
        node = match.bindings.get(name)
        if node is None:
            continue
        if tuple(value(node).shape) != (size,):
            shape = list(value(node).shape)
            return Miss("the {} '{}' has the shape {}, [{}] is needed", node, 0, (name, node, shape, size))
        if not depends_on_parameters_only(node):
            return Miss("the {} '{}' depends on more than parameters", node, 0, (name, node))
    return None


def _rms(match: Match) -> Miss | None:
    share = match.share
    size = value(match.x).shape[-1]
    if share is not None and not (isinstance(size, int) and abs(share * size - 1) < 1e-8):
        return Miss("the sum of squares of '{}' is multiplied by {}, 1 / {} is needed", match.x, 0, (match.x, share, size))
    return _gains(match)


@pattern(_rms, x=(2, 3, 8), weight=(8,))
def rms_norm(x: Tensor, weight: Tensor, eps: float, share: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` (Zhang & Sennrich 2019), with or without a gain."""
    square = x.pow(2)
    mean = one_of(square.mean(-1, keepdim=True), square.sum(-1, keepdim=True) * share)
    y = x * torch.rsqrt(mean + eps)
    return one_of(weight * y, y)


@pattern(_gains, x=(2, 3, 8), weight=(8,), bias=(8,))
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``weight * (x - mean(x)) / sqrt(var(x) + eps) + bias`` (Ba, Kiros & Hinton 2016), with or without gain and bias."""
    centred = x - x.mean(-1, keepdim=True)
    variance = one_of(x.var(-1, keepdim=True, correction=0), centred.pow(2).mean(-1, keepdim=True))
    y = centred * torch.rsqrt(variance + eps)
    return one_of(weight * y + bias, weight * y, y + bias, y)


@pattern(_gains, x=(2, 3, 8), weight=(8,))
def rms_norm_then_gain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """A gain applied after an RMS norm that has none."""
    return weight * torch.rms_norm(x, [8], None, eps)


@pattern(_gains, x=(2, 3, 8), weight=(8,), bias=(8,))
def layer_norm_then_gain(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """A gain and a bias applied after a layer norm that has none."""
    y = F.layer_norm(x, [8], None, None, eps)
    return one_of(weight * y + bias, weight * y, y + bias)


@pattern(_gains, x=(2, 3, 8), weight=(8,), bias=(8,))
def native_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The first result of the native op."""
    return torch.native_layer_norm(x, [8], weight, bias, eps)[0]
