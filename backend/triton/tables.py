"""Choices that were timed: a JSON table for each GPU, the user's before one that comes with the package.

``{"gpu": ..., "choices": {"W4A8, groups of 128, slices of 128, 16 x 4096 x 4096": {"tile": {"bm": 16, ...}, "parts": 4}}}``

The name of a file has a hash of the kernels' texts and of Triton's version: what other kernels were timed for is not found. The
user's table lies in the cache folder of ``cpu/build.py`` and is written by ``fxquant.warmup(model, data, tune=True)``; a copy
of it in this folder would ship with the package. None does yet: nothing has been timed on any GPU.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..cpu.build import CannotBuild, cache_folder
from .gpus import KNOWN, Device
from .language import INSTALLED, triton
from .tile import Choice, Problem, Tile, candidates

FOLDER = Path(__file__).parent
TEXTS = ("source.py", "gemv.py", "codes.py", "program.py", "gemm.py", "attention.py", "tile.py")
"""What decides how long a kernel takes."""


@lru_cache(1)
def version() -> str:
    """A hash of the kernels' texts and of the version of Triton."""
    texts = b"".join((FOLDER / name).read_bytes() for name in TEXTS)
    return sha256(texts + (triton.__version__ if INSTALLED else "none").encode()).hexdigest()[:12]


def file_name(on: Device) -> str:
    """``tiles-nvidia-h200-0123456789ab.json``."""
    return f"tiles-{re.sub('[^a-z0-9]+', '-', on.name.lower()).strip('-')}-{version()}.json"


def user_file(on: Device) -> Path | None:
    """The user's table for the device ``on``, there or not; None for a user without a cache folder."""
    try:
        return cache_folder() / file_name(on)
    except CannotBuild:
        return None


def look_up(problem: Problem, on: Device) -> Choice | None:
    """What was timed to be the fastest for ``problem``; None if it was not, or if what is written is not to be had."""
    for path in (user_file(on), FOLDER / file_name(on)):
        if path is None:
            continue
        found = _read(path, _stamp(path)).get(str(problem))
        if found is not None:
            wanted = _choice(found)
            if choice := next((c for c in candidates(problem, on) if c == wanted), None):
                return choice
            _warn(path, f"it has {found!r} for {problem}, which is no tile that the kernel may run with")
    return None


def keep(timed: Mapping[Problem, tuple[Choice, float]], on: Device) -> Path | None:
    """Add what was timed (a choice and its microseconds) to the user's table; None where there is no folder for it.

    Other processes may do so at the same time: each waits for the others, and a reader sees the old file or the new one.
    """
    path = user_file(on)
    if path is None:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path.with_suffix(".lock")):
        choices = dict(_read(path, _stamp(path)))
        for problem, (choice, microseconds) in timed.items():
            choices[str(problem)] = {"tile": asdict(choice.tile), "parts": choice.parts, "microseconds": round(microseconds, 2)}
        text = json.dumps({"gpu": on.name, "choices": dict(sorted(choices.items()))}, indent=1)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text + "\n")
            os.replace(name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
    return path


def state() -> str:
    """A hash of all that the ops of this folder trace to: its sources, Triton's version, and the tables that there are."""
    folders = {path.parent for path in (user_file(KNOWN[0]), FOLDER / file_name(KNOWN[0])) if path}
    found = sorted(str((p.name, _stamp(p))) for folder in folders for p in folder.glob(f"tiles-*-{version()}.json"))
    return sha256("\n".join([_sources(), version(), *found]).encode()).hexdigest()[:12]


@lru_cache(1)
def _sources() -> str:
    return sha256(b"".join(path.read_bytes() for path in sorted(FOLDER.glob("*.py")))).hexdigest()


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """While no other process is here; where files cannot be locked, whoever writes last wins."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _stamp(path: Path | None) -> tuple[int, int] | None:
    try:
        found = os.stat(path) if path else None
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_ino) if found else None


@lru_cache(64)
def _read(path: Path, stamp: tuple[int, int] | None) -> dict[str, Any]:
    """The choices of the table ``path`` as it was at ``stamp``: none without a file, or in one that is damaged."""
    if stamp is None:
        return {}
    try:
        choices = json.loads(path.read_text(encoding="utf-8"))["choices"]
        if not isinstance(choices, dict):
            raise ValueError("its choices are no table")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        _warn(path, f"it cannot be read ({type(error).__name__}: {error})")
        return {}
    return choices


def _choice(found: Any) -> Choice | None:
    try:
        return Choice(Tile(**found["tile"]), found["parts"])
    except (KeyError, TypeError):
        return None


_warned: set[tuple[Path, tuple[int, int] | None]] = set()


def _warn(path: Path, what: str) -> None:
    """Once for each state of a file."""
    if (key := (path, _stamp(path))) not in _warned:
        _warned.add(key)
        warnings.warn(
            f"the table of tiles {path} is ignored where it is wrong: {what}; delete it, or tune again "
            "(fxquant.warmup(model, data, tune=True))",
            stacklevel=3,
        )
