"""Are these the contents that were folded? One number for a tensor, a few passes at memory speed.

    h(m)  =  sum of w_i (w_i >> 32)  mod 2^64,  w_i = m_i + k_i      after NH, the hash of UMAC (Black et al., 1999); keys k

A sum of odd multiples would be blind to an even number of flipped signs, which are the top bits of the words.
"""

from functools import lru_cache

import torch
from torch import Tensor

WIDTH = 4096  # words that become one
CHUNK = 128  # rows that are hashed at once: 4 MB, so that what lies between two passes stays in the cache


def fingerprint(tensor: Tensor) -> int:
    """A number that changes with the contents, their order, the shape or the dtype: all but once in about 2^32."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8) if tensor.numel() else torch.zeros(0, dtype=torch.uint8)
    if data.numel() % 8 or data.storage_offset() % 8:
        data = torch.nn.functional.pad(data, (0, -data.numel() % 8))
    words = data.view(torch.int64)
    while words.numel() > 1:
        words = _hash_rows(words)
    return hash((tuple(tensor.shape), tensor.dtype, int(words) if words.numel() else 0))


def _hash_rows(words: Tensor) -> Tensor:
    """Every WIDTH of the ``words`` [n] as one."""
    keys = _keys(words.device)
    full = words.numel() // WIDTH * WIDTH
    hashes = [_products(chunk, keys) for chunk in words[:full].view(-1, WIDTH).split(CHUNK)] if full else []
    if full < words.numel():
        rest = words[full:]
        hashes.append(_products(rest[None], keys[: len(rest)]))
    return torch.cat(hashes)


def _products(rows: Tensor, keys: Tensor) -> Tensor:
    keyed = rows + keys  # wraps around, as meant, like all that follows
    return (keyed >> 32).mul_(keyed).sum(1)


@lru_cache(8)
def _keys(device: torch.device) -> Tensor:
    """Random words [WIDTH], always the same."""
    generator = torch.Generator().manual_seed(0)
    halves = torch.randint(-(2**31), 2**31, (WIDTH, 2), generator=generator, dtype=torch.int64, device="cpu")
    return ((halves[:, 0] << 32) + halves[:, 1]).to(device)
