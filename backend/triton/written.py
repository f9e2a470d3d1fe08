"""The generated kernels of one lowered graph: which sites each computes, for which problem, and its text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxquant.graph.spelling import FAMILIES
from fxquant.graph.tidy import value

from ..kernels.kernel import SITES
from . import row  # noqa: F401  (defines the ops)
from .fuse_epilogue import GEMMS, arguments
from .gemv import TOKENS
from .program import Program, kind_of, number_of
from .recording import Launch, launches, tile_of
from .tile import GUARDED, MOST, bucket

ops = torch.ops.fxquant
ROWS = (ops.quantize_rows.default, ops.layer_norm_quantize.default, ops.rms_norm_quantize.default)


def written(gm: fx.GraphModule, paths: Mapping[str, str]) -> tuple[KernelCall, ...]:
    """The kernels of ``gm``, lowered and not yet folded, in its order; ``paths``: the weight's name of each site's key."""
    sites: dict[fx.Node, list[str]] = {}
    for node in [node for node in gm.graph.nodes if node.target in GEMMS and value(node).device.type == "cuda"]:
        read = [paths[key] for key in node.meta.get(SITES, ()) if key in paths]
        source = _source(arguments(node).get("q"))
        for kernel in (source, node) if source is not None else (node,):
            sites.setdefault(kernel, []).extend(read)
    return tuple(KernelCall(node, tuple(dict.fromkeys(sites[node]))) for node in gm.graph.nodes if node in sites)


def _source(node: Any) -> fx.Node | None:
    """The row kernel that made ``node``, if one did."""
    while isinstance(node, fx.Node) and (
        FAMILIES.get(node.target) == "view" or getattr(node.target, "__name__", "") == "getitem"
    ):
        node = node.args[0]
    return node if isinstance(node, fx.Node) and node.target in ROWS else None


class KernelCall:
    """One call of an op as a graph has it: its target, and its arguments with fake tensors in the place of nodes.

    ``sites``: the names of the weights of the sites that it is for, as the graph knows them.
    """

    def __init__(self, node: fx.Node, sites: tuple[str, ...]) -> None:
        self.sites = sites
        self.target: Callable[..., Any] = node.target  # type: ignore[assignment]  # an op
        self.given = fx.map_arg(arguments(node), value)
        self.rows = self.given["q" if "q" in self.given else "x"].shape[0]
        self._texts: dict[int | None, tuple[tuple[str, str], ...]] = {}

    def texts(self, tokens: int | None = None) -> tuple[tuple[str, str], ...]:
        """A line that tells what a kernel is for, and its source, for each that is launched for so many rows."""
        if tokens not in self._texts:
            self._texts[tokens] = tuple((_title(asked), asked.kernel.src) for asked in self.launches(tokens))
        return self._texts[tokens]

    def launches(self, tokens: int | None) -> list[Launch]:
        """What it launches for ``tokens`` rows, or for those that the graph was compiled for."""
        M = tokens if tokens is not None else _example(self.rows)
        program = Program.parse(self.given.get("program", ""))
        tall = {number_of(name) for name in program.operands if kind_of(name) in ("full", "row")}

        def sized(name: str, x: Any, i: int = -1) -> Any:
            if not isinstance(x, Tensor):
                return x
            per_token = name in ("q", "x", "residual") or (name in ("scale_x", "zero_x") and x.dim()) or i in tall
            return torch.empty((M, *x.shape[1:]) if per_token else x.shape, dtype=x.dtype, device=x.device)

        def run() -> None:
            given = {
                name: [sized(name, t, i if name == "inputs" else -1) for i, t in enumerate(x)] if isinstance(x, list | tuple)
                else sized(name, x) for name, x in self.given.items()
            }  # fmt: skip
            self.target(**given)

        with FakeTensorMode(), torch.no_grad():
            return launches(run)


def _example(rows: Any) -> int:
    """A number that is treated as ``rows`` is; for a symbol, which divides by nothing, one less than its bucket's end."""
    if isinstance(rows, int):
        return rows
    hint = int(rows.node.hint)
    end = bucket(hint, GUARDED)
    return end if end in TOKENS else min(end, MOST) - 1


def _title(asked: Launch) -> str:
    kernel, warps = asked.kernel.__name__, f"{asked.warps} warps"
    if asked.problem is None or asked.on is None:
        x = asked.arguments["x"]
        facts = ", ".join(f"{name} = {asked.arguments[name]}" for name in ("NORM", "CENTERED", "SYMMETRIC", "ROWS", "BLOCK"))
        return f"{kernel}: {x.shape[0]} rows of {x.shape[1]}, {warps}; {facts}"
    return f"{kernel}: {asked.problem}, tile {tile_of(asked)}, {warps}, {asked.stages} stages, on {asked.on.name}"
