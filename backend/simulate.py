"""The rounding of one static edge as a module: its range can be set from outside, and learned."""

import torch
from torch import Tensor, nn

from fxquant.numerics.affine import IntAffine, QParams
from fxquant.numerics.learned import learned_fake_quantize, rounded, to_range
from fxquant.recipe import Spec


class Quantizer(nn.Module):
    """Rounds its input by ``spec`` with the range last set; while ``learn()`` is on, gradients reach scale and zero point."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        assert isinstance(spec.format, IntAffine)
        self._format, self._granularity = spec.format, spec.granularity
        self._qparams: QParams | None = None
        self.log_scale: nn.Parameter | None = None
        self.zero_point: nn.Parameter | None = None

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Round within [low, high] from now on: [] or [channels]."""
        self._qparams = self._format.from_range(low, high)
        self.log_scale = self.zero_point = None

    def learn(self) -> list[nn.Parameter]:
        """Start learning at the range last set; returns the log of the scale, and the zero point if there is one."""
        assert self._qparams is not None
        self.log_scale = nn.Parameter(self._qparams.scale.log())
        if self._qparams.zero_point is not None:
            self.zero_point = nn.Parameter(self._qparams.zero_point.to(torch.float32))
        return [p for p in (self.log_scale, self.zero_point) if p is not None]

    def range(self) -> tuple[Tensor, Tensor]:
        """The range as learned so far."""
        assert self.log_scale is not None
        zero_point = None if self.zero_point is None else self.zero_point.detach()
        return to_range(self.log_scale.detach(), zero_point, self._format)

    @property
    def levels(self) -> int:
        """How many steps the grid has: what one scale is to the whole range."""
        return self._format.qmax - self._format.qmin

    def forward(self, x: Tensor) -> Tensor:
        if self.log_scale is not None:
            return learned_fake_quantize(x, self.log_scale, self.zero_point, self._format, self._granularity)
        assert self._qparams is not None
        return rounded(x, self._qparams, self._format, self._granularity)
