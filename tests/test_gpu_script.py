"""benchmarks/gpu.py rehearsed where there is no GPU, so that its first minutes on one are not spent on a slip in the script.

Checks run on a CPU, where every op is its plain meaning, and must find it exact; timings run on fake tensors, on which every
shape, dtype and device is as on a GPU, and nothing is computed. What only a GPU can do is left out: launching, and the clock.
"""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"
LAUNCHES = "check_persistent"  # by hand: there is no plain meaning to run


@pytest.fixture
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    yield module
    torch._dynamo.reset()


class OnCPU(TorchFunctionMode):
    """What is asked for on a GPU is made on the CPU."""

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return function(*args, **kwargs | ({"device": "cpu"} if kwargs.get("device") == "cuda" else {}))


def sections(kind: str) -> list[str]:
    text = SCRIPT.read_text()
    return [line.split("(")[0][4:] for line in text.splitlines() if line.startswith(f"def {kind}_")]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in sections("check") if name != LAUNCHES])
def test_a_check_finds_the_plain_meaning_right(script: ModuleType, name: str) -> None:
    with OnCPU():
        lines = getattr(script, name)()
    assert len(lines) > 2
    assert all(line["integers exact"] in (True, None) for line in lines)
    errors = [line.get("error", line.get("norm error")) for line in lines]
    errors += [error for line in lines for error in line.get("errors", {}).values()]
    assert max(error for error in errors if error is not None) < 2 * 2.0**-8  # two roundings to bfloat16


@pytest.mark.slow
def test_a_check_notices_a_wrong_integer(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right = script.gemm.a8_gemm

    def wrong(*args: Any, **more: Any) -> torch.Tensor:
        y = right(*args, **more)
        return y + (torch.arange(y.numel()).view(y.shape) == 0)

    monkeypatch.setattr(script.gemm, "a8_gemm", wrong)
    with OnCPU():
        assert not any(line["integers exact"] for line in script.check_a8())


@pytest.mark.parametrize("name", sections("time"))
def test_a_timing_runs_to_its_end(script: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    asked: list[int] = []

    def microseconds(make: Callable[[], Callable[[], Any]], bytes_read: int) -> float:
        make()()
        asked.append(bytes_read)
        return 2.0

    monkeypatch.setattr(script, "microseconds", microseconds)
    monkeypatch.setattr(script.tune, "microseconds", lambda problem, choice, on: 2.0)
    monkeypatch.setattr(torch, "compile", lambda f, **how: f)
    with FakeTensorMode():
        lines = getattr(script, name)()
    assert len(lines) > 5 and not any("failed" in line for line in lines)
    assert all(size > 0 for size in asked)
    ratios = [line["ratio"] for line in lines if "ratio" in line]
    assert all(ratio == 1.0 for ratio in ratios)


def test_all_sections_are_run(script: ModuleType) -> None:
    assert {section.__name__ for section in script.SECTIONS} == {*sections("check"), *sections("time")}
