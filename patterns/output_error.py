"""What rounding costs the linears that read one value, under a shift and a scale of it: the error that searches minimise.

    sum_i || (X - z) W_i^T  -  Q_x((X - z) / s) Q_w(W_i diag(s))^T ||^2 ,      x y^T in float32

The shift reaches the outputs through the unrounded bias ``b + W z``, so it falls out of the difference.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxquant.errors import CalibrationError
from fxquant.numerics.granularity import PerChannel, PerTensor
from fxquant.numerics.ranges import DYNAMIC
from fxquant.recipe import Spec

from .measured import Measured


@dataclass(frozen=True, eq=False)
class OutputError:
    """The error as a function of ``s`` and ``z`` [K]. ``x`` [R, K], ``weights`` [N_i, K], ``low`` and ``high`` [K], float32.

    A range of one per tensor or channel is that of ``low`` and ``high`` under the map, since calibration will see all tokens
    and not ``x`` alone; a range per token is the token's. ``activation`` or ``weight`` None: it is not rounded.
    """

    x: Tensor
    low: Tensor
    high: Tensor
    weights: tuple[Tensor, ...]
    activation: Spec | None
    weight: Spec | None

    @staticmethod
    def of(measured: Measured, *, rows: int, outputs: int, exact_ranges: bool = True) -> "OutputError":
        """The error on at most ``rows`` of the sampled tokens and ``outputs`` of the outputs, evenly taken.

        Without ``exact_ranges`` the weights have the range of their extremes, where the recipe would search for a better one;
        so they have if it is found after all transforms.
        """
        weight, weights = measured.weight, tuple(w.float() for w in measured.weights)
        if weight is None or weight.granularity.dims(2) == (1,):  # rows of W are rounded one by one: some stand for all
            together = torch.cat(weights)
            weights = (together[_evenly(len(together), outputs, together.device)],)
        if weight is not None and (weight.is_of_outputs or not exact_ranges):
            weight = replace(weight, range=DYNAMIC)
        x = measured.rows.float()
        x = x[_evenly(len(x), rows, x.device)]
        low, high = (torch.stack([end.float(), *ends]) for end, ends in ((measured.low, x), (measured.high, x)))
        return OutputError(x, low.amin(0), high.amax(0), weights, measured.activation, weight)

    def shifted(self, z: Tensor | None = None) -> Callable[[Tensor], float]:
        """The error as a function of ``s`` alone."""
        by_token = self._by_token(z)
        return lambda s: float(by_token(s).sum())

    def relative(self) -> Callable[[Tensor], float]:
        """The mean over tokens of the error relative to the token's own outputs, as a function of ``s``.

        So one token of massive outputs counts as one; what has less than the median's counts as if it had that.
        """
        power = torch.stack([(self.x @ w.T).square().sum(1) for w in self.weights]).sum(0)
        unit, by_token = power.clamp_min(max(float(power.median()), torch.finfo(power.dtype).tiny)), self._by_token()
        return lambda s: float((by_token(s) / unit).mean())

    def _by_token(self, z: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        moved = self if z is None else replace(self, x=self.x - z, low=self.low - z, high=self.high - z)
        wanted = [moved.x @ w.T for w in self.weights]

        def error(s: Tensor) -> Tensor:
            x = moved._round_activation(s)
            errors = [y - x @ self._round(w * s).T for y, w in zip(wanted, self.weights, strict=True)]
            return torch.stack([e.square().sum(1) for e in errors]).sum(0)

        return error

    def __call__(self, s: Tensor, z: Tensor | None = None) -> float:
        return self.shifted(z)(s)

    def _round(self, w: Tensor) -> Tensor:
        return w if self.weight is None else self.weight.fake_quantize(w)

    def _round_activation(self, s: Tensor) -> Tensor:
        x, spec = self.x / s, self.activation
        if spec is None:
            return x
        if not isinstance(spec.granularity, PerTensor | PerChannel):
            return spec.fake_quantize(x)
        qparams = spec.format.fit(torch.stack([self.low / s, self.high / s]), spec.granularity)
        return spec.decode(spec.encode(x, qparams), qparams, x.dtype)


def reach_of(measured: Measured, z: Tensor | None = None) -> Tensor:
    """``max|X_j - z_j|`` [K] over all tokens, in float32."""
    low, high = (end.float() if z is None else end.float() - z for end in (measured.low, measured.high))
    return torch.maximum(low.abs(), high.abs())


def left_alone(measured: Measured) -> str | None:
    """Why this site will not be quantized as the recipe says, so that there is nothing to choose; None if it will."""
    for role, spec, shapes in (
        ("weight", measured.weight, [w.shape for w in measured.weights]),
        ("activation", measured.activation, [measured.rows.shape]),
    ):
        for shape in shapes if spec is not None else ():
            assert spec is not None
            if reason := spec.granularity.refusal(shape):
                return f"the {role} of '{measured.where}' will not be quantized: {reason}"
    return None


def check_finite(measured: Measured) -> None:
    """Raise CalibrationError, naming the site, if no token was seen or something that is no number was."""
    if len(measured.rows) == 0:
        raise CalibrationError(f"no token was seen at the input of '{measured.where}'; calibrate on data that reaches it")
    seen: Sequence[tuple[str, Tensor]] = (
        *((f"the {name} of its input", getattr(measured, name)) for name in ("low", "high", "mean")),
        ("its sampled input", measured.rows),
        *(("its weight", w) for w in measured.weights),
    )
    for what, numbers in seen:
        if not bool(numbers.isfinite().all()):
            bad = int((~numbers.isfinite()).sum())
            raise CalibrationError(
                f"'{measured.where}': {what} holds NaN or infinity ({bad} of {numbers.numel()} numbers), and no map can be "
                f"chosen by it; repair the model or the data, or ignore the site"
            )


def _evenly(count: int, wanted: int, device: torch.device) -> Tensor:
    """At most ``wanted`` of ``count`` indices, from the first to the last."""
    kept = min(count, wanted)
    return torch.linspace(0, count - 1, kept, device=device, dtype=torch.float64).round().long()
