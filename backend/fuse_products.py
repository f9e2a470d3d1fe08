"""``quantize_rows(linear(x))`` and ``quantize_rows(norm(linear(x) + residual))`` become one op, on a CPU.

The result of the product is finished, row by row, while it is in the cache: it is never written to memory.
"""

from typing import Any

from torch import Tensor, fx

from fxquant.graph.fuel import Fuel
from fxquant.graph.match import Miss
from fxquant.graph.rewrite import splice
from fxquant.graph.tidy import value
from fxquant.patterns.canonical import erase
from fxquant.patterns.linear import same_sizes

from .cpu import ops


def fuse_products(gm: fx.GraphModule, fuel: Fuel) -> list[Miss]:
    """Fuse every op that quantizes rows with the product whose rows they are; in place. Returns why some were not."""
    misses: list[Miss] = []
    for target in (ops.quantize_rows, ops.normalize_rows):
        for rows in list(gm.graph.find_nodes(op="call_function", target=target)):
            product = _product(rows)
            if isinstance(product, Miss):
                misses.append(product)
            elif fuel.take(f"fuse {rows.name} with the product it reads"):
                _write(gm, rows, product)
    return misses


def _product(rows: fx.Node) -> fx.Node | Miss:
    """The product that ``rows`` reads and nobody else does."""
    misses: list[Miss] = []
    for x in _operands(rows):
        if x.target is not ops.linear:
            misses.append(Miss("'{}' is no integer product", x, 0, (x,)))
        elif len(x.users) > 1:
            misses.append(Miss("'{}' is read by {} others too", x, 1, (x, len(x.users) - 1)))
        elif not all(same_sizes(value(x).shape, value(other).shape) for other in _operands(rows)):
            misses.append(Miss("'{}' is broadcast as it is added", x, 1, (x,)))
        else:
            return x
    return max(misses, key=lambda miss: miss.depth)


def _operands(rows: fx.Node) -> list[fx.Node]:
    """What is added, or the one thing that is quantized."""
    return [n for n in (rows.args[:2] if rows.target is ops.normalize_rows else rows.args[:1]) if isinstance(n, fx.Node)]


def _write(gm: fx.GraphModule, rows: fx.Node, product: fx.Node) -> None:
    residual = next((n for n in _operands(rows) if n is not product), None)
    quantized: Any = rows.args[1:] if rows.target is ops.quantize_rows else rows.args[6:8]
    way: Any = rows.args[2:6] if rows.target is ops.normalize_rows else ("none", None, None, 0.0)
    keep: Any = rows.args[8:] if rows.target is ops.normalize_rows else (False, False)
    norm, weight, bias, eps = way
    flags = (eps, *quantized, *keep)

    def fused(product: Any, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> list[Tensor]:
        return list(ops.linear_rows(*product, residual, norm, weight, bias, *flags))

    memo = ("fuse_products", norm, *flags)
    new = splice(gm, rows, fused, list(product.args), residual, weight, bias, memo=memo)
    for user in list(rows.users):
        user.replace_all_uses_with(new[user.args[1]])
        gm.graph.erase_node(user)
    erase(gm, rows)
    if not product._erased and not product.users:
        erase(gm, product)
