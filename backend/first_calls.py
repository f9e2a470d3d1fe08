"""Calibration on the first calls: ``options={"calibration_steps": n}`` runs the float graph n times, then the quantized one."""

import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.graph.capture import Parameter
from fxquant.graph.fuel import Fuel
from fxquant.graph.rewrite import copy_of
from fxquant.graph.tidy import value
from fxquant.patterns.canonical import canonicalize

from .calibration import MASKS, Graph, Output, Runner, Session, find_plan
from .settings import Settings


class FirstCalls:
    """Stands for one of Dynamo's graphs: calibrates on its own first calls, whose arguments it keeps, then switches."""

    def __init__(self, captured: fx.GraphModule, settings: Settings, finish: Callable[[Settings], Callable[..., Any]]) -> None:
        self._settings, self._finish = settings, finish
        self._session = Session(settings.recipe)
        self._graph = Graph(canonicalize(copy_of(captured), Fuel()))
        inputs = self._graph.gm.graph.find_nodes(op="placeholder")
        self._data = [i for i, node in enumerate(inputs) if Parameter.of(node) is None]
        self._masks = {i: name for i in self._data for name in MASKS if name in str(inputs[i].meta.get("dynamo_name", ""))}
        self._calls: list[tuple[Any, ...]] = []
        self._quantized: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        if self._quantized is not None:
            return self._quantized(*args)
        kept = {i: args[i].clone() if isinstance(args[i], Tensor) else args[i] for i in self._data}
        self._calls.append(tuple(kept.get(i, a) for i, a in enumerate(args)))
        with torch.no_grad():
            result = self._session.run(self._graph, args)
            if len(self._calls) >= self._settings.calibration_steps:
                self._switch()
        return result

    def _switch(self) -> None:
        runner = _Replay(self._session, self._graph, self._calls, self._masks)
        plan = find_plan(runner, self._settings.recipe, lambda items, title: items, seed=0)
        settings = replace(self._settings, plan=plan, calibration_steps=0)
        if any(isinstance(value(n), torch.SymInt) for n in self._graph.gm.graph.find_nodes(op="placeholder")):
            # Dynamo has installed its guards long ago: what Inductor takes for granted of the sizes would not be checked.
            warnings.warn(
                "a graph with dynamic sizes that was calibrated on its first calls runs without Inductor; for speed give "
                "fxquant.calibrate() the same data, and its plan to the compilation",
                stacklevel=2,
            )
            settings = replace(settings, inductor=False)
        self._quantized = self._finish(settings)
        self._calls.clear()


class _Replay(Runner):
    """Runs the calls that one graph has seen."""

    def __init__(self, session: Session, graph: Graph, calls: Sequence[tuple[Any, ...]], masks: dict[int, str]) -> None:
        self.session, self._graph, self._calls, self._of = session, graph, calls, masks

    @property
    def parts(self) -> int:
        return len(self._calls)

    def divisible(self, most: int) -> int:
        return 1  # the graph is of the sizes that it was captured for

    def run(
        self, title: str, parts: int | None = None, gradients: bool = False, pieces: int = 1
    ) -> Generator[Output, None, None]:
        with torch.set_grad_enabled(gradients):
            for args in self._calls[:parts]:
                self.session.masks = {name: args[i] for i, name in self._of.items() if args[i].ndim == 2}
                yield self.session.run(self._graph, args), self.session.masks
