"""What quantization did to each site, worst first: as one HTML page that needs nothing else, and as lines for a terminal."""

import base64
import hashlib
import html
import math
import re
import statistics
import sys
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import NamedTuple

from .page_frame import LEGEND, LEVELS, NOTHING, PAGE, SCRIPT, STYLE, TABLE

OUTLIER = 6.0  # times the median magnitude of the channels
CELLS = 256  # of a heat strip, each the maximum of its channels
DECADES = 2.5  # that the colours span, below the largest magnitude of a site
TITLED = 16  # outlier channels of a strip that have a text of their own: 500 sites are to stay below 5 MB


@dataclass(frozen=True, kw_only=True)
class Row:
    """One site: a product of an activation with a parameter, or a look-up.

    ``low`` and ``high``: the range of its input. ``sqnr_*``: signal to quantization noise ratios in dB. ``sensitivity``: the
    relative error of the whole model's output when this site alone is quantized. ``before`` [K] and ``after`` [K']: the largest
    magnitude of each input channel before and after the transforms. None and empty: not measured. ``elements`` counts the
    parameter's elements; ``counted`` is False for what is no product and so no part of the coverage.
    """

    name: str
    op: str = ""
    spec: str = ""
    kernel: str = ""
    status: str = "quantized"  # or "skipped", for a reason
    reason: str = ""
    low: float | None = None
    high: float | None = None
    sqnr_weight: float | None = None
    sqnr_activation: float | None = None
    sqnr_output: float | None = None
    sensitivity: float | None = None
    before: Sequence[float] = ()
    after: Sequence[float] = ()
    elements: int = 0
    counted: bool = True


def worst_first(rows: Sequence[Row]) -> list[Row]:
    """The rows by sensitivity, then by the output's SQNR, then as given; what was not measured comes last, NaN first."""

    def key(row: Row) -> tuple[bool, float, float]:
        return row.status != "quantized", -_rank(row.sensitivity, -math.inf), _rank(row.sqnr_output, math.inf, nan=-math.inf)

    return sorted(rows, key=key)


def _rank(value: float | None, missing: float, nan: float = math.inf) -> float:
    return missing if value is None else nan if math.isnan(value) else value


class Channels(NamedTuple):
    """The largest magnitude of each channel, what is not a number taken as infinite, and those that stand out."""

    magnitudes: list[float]
    median: float
    outliers: dict[int, float]  # channel -> how many times the median, the largest first

    @staticmethod
    def of(values: Sequence[float]) -> "Channels":
        """Outliers are above 6 times the (low) median of the finite magnitudes; there are none where most channels are zero.

        >>> Channels.of([1.0, 1.0, 30.0, 1.0, 7.0]).outliers
        {2: 30.0, 4: 7.0}
        """
        magnitudes = [m if math.isfinite(m) else math.inf for m in values]
        median = statistics.median_low([m for m in magnitudes if m < math.inf] or [0.0])
        bound = min(OUTLIER * median, sys.float_info.max) if median > 0 else math.inf  # the infinite is above any median
        found = [(i, m / median) for i, m in enumerate(magnitudes) if m > bound]
        return Channels(magnitudes, median, dict(sorted(found, key=lambda item: -item[1])))


# The terminal


def lines(rows: Sequence[Row]) -> str:
    """The rows as a table, worst first, and below it what stayed in floating point and why.

    >>> print(lines([Row(name="head.weight", spec="int8 x int8", sensitivity=0.02, sqnr_output=31.5)]))
    site         spec         output error  weight dB  input dB  output dB  input range  outliers
    head.weight  int8 x int8          2.0%                            31.5
    """
    done = [row for row in worst_first(rows) if row.status == "quantized"]
    skipped = [row for row in rows if row.status != "quantized"]
    table: list[tuple[str, ...]] = []
    if done:
        table.append(("site", "spec", "output error", "weight dB", "input dB", "output dB", "input range", "outliers"))
    for row in done:
        noise = (row.sqnr_weight, row.sqnr_activation, row.sqnr_output)
        spec = " ".join(filter(None, (_plain(row.spec), _plain(row.op))))
        table.append((_plain(row.name), spec, _percent(row.sensitivity), *map(_decibel, noise), _range(row), _moved(row)))
    out = _aligned(table, right=range(2, 6))
    if skipped:
        out += ["", "in floating point"] if done else ["in floating point"]
        out += ["  " + line for line in _aligned([(_plain(row.name), _plain(row.op), _plain(row.reason)) for row in skipped])]
    return "\n".join(out)


