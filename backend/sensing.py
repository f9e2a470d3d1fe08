"""Ranges by what the output makes of them: of every static edge some values, and how steeply the output depends on each.

Between Outlier Suppression's two stages: the coarse one gives all sites one ratio, judged by the output; here each site gets
a range of its own, judged by the output as well, to first order (numerics/weighted.py). One pass forward and back through the
model in floating point replaces a search that would run the model once per site and candidate.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxquant.graph.fuel import Fuel
from fxquant.graph.observe import mask_for, tokens
from fxquant.numerics.affine import IntAffine
from fxquant.numerics.granularity import PerTensor
from fxquant.numerics.weighted import least_weighted
from fxquant.patterns.annotate import annotate
from fxquant.patterns.edges import Edge, insert
from fxquant.patterns.transforms import equalize

from .calibration import Maps, Runner, Session, Stage, compared, reads_decoder

VALUES = 1 << 17  # that are kept of a site, and their weights
PIECES = 12  # of a batch, one after another where that changes nothing: autograd keeps every activation of what it runs


class _Sensed(nn.Module):
    """The identity; what passes is put into ``met``, and gradients reach it."""

    def __init__(self, key: str, met: list[tuple[str, Tensor]]) -> None:
        super().__init__()
        self._key, self._met = key, met

    def forward(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            x = x.detach().requires_grad_().view_as(x)
        self._met.append((self._key, x))
        return x


class _Kept:
    """Rows of values [n, C] and their weights, in room for ``count`` rows at a time.

    What is kept of a pass lies where what was kept before does: between the tensors of a pass, which come and go, many small
    ones would hold the holes open.
    """

    def __init__(self, count: int) -> None:
        self._count, self._used = count, count
        self._rooms: list[Tensor] = []

    def add(self, x: Tensor, weights: Tensor) -> None:
        rows = torch.stack([x, weights])
        while rows.shape[1] or not self._rooms:
            if self._used == self._count:
                self._rooms.append(rows.new_empty(2, self._count, rows.shape[2]))
                self._used = 0
            fits, rows = rows[:, : self._count - self._used], rows[:, self._count - self._used :]
            self._rooms[-1][:, self._used : self._used + fits.shape[1]] = fits
            self._used += fits.shape[1]

    def all(self) -> tuple[Tensor, Tensor]:
        """[C, n] each, contiguous."""
        x, weights = torch.cat([*self._rooms[:-1], self._rooms[-1][:, : self._used]], 1)
        return x.T.contiguous(), weights.T.contiguous()


class SensingStage(Stage):
    """The transformed graphs in floating point, the values of some edges held for a pass back."""

    def __init__(self, session: Session, maps: Maps, edges: Mapping[str, Edge]) -> None:
        self._session, self._maps, self._edges = session, maps, edges
        self._met: list[tuple[str, Tensor]] = []
        self._decoder: dict[str, bool] = {}
        self._kept: dict[str, _Kept] = {}

    def build(self, gm: fx.GraphModule, args: Sequence[Any]) -> Callable[..., Any]:
        recipe = self._session.recipe
        equalize(gm, recipe.transforms, Fuel(), **self._maps)

        def write(x: fx.Node, edge: Edge) -> fx.Node:
            self._decoder.setdefault(edge.key, reads_decoder(edge.value))
            name = f"sensed_{len(self._decoder)}_{x.name}"
            gm.add_module(name, _Sensed(edge.key, self._met))
            return gm.graph.call_module(name, (x,))

        insert(gm, [edge for edge in annotate(gm, recipe, Fuel()).edges if edge.key in self._edges], write)
        run = self._session.runnable(gm, args)  # of parameters no slope is wanted, and nothing is kept for it
        return lambda *args: run(*(a.detach() if isinstance(a, Tensor) else a for a in args))

    def take(self, output: Tensor, share: int, generator: torch.Generator) -> None:
        """Go back from what was compared of one call, and keep ``share`` values of every edge with their weights.

        The output is summed up with random signs: squares of its slopes have the sum over all outputs as their mean.
        """
        signs = torch.randint(0, 2, output.shape, generator=generator).mul_(2).sub_(1).to(output)
        met = list(self._met)
        self._met.clear()  # in any case: what one call met is nothing to the next
        if not met or not output.requires_grad:
            return
        slopes = torch.autograd.grad(output, [x for _, x in met], signs, allow_unused=True)
        for (key, x), slope in zip(met, slopes, strict=True):
            if slope is not None:
                self._keep(key, x.detach(), slope, share, generator)

    def _keep(self, key: str, x: Tensor, slope: Tensor, share: int, generator: torch.Generator) -> None:
        whole, mask = self._whole(key), mask_for(self._session.masks, self._decoder[key])
        x, slope = (tokens(t, mask, merge_heads=whole) for t in (x, slope))
        if whole:
            x, slope = x.reshape(-1, 1), slope.reshape(-1, 1)
        some = torch.randint(0, len(x), (max(1, share // x.shape[1]),), generator=generator).to(x.device) if len(x) else ...
        kept = self._kept.setdefault(key, _Kept(max(1, VALUES // x.shape[1])))
        kept.add(x[some].float(), slope[some].float().square_())

    def _whole(self, key: str) -> bool:
        return isinstance(self._edges[key].spec.granularity, PerTensor)

    def ranges(self, start: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
        """The range of least weighted error of every edge, not above that of ``start``."""
        found = {}
        for key in list(self._kept):
            x, weights = self._kept.pop(key).all()
            lo, hi = start[key]
            form = self._edges[key].spec.format
            assert isinstance(form, IntAffine)
            if x.numel():
                ends = least_weighted(x, weights, lo.to(x.device).reshape(-1), hi.to(x.device).reshape(-1), form)
                lo, hi = (end.cpu().reshape(lo.shape) for end in ends)
            found[key] = lo, hi
        return found


def sensed(
    runner: Runner,
    maps: Maps,
    edges: Mapping[str, Edge],
    start: Mapping[str, tuple[Tensor, Tensor]],
    seed: int,
    pieces: int,
) -> dict[str, tuple[Tensor, Tensor]]:
    """The range of each of ``edges``, by its effect on the output of all data, a piece of a batch at a time, to first order."""
    stage = SensingStage(runner.session, maps, edges)
    runner.session.enter(stage)
    generator, share = torch.Generator().manual_seed(seed), -(-VALUES // (runner.parts * pieces))
    for output in runner.run("what the output depends on", gradients=True, pieces=pieces):
        stage.take(compared(*output), share, generator)
    return stage.ranges(start)
