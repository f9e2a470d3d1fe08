"""What does each way to calibrate buy? Real models x widths x methods x seeds of the calibration data, against float.

    python benchmarks/accuracy.py                                      # everything: many hours; needs ../shared/assets
    python benchmarks/accuracy.py --task sst2 --width W6A6 --seeds 1   # --task, --width, --method, --scope choose
    python benchmarks/accuracy.py --table --markdown docs/results/accuracy.md --plot docs/results

Every row (one seed of one setting) goes into build/benchmarks/accuracy.json as soon as it is measured, and what is there is
not measured again, so a run can be broken off and taken up, with more seeds too. docs/results/accuracy.json has the rows behind
the tables there: --json names another file.
"""

import argparse
import contextlib
import functools
import gc
import io
import json
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from dots import dots
from measure import ROOT, heading, markdown_table, progress, table, write
from tasks import FIXED, HEADS, TASKS, Examples, Task, outputs, sqnr
from torch import Tensor, nn
from tqdm import tqdm

from fxquant import (
    AverageMinMax,
    Entropy,
    GoldenMSE,
    IntAffine,
    OutputMSE,
    Percentile,
    PerGroup,
    PerToken,
    Recipe,
    Spec,
    TokenWise,
    calibrate,
)
from fxquant import recipe as recipes
from fxquant.numerics.observer import Observer

WIDTHS: Mapping[str, tuple[int, int]] = {"W8A8": (8, 8), "W6A6": (6, 6), "W4A8": (4, 8), "W4A4": (4, 4)}
WEIGHTS_ALONE = {"W4A16": (4, 16)}  # of the scope "groups", which has no other widths

Specs = dict[str, Any]
"""Fields of a recipe: a Spec of each role that is rounded, and what to leave alone."""
Scope = Callable[[int, int, Observer], Specs]
Method = Callable[[Scope, int, int], Recipe]


def whole(weights: int, activations: int, observer: Observer) -> Specs:
    """Every operand: products, queries, keys, values, probabilities, norms; embeddings have the width of weights."""
    recipe = recipes.whole("custom", (weights, weights, activations), observer)
    return {role: spec for role in recipes.ROLES if (spec := getattr(recipe, role)) is not None}


def linears(weights: int, activations: int, observer: Observer) -> Specs:
    """The products with a weight alone: weights per channel of least error, static asymmetric activations per tensor."""
    return {role: spec for role, spec in whole(weights, activations, observer).items() if role in ("weights", "activations")}


def tokens(weights: int, activations: int, observer: Observer) -> Specs:
    """As linears without the head, which peers.py leaves in floating point; each token has its own asymmetric range."""
    specs = linears(weights, activations, observer)
    return specs | {"activations": Spec(IntAffine(activations, symmetric=False), PerToken()), "ignore": HEADS}


def groups(weights: int, activations: int, observer: Observer) -> Specs:
    """Weights alone, the head's apart, asymmetric in groups of 96 (a divisor of SmolLM2's 576) between extremes: as peers."""
    return {"weights": Spec(IntAffine(weights, symmetric=False), PerGroup(96)), "ignore": HEADS}


SCOPES: Mapping[str, Scope] = {"linears": linears, "whole": whole, "tokens": tokens, "groups": groups}


def _of(observer: Observer, *transforms: str) -> Method:
    def recipe(scope: Scope, weights: int, activations: int) -> Recipe:
        return Recipe(transforms=transforms).replace(**scope(weights, activations, observer))

    return recipe


def _by_outputs(*transforms: str) -> Method:
    def recipe(scope: Scope, weights: int, activations: int) -> Recipe:
        found = _of(AverageMinMax(), *transforms)(scope, weights, activations)
        assert found.weights is not None
        return found.replace(weights=replace(found.weights, range=OutputMSE()))

    return recipe


# Ranges of activations, and what is moved before. Probabilities always have the averaged extremes, weights the least error.
METHODS: Mapping[str, Method] = {
    "min/max": _of(AverageMinMax()),
    "percentile": _of(Percentile()),
    "MSE": _of(GoldenMSE()),
    "KL": _of(Entropy()),
    "SmoothQuant": _of(AverageMinMax(), "smooth"),
    "OS+": _of(AverageMinMax(), "shift_scale"),
    "gain migration": _of(AverageMinMax(), "migrate_gain"),
    "token-wise clipping": _of(TokenWise(fine=True)),
    "Outlier Suppression": _of(TokenWise(fine=True), "migrate_gain"),  # both of the last two
}

