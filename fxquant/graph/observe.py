"""Watching a graph while it runs: the op ``fxquant::observe`` is the identity, and shows its value to whoever watches.

    observed = observe(x, "encoder.layer.0.attention.self.query.weight:input")
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from ..errors import CalibrationError

_library = torch.library.Library("fxquant", "FRAGMENT")
_library.define("observe(Tensor(a) x, str key) -> Tensor(a)", tags=(torch.Tag.pt2_compliant_tag,))
_watching = threading.local()


class Watcher(Protocol):
    """Is shown every observed value of the thread that it watches."""

    def see(self, key: str, x: Tensor) -> None: ...


def _observe(x: Tensor, key: str) -> Tensor:
    """``x`` itself."""
    watcher: Watcher | None = getattr(_watching, "watcher", None)
    if watcher is None:
        raise CalibrationError(f"the value '{key}' is observed and nobody watches; run the graph within watching(...)")
    watcher.see(key, x.detach())
    return x.view_as(x)


_library.impl("observe", _observe, "CompositeExplicitAutograd")
torch.library.register_fake("fxquant::observe", lambda x, key: x.view_as(x), lib=_library)

observe = torch.ops.fxquant.observe.default


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Every ``observe`` of this thread shows its value to ``watcher``."""
    before = getattr(_watching, "watcher", None)
    _watching.watcher = watcher
    try:
        yield
    finally:
        _watching.watcher = before


def tokens(x: Tensor, mask: Tensor | None, *, merge_heads: bool) -> Tensor:
    """The tokens of ``x`` as rows [tokens, channels], without those that ``mask`` [B, T] (nonzero: a real token) calls padding.

    Known are [B, T, C], [B, H, T, C], [B, T, H, C], [B*H, T, C] and [B*T, C]; of any other shape, every row counts. With
    ``merge_heads`` all heads of a token are one row, else a row each. Padding may be on either side, or in the middle.

    >>> tokens(torch.ones(2, 3, 5), torch.tensor([[1, 1, 0], [1, 0, 0]]), merge_heads=True).shape   # doctest: +SKIP
    torch.Size([3, 5])
    """
    x, mask = _by_token(x, mask)
    if x.ndim == 4 and mask is not None:
        x, mask = (x.flatten(2), mask) if merge_heads else (x, mask.unsqueeze(-1).expand(x.shape[:3]))
    if mask is None or mask.shape != x.shape[: mask.ndim]:
        return x.reshape(-1, x.shape[-1]) if x.ndim else x.reshape(1, 1)
    return x[mask.to(torch.bool)].reshape(-1, x.shape[-1])


def _by_token(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``x`` with the token axis second ([B, T, ...]) and the mask [B, T]; no mask where the shape does not tell the axis."""
    if mask is None or mask.ndim != 2 or x.ndim < 2:
        return x, None
    batch, length = mask.shape
    shape = tuple(x.shape)
    if x.ndim == 2 and shape[0] == batch * length:
        return x.unflatten(0, (batch, length)), mask
    if x.ndim == 3 and shape[:2] == (batch, length):
        return x, mask
    if x.ndim == 3 and shape[1] == length and batch and shape[0] % batch == 0:
        return x.unflatten(0, (batch, -1)).transpose(1, 2), mask
    if x.ndim == 4 and (shape[0], shape[2]) == (batch, length):
        return x.transpose(1, 2), mask
    if x.ndim == 4 and shape[:2] == (batch, length):
        return x, mask
    return x, None


def mask_for(masks: Mapping[str, Tensor], decoder: bool) -> Tensor | None:
    """The padding mask for a value on the decoder's side, or not, of a model; a model of one side has one mask."""
    wanted = ("decoder_attention_mask", "attention_mask") if decoder else ("attention_mask",)
    return next((masks[name] for name in wanted if name in masks), None)