def _aligned(table: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    sides = [str.rjust if i in right else str.ljust for i in range(len(widths))]
    return ["  ".join(side(c, w) for side, c, w in zip(sides, row, widths, strict=True)).rstrip() for row in table]


def _moved(row: Row) -> str:
    """``2 -> 0 of 384 channels``."""
    counts = [str(len(Channels.of(m).outliers)) for m in (row.before, row.after) if m]
    return f"{' -> '.join(counts)} of {len(row.after or row.before)} channels" if counts else ""


# Text and numbers

# Control characters, those that turn the direction of text, and halves of surrogate pairs.
OBEYED = r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"


def _plain(text: str) -> str:
    """``text`` without what a terminal or a page would obey rather than show; line ends are spaces."""
    return re.sub(OBEYED, "\ufffd", " ".join(text.split()))


def _text(text: str) -> str:
    return html.escape(_plain(text))


def _name(name: str) -> str:
    """A dotted name that may break after its dots."""
    return _text(name).replace(".", ".<wbr>")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _decibel(value: float | None) -> str:
    return "" if value is None else "exact" if value == math.inf else f"{value:.1f}"


def _percent(value: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f}%" if not 0 < value < 0.01 else f"{100 * value:.2g}%"


def _share(part: int, whole: int) -> str:
    """``99.9%`` of what is not all of it, however close."""
    return f"{math.floor(1000 * part / whole) / 10:.1f}%"


def _range(row: Row) -> str:
    return "" if row.low is None or row.high is None else f"{_number(row.low)} to {_number(row.high)}"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'s' * (number != 1)}"


# The page


class View(NamedTuple):
    """A row and its channels."""

    row: Row
    before: Channels
    after: Channels


def page(title: str, rows: Sequence[Row], *, recipe: str = "", notes: Sequence[str] = ()) -> str:
    """One HTML page with everything in it: a summary, and a table of the sites, worst first, to sort and to filter.

    ``notes`` are sentences to stand below the summary. Text is escaped, and a policy in the page lets nothing in from elsewhere
    and no other script run than its own.
    """
    views = [View(row, Channels.of(row.before), Channels.of(row.after)) for row in worst_first(rows)]
    largest = max((r.sensitivity for r in rows if r.sensitivity is not None and math.isfinite(r.sensitivity)), default=0.0)
    axis = _axis(rows)
    body = "\n".join(f"<tr{_dim(view.row)}>{''.join(_cells(view, largest, axis))}</tr>" for view in views)
    filled = dict(shown=_count(len(rows), "site"), least=_percent(10**-DECADES), legend=LEGEND)
    table = TABLE.format(head=_head(), body=body, **filled) if rows else NOTHING
    allowed = f"default-src 'none'; img-src data:; style-src {_hash(STYLE)}; script-src {_hash(SCRIPT)}"
    return PAGE.format(
        title=_text(title),
        policy=allowed,
        style=STYLE,
        script=SCRIPT,
        summary="".join(f"<div><dt>{term}</dt><dd>{value}</dd></div>" for term, value in _summary(views, recipe)),
        notes="".join(f"<p class=note>{_text(note)}</p>" for note in notes),
        table=table,
    )


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _summary(views: Sequence[View], recipe: str) -> Iterator[tuple[str, str]]:
    if recipe:
        yield "recipe", _text(recipe)
    products = [view.row for view in views if view.row.counted]
    done = [row for row in products if row.status == "quantized"]
    yield "products quantized", f"{len(done):,} <small>of {len(products):,}</small>"
    if total := sum(row.elements for row in products):
        yield "weight elements quantized", _share(sum(row.elements for row in done), total)
    if views and (worst := views[0].row).sensitivity is not None:
        yield "largest output error of one site", f"{_percent(worst.sensitivity)} <small>{_name(worst.name)}</small>"
    if any(view.row.before for view in views):
        before = sum(len(view.before.outliers) for view in views)
        after = sum(len(view.after.outliers) for view in views)
        moved = f" <small>to</small> {after:,}" if any(view.row.after for view in views) else ""
        yield "outlier channels, all sites", f"{before:,}{moved}"