# Measured only where --method names them: splitting, and what is for scopes without static ranges.
OTHERS: Mapping[str, Method] = {
    "splitting, OS+": _of(AverageMinMax(), "split_channels", "shift_scale"),
    "OS+, clipping": _of(TokenWise(fine=True), "shift_scale"),
    "splitting, OS+, clipping": _of(TokenWise(fine=True), "split_channels", "shift_scale"),
    "none": _of(AverageMinMax()),
    "balance": _of(AverageMinMax(), "balance"),
    "rotations": _of(AverageMinMax(), "rotate"),
    "AWQ": _of(AverageMinMax(), "awq"),
    "AWQ, ranges": _by_outputs("awq"),
    "ranges of outputs": _by_outputs(),
}
ALL = {**METHODS, **OTHERS}
ALL_WIDTHS = {**WIDTHS, **WEIGHTS_ALONE}

# The others are post-norm encoders, for which Outlier Suppression is defined on the whole; these two are not.
LINEARS = ("vit", "smollm2")


class Setting(NamedTuple):
    """What one row is about; ``examples`` of the test set are scored, None is all of it."""

    task: str
    scope: str
    width: str
    method: str
    seed: int
    examples: int | None

    @property
    def recipe(self) -> Recipe:
        return ALL[self.method](SCOPES[self.scope], *ALL_WIDTHS[self.width]).replace(name=f"{self.width} {self.method}")


Row = dict[str, Any]  # the fields of a Setting, and figures; or "error"
Rows = dict[Setting, Row]


# ---- measuring ----------------------------------------------------------------------------------------------------------
class Loaded(NamedTuple):
    task: Task
    model: nn.Module
    reference: Tensor  # what the float model answers
    labels: Tensor


@functools.lru_cache(maxsize=1)
def loaded(name: str, examples: int | None) -> Loaded:
    full = TASKS[name]
    read = full.examples
    task = replace(full, size=FIXED.get(name, full.size), examples=lambda split: _first(read(split), split, examples))
    model = task.model()
    return Loaded(task, model, outputs(task, model, title=f"{name}, float"), task.examples("test").labels)


def _first(data: Examples, split: str, count: int | None) -> Examples:
    """The first ``count`` of the test set; of pairs, whose first sentences all come before the second ones, both."""
    if split != "test" or count is None:
        return data
    inputs, labels = data
    halves = [inputs[i : i + count] for i in range(0, len(inputs), len(labels))]
    return Examples([row for half in halves for row in half], labels[:count])


def measure(setting: Setting) -> Row:
    """One row: scores, what was lost, SQNR of the outputs [dB], seconds; or under "error" why there are none."""
    row: Row = setting._asdict()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return row | _figures(setting)
    except (Exception, SystemExit) as error:  # the rest of a long run goes on; SystemExit: a model is not there
        return row | {"error": f"{type(error).__name__}: {' '.join(str(error).strip().splitlines()[:1])}"[:300]}


def _figures(setting: Setting) -> dict[str, Any]:
    task, model, reference, labels = loaded(setting.task, setting.examples)
    torch._dynamo.reset()
    gc.collect()
    start = time.perf_counter()
    plan = calibrate(model, task.calibration(setting.seed), setting.recipe, seed=setting.seed)
    ready = time.perf_counter()
    torch._dynamo.reset()
    options: dict[str, Any] = {"plan": plan, "inductor": False}
    compiled = torch.compile(model, backend="outlierq", options=options, dynamic=setting.task not in FIXED)
    found = outputs(task, compiled, title=f"{setting.task} {setting.width} {setting.method}")
    done = time.perf_counter()
    score, before = task.score(found, labels), task.score(reference, labels)
    return {
        "score": score,
        "scores": task.scores(found, labels),
        "float": before,
        "lost": task.worse_by(score, before),
        "sqnr": sqnr(found, reference),
        "seconds to calibrate": ready - start,
        "seconds to score": done - ready,
        "threads": torch.get_num_threads(),
        "plan": str(plan),
        "token ratio": plan.notes.get("token ratio"),
    }


# ---- rows ---------------------------------------------------------------------------------------------------------------
def read(path: Path) -> Rows:
    rows = json.loads(path.read_text())["results"] if path.exists() else []
    return {Setting(*(row[field] for field in Setting._fields)): row for row in rows}


def keep(setting: Setting, row: Row, path: Path) -> None:
    """Put one row into the file, whole or not at all; what another run has put there since is kept."""
    rows = read(path) | {setting: row}
    with contextlib.redirect_stdout(io.StringIO()):
        scratch = write("accuracy", list(rows.values()), path.with_suffix(".tmp"))
    scratch.replace(path)


