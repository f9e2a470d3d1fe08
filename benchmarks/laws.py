"""Are the transforms exact on every kind of transformer, and where do they apply? float64, the tiny models of tests/models.py.

    python benchmarks/laws.py --markdown docs/results/laws.md         # all, which takes a while
    python benchmarks/laws.py --only bert --only gpt2
"""

import argparse
import os
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from measure import ROOT, heading, markdown_table, progress, table, write

sys.path.insert(0, str(ROOT / "tests"))
from exactness import SIDES, TOLERANCE, captured, exactness
from models import ZOO, by_name

OUTCOMES = ("absorbed", "explicit", "refused")
Found = dict[str, dict[str, Any]]
"""side -> distance, and places by outcome; of one architecture."""


def examine(name: str) -> Found | str:
    """What there is to say of one architecture; a sentence if a transform could not be written."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        found = exactness(captured(by_name(name)))
    except Exception as error:  # the rest of a long run goes on
        return f"{type(error).__name__}: {error}".splitlines()[0][:160]
    return {side: {"distance": e.distance, **{o: e.outcomes[o] for o in OUTCOMES}} for side, e in found.items()}


def places(found: dict[str, Any]) -> str:
    """``12`` places without a cost at run time, ``12 + 3`` with those that cost an op."""
    return f"{found['absorbed']} + {found['explicit']}" if found["explicit"] else str(found["absorbed"])


def rows(results: dict[str, Found]) -> list[tuple[str, ...]]:
    """One row per architecture: the largest distance of all sides, then the places of each transform alone."""
    alone = [side for side, names in SIDES.items() if len(names) == 1]
    body = [
        (name, f"{max(e['distance'] for e in found.values()):.0e}", *(places(found[side]) for side in alone))
        for name, found in results.items()
    ]
    return [("model", "distance", *alone), *body]


def totals(results: dict[str, Found]) -> list[tuple[str, ...]]:
    """One row per side: the largest distance of all architectures and which has it, and the places of all together."""
    body = []
    for side in SIDES:
        worst = max(results, key=lambda name: results[name][side]["distance"])
        counts = [sum(found[side][outcome] for found in results.values()) for outcome in OUTCOMES]
        reached = sum(found[side]["absorbed"] + found[side]["explicit"] > 0 for found in results.values())
        far = results[worst][side]["distance"]
        body.append((side, f"{far:.0e} ({worst})", str(reached), *map(str, counts)))
    return [("transforms", "largest distance", "models with a place", *OUTCOMES), *body]


def markdown(results: dict[str, Found]) -> str:
    return f"""# The transforms on every kind of transformer

    python benchmarks/laws.py --markdown docs/results/laws.md

{heading()}

{len(results)} tiny random models (`tests/models.py`), gains far from one. Distance: the largest relative error of an
output (2-norm) against the graph as captured, all in float64; the law asks for {TOLERANCE:.0e}
(`tests/test_zoo_law.py`). What only data can tell (statistics, scales, shifts, copies) is drawn by chance at every linear
input. A place is a region of the graph at which the map was applied: *absorbed* by what is there, or *explicit*, with an op
left over; *refused* places have a reason each, which `explain` prints.

## Together

{markdown_table(totals(results))}

## One by one

Places per transform: absorbed + explicit. Distance: the largest of all rows above.

{markdown_table(rows(results))}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="an architecture; may be given several times")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes side by side")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="write the tables there, too")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if unknown := set(args.only or ()) - {a.name for a in ZOO}:
        parser.error(f"not in the zoo: {', '.join(sorted(unknown))}")
    names = [a.name for a in ZOO if not args.only or a.name in args.only]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(examine, name) for name in names]
        answers = {name: future.result() for name, future in zip(names, progress(running, "zoo"), strict=True)}
    results = {name: found for name, found in answers.items() if not isinstance(found, str)}
    if results:
        print(f"{heading()}\n\n{table(rows(results))}\n\n{table(totals(results))}")
    if results and args.markdown:
        args.markdown.write_text(markdown(results))
    write("laws", results, args.json)
    far = [f"{name}: {side}" for name, found in results.items() for side, e in found.items() if not e["distance"] < TOLERANCE]
    far += [f"{name}: {sentence}" for name, sentence in answers.items() if isinstance(sentence, str)]
    raise SystemExit(f"not exact: {'; '.join(far)}" if far else 0)


if __name__ == "__main__":
    main()
