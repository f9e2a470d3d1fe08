"""Compile the C++ kernels of this folder at first use, and keep the result in the user's cache.

At first use rather than at install: the wheel stays one pure-Python file for every platform, and neither it nor an sdist needs
a compiler to be installed. It takes seconds, once per machine, beside the graph passes and Inductor's own compiler: until the
library is there a trial of the compiler answers whether it will be (``why_not``). Without a compiler, or on a CPU without
AVX2, the kernels that are written in PyTorch run instead, and ``explain`` says why. What AVX512-VNNI, AVX512-BF16 or AMX is for
is compiled where the CPU has it, and used unless ``FXQUANT_CPU_ISA`` names a lesser instruction set. Safe for parallel
processes: a library appears by an atomic rename. Only g++ by default: what clang writes for OpenMP needs a runtime that
PyTorch has not loaded. The library registers the ops of ops.py for CPU tensors, through PyTorch's stable interface, whose
headers come with PyTorch.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch

from fxquant.errors import FxquantError

from .features import has_amx, has_avx2, has_avx512, has_bf16, has_vnni

FOLDER = Path(__file__).parent
TORCH = Path(torch.__file__).parent
HEADERS = (
    "simd.h", "avx2.h", "avx512.h", "activation.h", "linear.h", "low_bit.h", "memory.h", "rows.h", "runs.h",
    "attention.h", "softmax.h", "tiles.h", "transpose.h",
)  # fmt: skip
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=off")
AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mno-avx512f")  # the last for a CXX of "g++ -march=native"
AVX512_VNNI = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma", "-mf16c")
BF16 = (*AVX512_VNNI, "-mavx512bf16", "-DWITH_BF16")
AMX = (*AVX512_VNNI, "-mamx-tile", "-mamx-int8", "-mamx-bf16", "-mavx512bf16", "-DWITH_AMX")
PLAIN = ("int8.cpp", "low_bit.cpp", "rows.cpp", "activation.cpp", "attention.cpp", "attention_few.cpp", "attend.cpp")
OPS = ("-O1", "-isystem", str(TORCH / "include"))
LINK = (f"-L{TORCH / 'lib'}", "-ltorch_cpu")  # which is loaded already
# Of each instruction set: what is compiled, and how. In the order of InstructionSet in simd.h: the best is the last.
SOURCES: dict[str, dict[str, tuple[str, ...]]] = {
    "avx2": {**dict.fromkeys((*PLAIN, "int8_avx2.cpp"), AVX2), "ops.cpp": (*AVX2, *OPS)},
    "vnni": {**dict.fromkeys(PLAIN, AVX512_VNNI), "ops.cpp": (*AVX512_VNNI, *OPS)},
    "bf16": {
        **dict.fromkeys(PLAIN, AVX512_VNNI),
        **dict.fromkeys(("attention.cpp", "attention_bf16.cpp"), BF16),
        "ops.cpp": (*AVX512_VNNI, *OPS),
    },
    "amx": {
        **dict.fromkeys(PLAIN, AVX512_VNNI),
        **dict.fromkeys(("int8.cpp", "low_bit.cpp", "attention.cpp", "int8_amx.cpp", "attention_amx.cpp"), AMX),
        "ops.cpp": (*AVX512_VNNI, *OPS),
    },
}
UNITS = {"avx2": "AVX2", "vnni": "VNNI", "bf16": "VNNI", "amx": "AMX"}


class CannotBuild(Exception):
    """There is no library, for the reason in the message."""


_begun: Future[tuple[str, tuple[str, ...]]] | None = None
_beginning = threading.Lock()


def begin() -> Future[tuple[str, tuple[str, ...]]]:
    """Compile the kernels, in a thread of their own, or load what was compiled before; once per process.

    The instruction set that they use, of SOURCES, and what is to be said about better ones; or CannotBuild.
    """
    global _begun
    with _beginning:
        if _begun is None:
            wanted, found = _wanted(), Future[tuple[str, tuple[str, ...]]]()

            def build() -> None:
                try:
                    found.set_result(_best(wanted))
                except BaseException as error:
                    found.set_exception(error)

            if _is_there(wanted[-1]):
                build()
            else:
                threading.Thread(target=build, name="fxquant: compiling C++ kernels").start()
            _begun = found
        return _begun


def _begin_anew() -> None:
    """In a forked process the thread that was to compile is not there."""
    global _begun, _beginning
    _beginning = threading.Lock()
    if _begun is not None and not _begun.done():
        _begun = None


if hasattr(os, "register_at_fork"):  # where there is fork
    os.register_at_fork(after_in_child=_begin_anew)


def _wanted() -> list[str]:
    """The instruction sets that this CPU has and ``FXQUANT_CPU_ISA`` allows, the best last."""
    wanted, known = os.environ.get("FXQUANT_CPU_ISA", ""), list(SOURCES)
    if wanted not in ("", *known):
        raise FxquantError(
            f"FXQUANT_CPU_ISA is {wanted!r}; one of {', '.join(SOURCES)} is needed, or nothing for the best there is"
        )
    vnni = has_vnni() and has_avx512()  # which all that is better needs too
    has = {"avx2": True, "vnni": vnni, "bf16": vnni and has_bf16(), "amx": vnni and has_amx()}
    return [name for name in known if has[name] and (not wanted or known.index(name) <= known.index(wanted))]


def _best(there: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    known, failed = list(SOURCES), list[str]()
    for name in reversed(there):
        try:
            found = _library(name)
        except CannotBuild as error:  # a compiler that is too old for what the CPU has, perhaps
            if name == known[0]:
                raise
            failed.append(f"{name.upper()} is not used, though this CPU has it: {error}")
            continue
        if name != "amx" or found.amx_permission() == 0:
            break
    found.use_isa(known.index(name))
    found.register_ops()
    return name, tuple(failed)


@lru_cache(1)
def isa() -> str:
    """The instruction set that the kernels use, of SOURCES, once they are there. Raises CannotBuild if there are none."""
    name, failed = begin().result()
    for sentence in failed:
        warnings.warn(sentence, stacklevel=2)
    return name


def unit() -> str:
    """What multiplies integers, of UNITS; while the kernels are compiled, what it will be if the compiler knows it."""
    begin()
    try:
        return UNITS[_wanted()[-1] if running() else isa()]
    except CannotBuild:
        return next(iter(UNITS.values()))


def library() -> ctypes.CDLL:
    """The compiled kernels, of which the ops are made. Raises CannotBuild without a compiler, or if it fails."""
    return _library(isa())


@contextmanager
def using(instructions: str) -> Iterator[None]:
    """The ops on ``instructions``, "vnni" or what the library is for, in all threads. Raises ValueError for others."""
    if instructions != isa() and (instructions != "vnni" or isa() == "avx2"):
        raise ValueError(f"the kernels here are for {isa()}, not for {instructions}")
    before = library().use_isa(list(SOURCES).index(instructions))
    try:
        yield
    finally:
        library().use_isa(before)


@lru_cache(len(SOURCES))
def _library(isa: str) -> ctypes.CDLL:
    path, compiler = _place(isa)
    if os.path.exists(path):
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # damaged, by a full disk perhaps: it is replaced
            pass
    doing = "kept"
    try:
        _compile(compiler, SOURCES[isa], path)
        doing = "loaded"
        return ctypes.CDLL(str(path))
    except OSError as error:
        what = f"the compiled kernels cannot be {doing} in {path.parent}: {error}"
        raise CannotBuild(f"{what}; set FXQUANT_CACHE to a folder for files that may be written and executed") from None


@lru_cache(len(SOURCES))
def _place(isa: str) -> tuple[Path, list[str]]:
    """Where the library lies, or will, and the compiler's command. Raises CannotBuild if there can be none."""
    if not has_avx2():
        raise CannotBuild("this CPU has no AVX2")
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if not compiler:
        raise CannotBuild("there is no C++ compiler: install g++, or set CXX")
    text = b"".join((FOLDER / name).read_bytes() for name in (*SOURCES[isa], *HEADERS))
    made_by = f"{compiler} {FLAGS} {SOURCES[isa]} {_version(compiler)} {torch.__version__}"
    name = hashlib.sha256(text + made_by.encode()).hexdigest()[:24]
    return cache_folder() / f"cpu-{isa}-{name}.so", compiler.split()


