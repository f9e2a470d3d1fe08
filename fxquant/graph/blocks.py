"""A block-diagonal matrix that is not written out: the same square matrix on every block of an axis, the identity between."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """``diag(m, m, ...)`` with ones between: ``runs`` says for each stretch of the axis whether it is a block (True) or one
    element that is left alone (False). Multiplies tensors from both sides: ``x @ Blocks`` and ``Blocks @ W``.

    >>> torch.ones(2, 5) @ Blocks(2 * torch.eye(2), (True, False, True))
    tensor([[2., 2., 1., 2., 2.],
            [2., 2., 1., 2., 2.]])
    """

    m: Tensor
    runs: tuple[bool, ...]

    @property
    def dtype(self) -> torch.dtype:
        """That of the matrix."""
        return self.m.dtype

    @property
    def T(self) -> "Blocks":
        """The transpose."""
        return Blocks(self.m.T, self.runs)

    def __rmatmul__(self, x: Tensor) -> Tensor:
        """``x @ self``: shape of ``x`` [..., n]."""
        parts, at = [], 0
        for mapped, count in _stretches(self.runs):
            size = count * len(self.m) if mapped else count
            part = x[..., at : at + size]
            parts.append((part.unflatten(-1, (count, len(self.m))) @ self.m).flatten(-2) if mapped else part)
            at += size
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def __matmul__(self, weight: Tensor) -> Tensor:
        """``self @ weight``: shape of ``weight`` [..., n, k]."""
        return (weight.mT @ self.T).mT

    def dense(self) -> Tensor:
        """Written out, [n, n]."""
        size = sum(len(self.m) if mapped else 1 for mapped in self.runs)
        return torch.eye(size, dtype=self.m.dtype, device=self.m.device) @ self


def _stretches(runs: tuple[bool, ...]) -> list[tuple[bool, int]]:
    """Neighbours of one kind, counted."""
    found: list[tuple[bool, int]] = []
    for mapped in runs:
        if found and found[-1][0] == mapped:
            found[-1] = (mapped, found[-1][1] + 1)
        else:
            found.append((mapped, 1))
    return found