def wanted(args: argparse.Namespace) -> list[Setting]:
    """Task by task; in each the first seed of everything before the second."""
    return [
        Setting(task, args.scope or ("linears" if task in LINEARS else "whole"), width, method, seed, args.examples)
        for task in args.task or TASKS
        for seed in range(args.seeds)
        for width in args.width or WIDTHS
        for method in args.method or METHODS
    ]


# ---- telling ------------------------------------------------------------------------------------------------------------
Group = Mapping[tuple[str, str], Sequence[Row]]  # (method, width) -> rows, a seed each


class Part(NamedTuple):
    """What one table shows: a task in one scope, on the whole test set or the start of it."""

    task: str
    scope: str
    examples: int | None

    def rows(self, rows: Rows) -> Group:
        """The measured ones, in the order of the tables above."""
        found: dict[tuple[str, str], list[Row]] = {(m, w): [] for m in ALL for w in ALL_WIDTHS}
        for setting, row in sorted(rows.items(), key=lambda item: item[0].seed):
            if self == (setting.task, setting.scope, setting.examples) and (setting.method, setting.width) in found:
                found[setting.method, setting.width].append(row)
        return {key: measured for key, measured in found.items() if measured}

    def title(self, group: Group) -> str:
        task = TASKS[self.task]
        done = [row for rows in group.values() for row in rows if "error" not in row]
        before = f", float {done[0]['float']:.2f}" if done else ""
        some = f", the first {self.examples} examples" if self.examples is not None else ""
        counts = sorted({len(rows) for rows in group.values()})
        seeds = f"{counts[0]} to {counts[-1]} seeds" if len(counts) > 1 else f"{counts[0]} seed{'s' * (counts[0] != 1)}"
        return f"{task.title}: {task.metric}{before}; {self.scope}{some}, {seeds}"


def parts(settings: Iterable[Setting], rows: Rows) -> dict[Part, Group]:
    """The parts that the settings are about, and that something was measured of."""
    chosen = dict.fromkeys(Part(s.task, s.scope, s.examples) for s in settings)
    return {part: group for part in chosen if (group := part.rows(rows))}


def mean(rows: Sequence[Row], figure: str) -> float:
    """Over the seeds; NaN where one of them failed."""
    return statistics.fmean(row.get(figure, math.nan) for row in rows)


def cell(rows: Sequence[Row]) -> str:
    if any("error" in row for row in rows):
        return "failed"
    scores = torch.tensor([row["score"] for row in rows], dtype=torch.float64)
    spread = f" ± {scores.std():.2f}" if len(rows) > 1 else ""  # statistics.stdev raises for a score that is NaN
    return f"{mean(rows, 'score'):.2f}{spread} ({mean(rows, 'lost'):+.2f}, {mean(rows, 'sqnr'):.1f} dB)"


def cells(group: Group, show: Callable[[Sequence[Row]], str], strong: str = "{}") -> list[tuple[str, ...]]:
    """Methods down, widths across, what was lost least in each column written as ``strong``; last the seconds."""
    methods = [name for name in ALL if any(name == method for method, _ in group)]
    widths = [name for name in ALL_WIDTHS if any(name == width for _, width in group)]
    losses = {key: loss for key, rows in group.items() if not math.isnan(loss := mean(rows, "lost"))}
    least = {width: min((loss for key, loss in losses.items() if key[1] == width), default=None) for width in widths}

    def shown(key: tuple[str, str]) -> str:
        if key not in group:
            return ""
        return strong.format(show(group[key])) if losses.get(key, math.nan) == least[key[1]] else show(group[key])

    def seconds(method: str) -> str:
        by_width = (mean(group[method, w], "seconds to calibrate") if (method, w) in group else None for w in widths)
        return " / ".join("-" if s is None else f"{s:.0f}" for s in by_width)

    body = [(method, *(shown((method, width)) for width in widths), seconds(method)) for method in methods]
    return [("method", *widths, "calibration [s]"), *body]


def average(found: Mapping[Part, Group]) -> tuple[int, Group]:
    """The mean loss over the tasks of scope "whole", of the settings that all of them have; and how many tasks."""
    groups = [group for part, group in found.items() if part.scope == "whole" and not TASKS[part.task].lower_is_better]
    common = [key for key in groups[0] if all(key in group for group in groups)] if groups else []
    figures = ("lost", "seconds to calibrate")
    return len(groups), {key: [{f: mean([{f: mean(g[key], f)} for g in groups], f) for f in figures}] for key in common}