def _is_there(isa: str) -> bool:
    """Nothing has to be compiled: there is a library, or there can be none."""
    try:
        return os.path.exists(_place(isa)[0])  # False, too, in a folder that must not be looked into
    except CannotBuild:
        return True


def running() -> bool:
    """Whether the kernels are being compiled, so that what ``why_not`` says is not the last word."""
    return _begun is not None and not _begun.done()


def why_not(wait: bool = False) -> str:
    """Why there is no library, or an empty string if there is one.

    While it is compiled a trial of the compiler answers, unless ``wait``.
    """
    if not begin().done() and not wait:
        return _trial()
    try:
        library()
    except CannotBuild as error:
        return str(error)
    return ""


@lru_cache(1)
def _trial() -> str:
    """Why the compiler does not take the least that the kernels need, or an empty string if it does."""
    try:
        _, compiler = _place(next(iter(SOURCES)))
        includes = "#include <immintrin.h>\n#include <omp.h>\n"
        _run([*compiler, *FLAGS, *AVX2, "-fsyntax-only", "-x", "c++", "-"], includes)
    except CannotBuild as error:
        return str(error)
    return ""


def cache_folder() -> Path:
    """``$FXQUANT_CACHE``, or ``fxquant`` below the user's cache folder."""
    if given := os.environ.get("FXQUANT_CACHE"):
        return Path(given)
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given, "fxquant")
    try:
        return Path.home() / ".cache" / "fxquant"
    except RuntimeError:  # a user without a home, as in a container
        raise CannotBuild("this user has no home folder; set FXQUANT_CACHE to a folder for the compiled kernels") from None


def _compile(compiler: list[str], sources: dict[str, tuple[str, ...]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder, "kernels.so")
        longest_first = sorted(sources, key=lambda name: -(FOLDER / name).stat().st_size)
        objects = [f"{folder}/{name}.o" for name in longest_first]
        compile = [
            [*compiler, *FLAGS, *sources[name], "-c", str(FOLDER / name), "-o", out]
            for name, out in zip(longest_first, objects, strict=True)
        ]
        # Compiled with OpenMP and linked without it: its symbols are those of the runtime that PyTorch has loaded.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, compile))
        _run([*compiler, "-shared", *objects, *LINK, "-o", str(built)])
        built.rename(path)


def _run(step: list[str], text: str | None = None) -> None:
    done = subprocess.run(step, input=text, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        first = next((line for line in said if "error" in line), said[-1])
        raise CannotBuild(f"{step[0]} failed: {first}; set CXX to a C++17 compiler with OpenMP")


def _version(compiler: str) -> str:
    try:
        return subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
    except OSError as error:
        raise CannotBuild(f"the compiler {compiler!r} cannot be run: {error}") from None
