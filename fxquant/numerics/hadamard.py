"""Randomised Hadamard rotations of any size, and their fast application as a few small matrix products.

    R = diag(s) (F_1 x F_2 x ...) / sqrt(n),   s_i = +-1 by chance,   every F a Hadamard matrix: +-1, with F F^T = |F| I

A Hadamard matrix is known for 1, 2 and most multiples of 4. Powers of two are Sylvester's, the rest is constructed: Paley
(1933) from quadratic residues of a prime, Williamson (1944) from four symmetric circulants. Where none is known the odd part of
``n`` gets a random orthogonal matrix instead (QR of a normal one): as good a rotation, but not of +-1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

WIDEST = 128  # of the powers of two: a factor of f costs f multiply-adds per element

# First rows of the four circulants A, B, C, D of order t with A^2 + B^2 + C^2 + D^2 = 4t I; 39 and 43 as in N. Sloane's tables.
WILLIAMSON = {
    13: ("+++-+----+-++", "+-++--++--++-", "+-----++-----", "+-+--++++--+-"),
    23: ("+++-++---+-++-+---++-++", "+-+-+--++-++++-++--+-+-", "+++--+----+--+----+--++", "++-++++---++++---++++-+"),
    25: ("++-++--+-+--++--+-+--++-+", "+----++-+++-++-+++-++----", "++-----+-+-+--+-+-+-----+",
         "+++----+----++----+----++"),
    29: ("+--+---+-+--++++++--+-+---+--", "+--++----+-++++++++-+----++--", "++--++-+-++++----++++-+-++--+",
         "+-+++-+++--+-++++-+--+++-+++-"),
    39: ("+++--+-+-----+--++----++--+-----+-+--++", "++++---+--++----+-+--+-+----++--+---+++",
         "+++--++-+---+-+--+----+--+-+---+-++--++", "+---++-+-+-----+++-++-+++-----+-+-++---"),
    43: ("+---++--++++-+-+++-++--++-+++-+-++++--++---", "++-++++++----+-+--++-++-++--+-+----++++++-+",
         "+++-+-++--+-+-++++-+----+-++++-+-+--++-+-++", "++---++++-+--+--++--------++--+--+-++++---+"),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Hadamard:
    """The rotation ``x -> (x * signs) (F_1 x F_2 x ...)`` of ``n`` channels; signs [n] and orthogonal factors, float64.

    >>> rotation = Hadamard.of(768, seed=0)
    >>> [len(factor) for factor in rotation.factors], tuple(rotation.matrix().shape)
    ([12, 64], (768, 768))
    """

    signs: Tensor
    factors: tuple[Tensor, ...]

    @staticmethod
    def of(n: int, seed: int = 0) -> "Hadamard":
        """The rotation of ``n`` channels; the same one for the same seed, on every machine."""
        generator = torch.Generator().manual_seed(seed)
        signs = 2.0 * torch.randint(0, 2, (n,), generator=generator).double() - 1
        return Hadamard(signs, factors(n, seed))

    def matrix(self) -> Tensor:
        """``R`` [n, n], written out."""
        return self.signs[:, None] * kronecker(self.factors)


def factors(n: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Orthogonal matrices whose Kronecker product has the size ``n``: Hadamard matrices over ``sqrt`` of their size."""
    power = n & -n
    odd = n // power
    found: list[Tensor] = []
    if odd > 1:
        size = next((odd * 2**k for k in range(2, power.bit_length()) if hadamard(odd * 2**k) is not None), None)
        core = None if size is None else hadamard(size)
        found.append(_random(odd, seed) if core is None else core / len(core) ** 0.5)
        power //= len(found[0]) // odd
    exponent = power.bit_length() - 1
    parts = -(-exponent // (WIDEST.bit_length() - 1))
    for part in range(parts):
        size = 2 ** ((exponent + part) // parts)
        found.append(_sylvester(size) / size**0.5)
    return tuple(found) or (torch.ones(1, 1, dtype=torch.float64),)


def kronecker(factors: Sequence[Tensor]) -> Tensor:
    """``F_1 x F_2 x ...``, written out."""
    product = factors[0]
    for factor in factors[1:]:
        product = torch.kron(product.contiguous(), factor.contiguous())
    return product


def multiply(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """``x (F_1 x F_2 x ...)`` for ``x`` [..., n], as one small product per factor; leading sizes may be symbolic."""
    sizes = [len(factor) for factor in factors]
    *leading, n = x.shape
    for at, factor in enumerate(factors):
        behind = prod(sizes[at + 1 :])
        if behind == 1:
            x = x.reshape(*leading, n // sizes[at], sizes[at]) @ factor if len(sizes) > 1 else x @ factor
        else:
            x = factor.T @ x.reshape(*leading, *([n // (sizes[at] * behind)] if at else []), sizes[at], behind)
    return x.reshape(*leading, n) if len(sizes) > 1 else x


@lru_cache(64)
def hadamard(n: int) -> Tensor | None:
    """A Hadamard matrix [n, n] of +-1 in float64; None if no construction here gives one."""
    if n & (n - 1) == 0:
        return _sylvester(n)
    if n % 4:
        return None
    if _is_prime(n - 1) and (n - 1) % 4 == 3:
        return _paley(n - 1)
    if _is_prime(n // 2 - 1) and (n // 2 - 1) % 4 == 1:
        return _paley_twice(n // 2 - 1)
    if n // 4 in WILLIAMSON:
        return _williamson(WILLIAMSON[n // 4])
    half = hadamard(n // 2)
    return None if half is None else torch.kron(_sylvester(2), half)


def _sylvester(n: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < n:
        matrix = torch.kron(two, matrix)
    return matrix


def _jacobsthal(q: int) -> Tensor:
    """``Q_ij`` = 1 if ``i - j`` is a square modulo the prime ``q``, -1 if not, 0 on the diagonal."""
    character = -torch.ones(q, dtype=torch.float64)
    character[[x * x % q for x in range(1, q)]] = 1
    character[0] = 0
    index = torch.arange(q)
    return character[(index[:, None] - index) % q]


def _bordered(q: int, sign: int) -> Tensor:
    """``Q`` with a first row of ones and a first column of ``sign``: ``S S^T = q I``."""
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0], matrix[1:, 1:] = 1, sign, _jacobsthal(q)
    return matrix


def _paley(q: int) -> Tensor:
    """``I + S`` for a prime ``q = 3 mod 4``: ``S`` is skew (Paley, 1933, construction I)."""
    return torch.eye(q + 1, dtype=torch.float64) + _bordered(q, -1)


def _paley_twice(q: int) -> Tensor:
    """``S x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]]`` for a prime ``q = 1 mod 4`` (Paley, construction II)."""
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(_bordered(q, 1), plus) + torch.kron(torch.eye(q + 1, dtype=torch.float64), diagonal)


def _williamson(rows: tuple[str, ...]) -> Tensor:
    """``[[A, B, C, D], [-B, A, -D, C], [-C, D, A, -B], [-D, -C, B, A]]``, each the circulant of its first row."""
    index = torch.arange(len(rows[0]))
    shift = (index - index[:, None]) % len(index)
    a, b, c, d = (torch.tensor([1.0 if sign == "+" else -1.0 for sign in row], dtype=torch.float64)[shift] for row in rows)
    return torch.cat([torch.cat(row, 1) for row in ((a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a))])


def _random(n: int, seed: int) -> Tensor:
    normal = torch.randn(n, n, generator=torch.Generator().manual_seed(seed + n), dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    orthogonal: Tensor = q * r.diagonal().sign()
    return orthogonal.contiguous()


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