LEGEND = """the score, its mean over the seeds of the calibration data ± their standard deviation (what is lost against float,
in points or in percent of perplexity; SQNR of the outputs)"""


def text(found: Mapping[Part, Group]) -> str:
    blocks = [f"{part.title(group)}\n\n{table(cells(group, cell))}" for part, group in found.items()]
    count, group = average(found)
    if count > 1 and group:
        blocks.append(f"points lost, mean of {count} tasks, whole\n\n{table(cells(group, _loss))}")
    return "\n\n".join([LEGEND, *blocks])


def markdown(found: Mapping[Part, Group], machine: str, plots: Mapping[Part, str]) -> str:
    blocks = []
    count, group = average(found)
    if count > 1 and group:
        blocks.append(f"## Points lost, mean of {count} tasks, whole\n\n{markdown_table(cells(group, _loss, '**{}**'))}")
    for part, group in found.items():
        plot = f"\n\n![]({plots[part]})" if part in plots else ""
        blocks.append(f"## {part.title(group)}\n\n{markdown_table(cells(group, cell, '**{}**'))}{plot}")
    scopes = "\n".join(f"- {name}: {_sentence(scope)}" for name, scope in SCOPES.items())
    note = f"Each cell: {LEGEND}; bold is the least loss of the column. Seconds of calibration are by width.\n\n{scopes}"
    command = "    python benchmarks/accuracy.py --json docs/results/accuracy.json --markdown docs/results/accuracy.md"
    return "\n\n".join(["# Accuracy", command, machine, note, *blocks]) + "\n"


def _loss(rows: Sequence[Row]) -> str:
    return f"{mean(rows, 'lost'):+.2f}"


def _sentence(scope: Scope) -> str:
    said = (scope.__doc__ or "").strip()
    return said[0].lower() + said[1:]


def plot(part: Part, group: Group) -> str:
    task = TASKS[part.task]
    points = {key: [row["score"] for row in rows if "error" not in row] for key, rows in group.items()}
    before = next(row["float"] for rows in group.values() for row in rows if "error" not in row)
    return dots(part.title(group), task.metric, points, before, logarithmic=task.lower_is_better)


def measured_on(path: Path) -> str:
    """The machine that the file names, which need not be this one."""
    m = json.loads(path.read_text())["machine"] if path.exists() else {}
    if not m:
        return heading()
    versions = ", ".join(f"{name} {m[name]}" for name in ("torch", "transformers", "fxquant"))
    return f"{m['processor']}, {m['threads']} threads, {m['capability']}; Python {m['python']}, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", choices=TASKS, help="default: all")
    parser.add_argument("--width", action="append", choices=ALL_WIDTHS, help="default: all")
    parser.add_argument("--method", action="append", choices=ALL, help=f"default: all but {', '.join(OTHERS)}")
    parser.add_argument("--scope", choices=SCOPES, help=f"default: linears for {' and '.join(LINEARS)}, else whole")
    parser.add_argument("--seeds", type=int, default=3, help="how many draws of the calibration data (default: 3)")
    parser.add_argument("--examples", type=int, help="score the first so many of the test set alone; rows of their own")
    parser.add_argument("--again", action="store_true", help="measure what the file already has, too")
    parser.add_argument("--table", action="store_true", help="run nothing: print what is in the file")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="write the tables there, too")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="write accuracy-<task>.svg there")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "benchmarks" / "accuracy.json")
    args = parser.parse_args()

    settings = wanted(args)
    known = set() if args.again else {setting for setting, row in read(args.json).items() if "error" not in row}
    todo = [] if args.table else [setting for setting in settings if setting not in known]
    for setting in progress(todo, "settings"):
        row = measure(setting)
        keep(setting, row, args.json)
        tqdm.write(row.get("error") or f"{' '.join(map(str, setting[:5]))}: {cell([row])}, {row['seconds to calibrate']:.0f} s")

    found = parts(settings, read(args.json))
    plots: dict[Part, str] = {}
    for part, group in found.items() if args.plot else ():
        if any("error" not in row for rows in group.values() for row in rows):
            args.plot.mkdir(parents=True, exist_ok=True)
            path = args.plot / f"accuracy-{part.task}{'-' + args.scope if args.scope else ''}.svg"
            path.write_text(plot(part, group))
            plots[part] = Path(os.path.relpath(path, args.markdown.parent if args.markdown else args.plot)).as_posix()
    if args.markdown:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(markdown(found, measured_on(args.json), plots))
    print(f"{measured_on(args.json)}\n{text(found)}")


if __name__ == "__main__":
    main()
