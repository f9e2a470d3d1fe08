"""Every stage of a compilation as a Python file, if asked: ``FXQUANT_TRACE=dir``."""

import itertools
from pathlib import Path

from torch import fx

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
        path = self._folder / f"{next(self._count):02d}_{stage}.py"
        path.write_text(header + gm.code.lstrip())
