"""How long does the first call take? compile and first call of ours against Inductor alone: fresh processes, cold caches.

    python benchmarks/compile_time.py --rounds 3
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import heading, progress, table, write

THERE = "outlierq, C++ there"  # the kernels have been compiled before, as on every day but the first
SIDES = ("inductor", "outlierq", THERE)


def first_call(backend: str) -> float:
    """Seconds from ``compile`` to the first output of MiniLM-L6, batch 8 x 64; called in a process of its own."""
    import torch
    from minilm import encoder, reviews, tokenize

    model, tokenizer = encoder()
    batch = tokenize(tokenizer, reviews(8), 64)
    with torch.no_grad():
        model(**batch)
        start = time.perf_counter()
        model.compile(backend=backend)
        model(**batch)
        return time.perf_counter() - start


def in_fresh_process(side: str, kernels: str) -> float:
    """``first_call`` in a new Python with empty caches, but for the folder ``kernels`` where the side says so."""
    with tempfile.TemporaryDirectory() as cache:
        cold = {
            "TORCHINDUCTOR_CACHE_DIR": cache,
            "TRITON_CACHE_DIR": f"{cache}/triton",
            "FXQUANT_CACHE": kernels if side == THERE else f"{cache}/fxquant",
            "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",
            "TORCHINDUCTOR_AUTOGRAD_CACHE": "0",
        }
        command = [sys.executable, __file__, "--side", side.partition(",")[0]]
        done = subprocess.run(command, env={**os.environ, **cold}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
        return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(first_call(args.side))
        return

    turns = [side for number in range(args.rounds) for side in (SIDES if number % 2 else SIDES[::-1])]
    taken: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as kernels:
        in_fresh_process(THERE, kernels)
        for side in progress(turns, "compiling"):
            taken[side].append(in_fresh_process(side, kernels))
    medians = {side: statistics.median(seconds) for side, seconds in taken.items()}
    ratio = medians["outlierq"] / medians["inductor"]
    rows: list[tuple[object, ...]] = [("backend", "median", "fastest", "slowest")]
    rows += [(side, f"{medians[side]:.1f} s", f"{min(s):.1f} s", f"{max(s):.1f} s") for side, s in taken.items()]
    print(f"compile and first call, MiniLM-L6, {args.rounds} cold processes each\n{heading()}\n\n{table(rows)}")
    print(f"\nratio {ratio:.2f}, and {medians[THERE] / medians['inductor']:.2f} with the C++ there")
    write("compile_time", {"seconds": taken, "ratio": ratio}, args.json)


if __name__ == "__main__":
    main()