# title, what it is, whether a first click puts the largest on top
COLUMNS = (
    ("site", "the weight, what is done with it, by which kernel", False),
    ("format", "the formats of input and weight", False),
    ("output error", "relative error of the whole model's output when this site alone is quantized", True),
    ("weight dB", "signal to quantization noise ratio of the weight", False),
    ("input dB", "signal to quantization noise ratio of the input", False),
    ("output dB", "signal to quantization noise ratio of the output", False),
    ("input range", "the range of the input, on one scale for all sites (asinh: linear near zero, logarithmic beyond)", True),
    ("input channels", "largest magnitude of each channel of the input, before and after the transforms", True),
)


def _head() -> str:
    cells = []
    for title, what, largest_first in COLUMNS:
        sorted_by = ' aria-sort="descending"' if title == "output error" else ""
        order = "descending" if largest_first else "ascending"
        button = f'<button type=button data-first={order} title="{_text(what)}">{title}</button>'
        cells.append(f"<th scope=col{sorted_by}>{button}</th>")
    return "".join(cells)


def _cells(view: View, largest: float, axis: Callable[[float], float]) -> Iterator[str]:
    row = view.row
    size = _count(row.elements, "element") if row.elements else ""
    details = " \u00b7 ".join(filter(None, (_text(row.op), _text(row.kernel), size)))
    state = "" if row.status == "quantized" else f"<p>{_text(row.status)}: {_text(row.reason) or 'no reason given'}</p>"
    yield f'<th scope=row data-v="{_text(row.name)}"><code>{_name(row.name)}</code><small>{details}</small>{state}</th>'
    values: tuple[tuple[str | float | None, str], ...] = (
        (row.spec or None, _text(row.spec)),
        (row.sensitivity, _percent(row.sensitivity) + _bar(row.sensitivity, largest)),
        (row.sqnr_weight, _decibel(row.sqnr_weight)),
        (row.sqnr_activation, _decibel(row.sqnr_activation)),
        (row.sqnr_output, _decibel(row.sqnr_output)),
        (None if row.low is None or row.high is None else max(-row.low, row.high), _range(row) + _span(row, axis)),
        (next(iter(view.before.outliers.values()), 0.0) if row.before else None, _strips(view)),
    )
    for (title, _, largest_first), (value, shown) in zip(COLUMNS[1:], values, strict=True):
        worst = math.inf if largest_first else -math.inf
        key = "" if value is None else f' data-v="{_key(value, worst)}"'
        yield f'<td data-label="{title}"{key}>{shown}</td>' if shown else f"<td class=none{key}></td>"


def _key(value: str | float, worst: float) -> str:
    """What the page's script sorts by: text, or a number as JavaScript reads it, with NaN as the worst there is."""
    if isinstance(value, str):
        return _text(value)
    return str(worst if math.isnan(value) else value).replace("inf", "Infinity")


def _dim(row: Row) -> str:
    return "" if row.status == "quantized" else " class=skipped"


def _bar(value: float | None, largest: float) -> str:
    if value is None or not 0 < value <= largest:
        return ""
    rect = f'<rect width="{100 * value / largest:.3g}" height=4 />'
    return f'<svg class=bar viewBox="0 0 100 4" preserveAspectRatio=none aria-hidden=true>{rect}</svg>'


def _axis(rows: Sequence[Row]) -> Callable[[float], float]:
    """Where a number lies in -100..100, on the scale that all ranges share."""
    ends = [abs(end) for row in rows for end in (row.low, row.high) if end is not None and math.isfinite(end) and end != 0]
    largest = max(ends, default=1.0)
    unit = max(min(ends, default=1.0), largest / 1000)
    return lambda x: 100 * math.asinh(x / unit) / math.asinh(largest / unit)


