"""Every stage of a compilation as a Python file, if asked: ``FXQUANT_TRACE=dir``."""

import itertools
from pathlib import Path

from torch import fx

from .capture import Parameter
from .fuel import Fuel

_numbers = itertools.count()

_HEADER = '''"""{stage}: graph {graph}, {nodes} nodes{note}."""

import torch
from torch import device, inf, nan  # names that the printed graph uses

'''


class Stages:
    """Writes each stage that it is shown below ``folder``; does nothing if there is none."""

    def __init__(self, folder: str | None) -> None:
        self._folder = Path(folder, f"graph{next(_numbers)}") if folder else None
        self._count = itertools.count(1)

    def show(self, stage: str, gm: fx.GraphModule, note: str = "") -> None:
        """Write ``gm`` as ``NN_stage.py``; ``note`` ends its first line."""
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        gm.recompile()
        note = f"; {note}" if note else ""
        header = _HEADER.format(stage=stage, graph=self._folder.name, nodes=len(gm.graph.nodes), note=note)
        named = [(n, p) for n in gm.graph.find_nodes(op="placeholder") if (p := Parameter.of(n)) is not None]
        header += "".join(f"# {node.name}: {parameter.path}\n" for node, parameter in named) + "\n"
        path = self._folder / f"{next(self._count):02d}_{stage}.py"
        path.write_text(header + gm.code.lstrip())

    def tell(self, fuel: Fuel) -> None:
        """Write which rewrites happened, numbered as ``FXQUANT_FUEL`` counts them."""
        if self._folder is not None:
            lines = [f"{number} {name}\n" for number, name in enumerate(fuel.log, 1)]
            (self._folder / "rewrites.txt").write_text("".join(lines))
