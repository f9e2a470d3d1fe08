"""How every benchmark measures and tells: sides in turn, medians and spread, one table, JSON with versions and machine."""

import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent

SETTLED = 0.05  # seconds in which a side has the threads and the caches to itself


class Time(NamedTuple):
    """Seconds: the median of all rounds, the fastest and the slowest."""

    median: float
    fastest: float
    slowest: float

    def __str__(self) -> str:
        return f"{1e3 * self.median:.1f} ms ({1e3 * self.fastest:.1f} to {1e3 * self.slowest:.1f})"


def in_turn(
    sides: Mapping[str, Callable[[], Any]], rounds: int, title: str = "timing", before: Callable[[], Any] | None = None
) -> dict[str, Time]:
    """Time each side once per round, in alternating order, so that a slow minute of the machine hits all alike.

    Every side is called three times beforehand: the first call compiles. ``before`` precedes each call behind them, untimed.
    A side that takes less than ``SETTLED`` is called untimed for that long before it is timed: the worker threads of the side
    before it spin for some milliseconds, and its own have to wake up.
    """
    taken: dict[str, list[float]] = {name: [] for name in sides}

    def once(name: str) -> float:
        if before is not None:
            before()
        start = time.perf_counter()
        sides[name]()
        return time.perf_counter() - start

    with torch.no_grad():
        quick = set()
        for name, call in progress(sides.items(), f"{title}: warming up"):
            for _ in range(2):
                call()
            if once(name) < SETTLED:
                quick.add(name)
        for number in progress(range(rounds), title):
            for name in list(sides)[:: 1 if number % 2 else -1]:
                start = time.perf_counter()
                while name in quick and time.perf_counter() - start < SETTLED:
                    once(name)
                taken[name].append(once(name))
    return {name: Time(statistics.median(t), min(t), max(t)) for name, t in taken.items()}


class Flush:
    """Reads half a gigabyte, so that no cache holds what was there; ``bandwidth`` is the best in bytes per second so far."""

    def __init__(self) -> None:
        self.memory, self.bandwidth = torch.ones(2**27), 0.0

    def __call__(self) -> None:
        start = time.perf_counter()
        self.memory.sum()
        self.bandwidth = max(self.bandwidth, self.memory.nbytes / (time.perf_counter() - start))


def working_memory(call: Callable[[], Any]) -> int | None:
    """Bytes by which one call raises the resident memory of this process at its peak; None where Linux does not tell."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise OSError(f"/proc/self/status has no {key}")
    return 1024 * int(found[1])


def progress(items: Iterable[Any], title: str) -> Iterable[Any]:
    """A bar that shows itself only if the work takes longer than two seconds, and leaves nothing behind."""
    return tqdm(items, desc=title, delay=2, leave=False)


def table(rows: Sequence[Sequence[object]]) -> str:
    """Rows of cells as aligned text, the first row underlined.

    >>> print(table([("side", "ms"), ("ours", 12)]))
    side  ms
    --------
    ours  12
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def markdown_table(rows: Sequence[Sequence[object]]) -> str:
    """The same as a table of Markdown; the first row is the heading."""
    head, *body = (f"| {' | '.join(map(str, row))} |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, threads, versions."""
    names = ("fxquant", "torch", "transformers", "triton", "numpy")
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in names},
    }


def _processor() -> str:
    try:
        return next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def heading() -> str:
    """One line for the top of a table: on what, with which versions."""
    m = machine()
    return f"{m['processor']}, {m['threads']} threads, {m['capability']}; torch {m['torch']}, fxquant {m['fxquant']}"


def write(name: str, results: Any, path: Path | None = None) -> Path:
    """Write results, machine and versions as JSON to ``path``, by default build/benchmarks/<name>.json; returns the path."""
    path = path or ROOT / "build" / "benchmarks" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmark": name, "machine": machine(), "results": results}, indent=1, default=str) + "\n")
    print(f"\nwritten to {os.path.relpath(path)}")
    return path


def shared_assets() -> ModuleType | None:
    """The loaders of the shared folder of real models and data (``../shared/assets/load.py``), or None where it is not."""
    file = Path(os.environ.get("FXQUANT_ASSETS", ROOT.parent / "shared" / "assets")) / "load.py"
    if not file.exists():
        return None
    spec = importlib.util.spec_from_file_location("shared_assets", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
