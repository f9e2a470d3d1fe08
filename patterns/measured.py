"""What calibration data showed at the input of the linears that read one value: all that a transform may choose its map by."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.recipe import Spec


@dataclass(frozen=True, eq=False)
class Measured:
    """One linear input: statistics per channel [K] over all tokens that are no padding, a sample of the tokens, the readers.

    ``where`` is the weight path of the first linear that reads the value. ``low``, ``high``, ``mean`` [K]: minimum, maximum and
    mean magnitude. ``rows`` [R, K]: some of the tokens, drawn by chance; ``far`` [F, K] or None: of all ``tokens`` those that
    reach farthest, which chance would miss. ``weights`` [N_i, K] and ``biases`` [N_i] or None: of every linear that
    reads it, as transformed so far. ``activation`` and ``weight``: what the recipe will do here (None: nothing).
    ``absorbed``: a scale is taken by what produces the value; otherwise it costs a multiply, which a fused quantizer hides.
    """

    where: str
    low: Tensor
    high: Tensor
    mean: Tensor
    rows: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    activation: Spec | None
    weight: Spec | None
    absorbed: bool
    far: Tensor | None = None
    tokens: int = 0


def standing_for_all(sample: Tensor, far: Tensor, tokens: int) -> Tensor:
    """Rows whose squared errors add up as those of all ``tokens``: a ``sample`` [R, K], enlarged for that, and ``far`` ones."""
    if tokens <= len(far):
        return far
    others = sample[sample.abs().amax(1) < far.abs().amax(1).min()]  # a far one that chance drew, too, stands for itself alone
    return torch.cat([others * ((tokens - len(far)) / len(others)) ** 0.5, far]) if len(others) else sample
