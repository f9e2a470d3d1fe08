"""What a number format can do, and the tuple of those there are."""

from typing import Protocol

import torch
from torch import Tensor

from .affine import IntAffine, QParams
from .granularity import Granularity
from .ranges import DYNAMIC, Range


class Format(Protocol):
    """A frozen value that fits, encodes and decodes; each method is pure PyTorch and traces with symbolic sizes."""

    @property
    def bits(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def fit(self, x: Tensor, granularity: Granularity, range: Range = DYNAMIC) -> QParams: ...

    def encode(self, x: Tensor, qparams: QParams, granularity: Granularity) -> Tensor: ...

    def decode(self, codes: Tensor, qparams: QParams, granularity: Granularity, dtype: torch.dtype) -> Tensor: ...

    def fake_quantize(self, x: Tensor, granularity: Granularity, range: Range = DYNAMIC) -> Tensor: ...

    def pack(self, codes: Tensor) -> Tensor: ...

    def unpack(self, packed: Tensor, size: int) -> Tensor: ...


# What a recipe can name; a new format is one file and one entry here, and the laws in tests/test_formats.py hold it to account.
FORMATS: tuple[type[Format], ...] = (IntAffine,)
