"""The products of a compiled model, timed on the GPU that it is on."""

from torch import nn

from fxquant.report import artifacts_of

from .calibration import Progress
from .triton.gpus import Device
from .triton.launch import untimed
from .triton.tile import Problem
from .triton.tune import tune
from .triton.written import KernelCall


def problems_of(model: nn.Module) -> dict[Problem, Device]:
    """What each product of the graphs that have run with ``model`` is, and the GPU that it is on."""
    calls = [call for artifact in artifacts_of(model) for call in artifact.written if isinstance(call, KernelCall)]
    asked = [launch for call in calls for launch in call.launches(None)]
    return {launch.problem: launch.on for launch in asked if launch.problem is not None and launch.on is not None}


def tune_model(model: nn.Module, progress: Progress) -> tuple[list[str], bool]:
    """Time what no table has yet: a line for each product that was, and whether one got another tile than it has."""
    lines, better = [], False
    for problem, on in progress(list(problems_of(model).items()), "timing tiles"):
        for found, (choice, microseconds) in tune([problem], on).items():
            first = untimed(found, on)
            better |= choice != first
            was = "as the model had it" if choice == first else "not what the model had"
            lines.append(f"{found}: {choice}, {microseconds:.1f} us, {was}")
    return lines, better
