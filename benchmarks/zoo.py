"""What becomes of every kind of transformer? coverage, closeness and misses on the tiny random models of tests/models.py.

    python benchmarks/zoo.py                      # all, which takes a while
    python benchmarks/zoo.py --kind vision --only bert --only gpt2
"""

import argparse
import collections
import math
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from measure import ROOT, heading, progress, table, write

sys.path.insert(0, str(ROOT / "tests"))
from models import ZOO, by_name, main_output


def examine(name: str, recipe: str, dressed: bool, eager: bool) -> dict[str, Any]:
    """Compile and run one architecture; its figures, or under "error" the last line of what went wrong."""
    import torch

    import fxquant

    warnings.simplefilter("ignore")
    row: dict[str, Any] = {"name": name, "kind": by_name(name).kind}
    start = time.perf_counter()
    try:
        torch._dynamo.reset()
        model, inputs = by_name(name).build(dressed=dressed)
        with torch.no_grad():
            wanted = main_output(model(**inputs))
            model.compile(backend="outlierq", options={"recipe": recipe, "inductor": False if eager else {}})
            got = main_output(model(**inputs))
        report = fxquant.explain(model)
        products = [site for site in report.sites if site.counted]
        skipped = [site for site in products if site.status != "quantized"]
        row |= {
            "graphs": report.graphs,
            "products": len(products),
            "skipped": len(skipped),
            "coverage": report.coverage,
            "sqnr": decibel(wanted, got),
            "misses": {site.name: site.reason for site in skipped},
            "silent": [site.name for site in skipped if not site.reason],
        }
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {last_line(error)}"
    return {**row, "seconds": time.perf_counter() - start}


def decibel(wanted: Any, got: Any) -> float:
    """Signal to noise of an output in dB; infinite if equal, not a number if either is not finite."""
    noise = (wanted.double() - got.double()).square().sum().item()
    power = wanted.double().square().sum().item()
    if math.isnan(noise) or math.isinf(noise):
        return math.nan
    return math.inf if noise == 0 else 10 * math.log10(power / noise)


def last_line(error: BaseException) -> str:
    """The line of an error that says what happened: torch wraps it in many."""
    cause = getattr(error, "inner_exception", None) or error.__cause__ or error
    lines = [line for line in str(cause).splitlines() if line.strip()]
    return lines[-1].strip() if lines and cause is error else (lines[0].strip() if lines else repr(cause))


def examine_all(names: list[str], recipe: str, dressed: bool, eager: bool) -> list[dict[str, Any]]:
    """``examine`` each in a worker process, so that even a crash of the interpreter costs one row."""
    rows = []
    pool = None
    for name in progress(names, "zoo"):
        pool = pool or ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        try:
            rows.append(pool.submit(examine, name, recipe, dressed, eager).result())
        except BrokenProcessPool:
            pool = None
            rows.append({"name": name, "kind": by_name(name).kind, "error": "the process died", "seconds": 0.0})
    if pool:
        pool.shutdown()
    return rows


def show(row: dict[str, Any], floor: float) -> tuple[object, ...]:
    """One row of the printed table."""
    if "error" in row:
        return (row["name"], row["kind"], "", "", "", "", f"{row['seconds']:.1f}", f"FAILED {row['error']}"[:110])
    reasons = collections.Counter(row["misses"].values())
    remark = "; ".join(f"{count}x {reason or 'NO REASON'}" for reason, count in reasons.items())[:110]
    low = "" if row["sqnr"] >= floor else " LOW"
    quantized = f"{row['products'] - row['skipped']}/{row['products']}"
    cells = (row["graphs"], quantized, f"{100 * row['coverage']:.1f}%", f"{row['sqnr']:.1f}{low}", f"{row['seconds']:.1f}")
    return (row["name"], row["kind"], *cells, remark)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="an architecture; may be given several times")
    parser.add_argument("--kind", action="append", help="encoder, decoder, vision, ...; may be given several times")
    parser.add_argument("--recipe", default="W8A8")
    parser.add_argument("--eager", action="store_true", help="run the lowered graphs without Inductor")
    parser.add_argument("--plain", action="store_true", help="leave the weights as initialised: no outlier channels, no biases")
    parser.add_argument("--floor", type=float, default=25.0, help="dB below which an output is marked LOW")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    unknown = set(args.only or ()) - {a.name for a in ZOO}
    if unknown:
        parser.error(f"not in the zoo: {', '.join(sorted(unknown))}")
    names, kinds = args.only or (), args.kind or ()
    wanted = [a.name for a in ZOO if not (names or kinds) or a.name in names or a.kind in kinds]

    rows = examine_all(wanted, args.recipe, not args.plain, args.eager)
    mode = "plain" if args.plain else "dressed"
    print(f"{len(rows)} architectures, recipe {args.recipe}, {mode} random weights\n{heading()}\n")
    titles = ("model", "kind", "graphs", "quantized", "coverage", "SQNR dB", "seconds", "misses")
    print(table([titles, *(show(row, args.floor) for row in rows)]))
    good = [row for row in rows if "error" not in row]
    failed = len(rows) - len(good)
    low = [row["name"] for row in good if not row["sqnr"] >= args.floor]
    silent = [row["name"] for row in good if row["silent"]]
    full = sum(not row["skipped"] for row in good)
    print(f"\n{failed} failed, {len(low)} below {args.floor:g} dB, {full} wholly quantized, {len(silent)} with a silent miss")
    write("zoo", {"arguments": vars(args), "models": rows}, args.json)
    raise SystemExit(1 if failed or low or silent else 0)


if __name__ == "__main__":
    main()
