"""The generated kernels of one lowered graph: which sites each computes, for which problem, and its text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxquant.graph.spelling import FAMILIES
from fxquant.graph.tidy import value
from fxquant.patterns.linear import same_sizes

from ..kernels.kernel import SITES
from . import attention, row  # noqa: F401  (define the ops)
from .fuse_epilogue import GEMMS, arguments
from .gemv import TOKENS
from .program import Program, kind_of, number_of
from .recording import Launch, launches, tile_of
from .tile import GUARDED, MOST, bucket

aten, ops = torch.ops.aten, torch.ops.fxquant
ATTENTION = ops.int8_attention.default
FLOAT_PRODUCTS = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.bmm.default, aten.matmul.default)
ROWS = (ops.quantize_rows.default, ops.layer_norm_quantize.default, ops.rms_norm_quantize.default)


def written(gm: fx.GraphModule, paths: Mapping[str, str]) -> tuple[KernelCall, ...]:
    """The kernels of ``gm``, lowered and not yet folded, in its order; ``paths``: the weight's name of each site's key.

    A kernel of rows is for the sites that read its codes, attention for those that make its queries, keys and values.
    """
    sites: dict[fx.Node, list[str]] = {}
    on_gpu = [node for node in gm.graph.nodes if node.target in (*GEMMS, ATTENTION) and value(node).device.type == "cuda"]
    for node in on_gpu:
        makers = _makers(node) if node.target is ATTENTION else [node]
        read = [paths[key] for maker in makers for key in maker.meta.get(SITES, ()) if key in paths]
        source = None if node.target is ATTENTION else _source(arguments(node).get("q"))
        for kernel in (source, node) if source is not None else (node,):
            sites.setdefault(kernel, []).extend(read)
    return tuple(
        (AttentionCall if node.target is ATTENTION else KernelCall)(node, tuple(dict.fromkeys(sites[node])))
        for node in gm.graph.nodes
        if node in sites
    )


def _makers(attending: fx.Node) -> list[fx.Node]:
    """The products behind queries, keys and values; not those behind another product, of floats perhaps."""
    found, seen, ahead = list[fx.Node](), set[fx.Node](), [n for n in attending.args[:3] if isinstance(n, fx.Node)]
    while ahead:
        node = ahead.pop()
        if node in seen or node.target in FLOAT_PRODUCTS:
            continue
        seen.add(node)
        if node.target in (*GEMMS, ATTENTION):
            found.append(node)
        else:
            ahead += node.all_input_nodes
    return sorted(found)


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
        self._texts: dict[int | None, tuple[tuple[str, str], ...]] = {}

    def texts(self, tokens: int | None = None) -> tuple[tuple[str, str], ...]:
        """A line that tells what a kernel is for, and its source, for each that is launched for so many rows."""
        if tokens not in self._texts:
            self._texts[tokens] = tuple((_title(asked), asked.kernel.src) for asked in self.launches(tokens))
        return self._texts[tokens]

    def launches(self, tokens: int | None) -> list[Launch]:
        """What it launches for ``tokens`` rows, or for those that the graph was compiled for."""

        def run() -> None:
            self.target(**self.sized(tokens))

        with FakeTensorMode(), torch.no_grad():
            return launches(run)

    def sized(self, tokens: int | None) -> dict[str, Any]:
        """The arguments, with tensors of ``tokens`` rows in the fake mode that is active."""
        M = tokens if tokens is not None else _example(self.given["q" if "q" in self.given else "x"].shape[0])
        program = Program.parse(self.given.get("program", ""))
        tall = {number_of(name) for name in program.operands if kind_of(name) in ("full", "row")}

        def sized(name: str, x: Any, i: int = -1) -> Any:
            if not isinstance(x, Tensor):
                return x
            per_token = name in ("q", "x", "residual") or (name in ("scale_x", "zero_x") and x.dim()) or i in tall
            return torch.empty((M, *x.shape[1:]) if per_token else x.shape, dtype=x.dtype, device=x.device)

        return {
            name: [sized(name, t, i if name == "inputs" else -1) for i, t in enumerate(x)] if isinstance(x, list | tuple)
            else sized(name, x) for name, x in self.given.items()
        }  # fmt: skip


class AttentionCall(KernelCall):
    """A call of ``int8_attention``: ``tokens`` are those of one sequence, and keys are as many if they were."""

    def sized(self, tokens: int | None) -> dict[str, Any]:
        (batch, heads, queries, _), keys = self.given["q"].shape, self.given["k"].shape[2]
        B, L, T = batch if isinstance(batch, int) else int(batch.node.hint), _between(queries), _between(keys)
        if tokens is not None:
            B, L, T = 1, tokens, tokens if same_sizes((queries,), (keys,)) else T
        given, groups = dict(self.given), self.given["k"].shape[1]
        sizes = dict.fromkeys(("q", "scale_q"), (B, heads, L)) | dict.fromkeys(("k", "v", "scale_k"), (B, groups, T))
        for name, lead in sizes.items():
            x = given[name]
            given[name] = torch.empty((*lead, *x.shape[3:]) if x.dim() else (), dtype=x.dtype, device=x.device)
        if (mask := given["mask"]) is not None:
            whole = (B, heads, L, T)[4 - mask.dim() :]
            shape = [1 if isinstance(size, int) and size == 1 else all_ for size, all_ in zip(mask.shape, whole, strict=True)]
            given["mask"] = torch.empty(shape, dtype=mask.dtype, device=mask.device)
        return given


def _between(size: Any) -> int:
    """A size that is treated as ``size`` is: a symbol's hint, made odd, for no tile divides a symbol."""
    return size if isinstance(size, int) else int(size.node.hint) | 1


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
        if "heads" in asked.arguments:
            B, H, L, D = asked.arguments["q"].shape
            T, DV = (asked.arguments[name] for name in ("T", "DV"))
            return f"{kernel}: {B} x {H} heads, {L} queries and {T} keys of {D}, values of {DV}, tile {tile_of(asked)}, {warps}"
        x = asked.arguments["x"]
        facts = ", ".join(f"{name} = {asked.arguments[name]}" for name in ("NORM", "CENTERED", "SYMMETRIC", "ROWS", "BLOCK"))
        return f"{kernel}: {x.shape[0]} rows of {x.shape[1]}, {warps}; {facts}"
    return f"{kernel}: {asked.problem}, tile {tile_of(asked)}, {warps}, {asked.stages} stages, on {asked.on.name}"