def _span(row: Row, axis: Callable[[float], float]) -> str:
    if row.low is None or row.high is None or not (math.isfinite(row.low) and math.isfinite(row.high)):
        return ""
    start, end = axis(row.low), axis(row.high)
    return (
        '<svg class=span viewBox="-100 0 200 8" preserveAspectRatio=none aria-hidden=true><path d="M-100 4h200M0 0v8"/>'
        f'<rect x="{start:.1f}" y=2 width="{max(1.0, end - start):.1f}" height=4 /></svg>'
    )


def _strips(view: View) -> str:
    """The heat maps of a site, on one scale of colour."""
    _, before, after = view
    top = max((m for m in (*before.magnitudes, *after.magnitudes) if m < math.inf), default=0.0)
    sides = [("before and after", before)] if before == after else [("before", before), ("after", after)]
    return "".join(_strip(label, channels, top) for label, channels in sides if channels.magnitudes)


def _strip(label: str, channels: Channels, top: float) -> str:
    """Channels in at most 256 cells, each the maximum of its channels."""
    magnitudes, median, found = channels
    count = min(CELLS, len(magnitudes))
    edges = [i * len(magnitudes) // count for i in range(count + 1)]
    levels = [_level(max(magnitudes[a:b]), top) for a, b in pairwise(edges)]
    colours = "".join(f'<path class=h{level} d="{path}"/>' for level, path in _strokes(levels).items())
    largest = f"max {_number(max(magnitudes))}, median {_number(median)}"
    named = ", ".join([*map(str, list(found)[:3]), *["\u2026"] * (len(found) > 3)])
    listed = f" <em>{_count(len(found), 'outlier')}: {named}</em>" if found else ""
    what = f"{_count(len(magnitudes), 'channel')} {label}: {largest}"
    return (
        f"<figure><figcaption><b>{label}</b> {largest}{listed}</figcaption>"
        f'<svg class=heat viewBox="0 -9 {count} 22" preserveAspectRatio=none role=img aria-label="{what}"><title>{what}</title>'
        f"<rect class=bed y=-9 width={count} height=18 />{colours}<g>{_marks(channels, edges)}</g></svg></figure>"
    )


def _strokes(levels: Sequence[int]) -> dict[int, str]:
    """For each level but -1 a path, of one stroke per run of cells, each relative to the end of the last."""
    paths: dict[int, list[str]] = {}
    ends: dict[int, int] = {}
    start = 0
    for level, run in groupby(levels):
        end = start + len(list(run))
        if level >= 0:
            paths.setdefault(level, []).append(f"m{start - ends.get(level, 0)} 0h{end - start}")
            ends[level] = end
        start = end
    return {level: "".join(strokes) for level, strokes in sorted(paths.items())}


def _marks(channels: Channels, edges: Sequence[int]) -> str:
    """The cells with outliers; the largest say on hover which channel it is."""
    cells: dict[int, list[str]] = {}
    for number, (channel, times) in enumerate(channels.outliers.items()):
        told = cells.setdefault(bisect(edges, channel) - 1, [])
        if number < TITLED:
            told.append(f"channel {channel}: {_number(channels.magnitudes[channel])}, {times:.0f} times the median")
    path = "".join(f'<path d="M0 2{p}"/>' for p in _strokes([0 if i in cells else -1 for i in range(len(edges) - 1)]).values())
    hover = (f'<rect x={c} y=-9 width=1 height=22><title>{"; ".join(t)}</title></rect>' for c, t in cells.items() if t)
    return path + "".join(hover)


def _level(magnitude: float, top: float) -> int:
    """0..11 by the logarithm of the magnitude below ``top``; -1 for zero."""
    if magnitude <= 0:
        return -1
    share = 1 + math.log10(min(1.0, magnitude / top)) / DECADES if top > 0 and magnitude / top > 0 else 1.0
    return max(0, min(LEVELS - 1, int(share * LEVELS)))
