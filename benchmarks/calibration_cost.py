"""What does calibrating cost? Seconds, and peak memory against one float forward pass: MiniLM on 256 samples, fresh processes.

    python benchmarks/calibration_cost.py --preset OS-W6A6          # needs ../shared/assets for the texts of SST-2

Peak memory is the ru_maxrss of a process that loads the model and does nothing but calibrate, or run one batch of 32 in
floating point. At 128 tokens every sample is a film review cut to 128, so nothing is padding.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measure import heading, progress, table, write

LENGTHS = ("SST-2", "128 tokens")
SAMPLES, BATCH = 256, 32


def batches(lengths: str) -> list[Any]:
    """256 samples in batches of 32: phrases of SST-2 padded to the longest of a batch, or reviews of 128 tokens."""
    if lengths == "SST-2":
        from tasks import TASKS

        return TASKS["sst2"].calibration(0, SAMPLES)
    from minilm import encoder, reviews, tokenize

    whole = tokenize(encoder()[1], reviews(SAMPLES), 128)
    return [{name: column[i : i + BATCH] for name, column in whole.items()} for i in range(0, SAMPLES, BATCH)]


def cost(lengths: str, preset: str) -> dict[str, float]:
    """Seconds by the clock and of all processors, and peak memory: of calibrating (no preset: of one batch in float)."""
    import torch
    from minilm import encoder

    import fxquant

    model, data = encoder()[0], batches(lengths)
    start, used = time.perf_counter(), time.process_time()
    if preset:
        fxquant.calibrate(model, data, preset, progress=False)
    else:
        with torch.no_grad():
            model(**max(data, key=lambda batch: batch["input_ids"].shape[1]))
    seconds = time.perf_counter() - start
    used = time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "processor seconds": used, "peak [MB]": peak}


def in_fresh_process(lengths: str, preset: str) -> dict[str, float]:
    """``cost`` in a new Python, whose memory is its own."""
    command = [sys.executable, __file__, "--side", lengths, "--preset", preset]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{lengths}, {preset or 'float'} failed:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="OS-W6A6")
    parser.add_argument("--lengths", action="append", choices=LENGTHS, help="default: both")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=LENGTHS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(cost(args.side, args.preset)))
        return

    results: dict[str, Any] = {}
    for lengths in progress(args.lengths or LENGTHS, "calibrating"):
        float_pass, ours = in_fresh_process(lengths, ""), in_fresh_process(lengths, args.preset)
        results[lengths] = {"float": float_pass, args.preset: ours, "memory": ours["peak [MB]"] / float_pass["peak [MB]"]}
    rows: list[tuple[object, ...]] = [("samples of", "calibration", "of processors", "peak memory", "of a float pass", "ratio")]
    for lengths, found in results.items():
        ours, plain = found[args.preset], found["float"]
        peaks = (f"{side['peak [MB]']:.0f} MB" for side in (ours, plain))
        times = (f"{ours[name]:.0f} s" for name in ("seconds", "processor seconds"))
        rows.append((lengths, *times, *peaks, f"{found['memory']:.2f}"))
    print(f"MiniLM-L6, {SAMPLES} samples, {args.preset}\n{heading()}\n\n{table(rows)}")
    write("calibration_cost", results, args.json)


if __name__ == "__main__":
    main()
