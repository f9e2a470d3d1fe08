"""A figure of points along one axis, as SVG: a row per method, a colour per series, a bar over the spread of each point."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import pairwise

# Okabe and Ito: told apart by all eyes.
COLOURS = ("#0072b2", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442", "#000000")
LEFT, RIGHT, TOP, ROW, WIDTH = 170, 30, 62, 34, 820  # pixels

Points = Mapping[tuple[str, str], Sequence[float]]


def dots(title: str, axis: str, points: Points, line: float, logarithmic: bool = False, of: str = "float") -> str:
    """``points``: (row, series) -> the values of its repetitions, a dot at their mean and a bar from least to most.

    ``line`` is a value drawn across all rows, and ``of`` whose it is. What is not finite is left out.
    """
    finite = {key: found for key, values in points.items() if (found := [v for v in values if math.isfinite(v)])}
    rows, series = (list(dict.fromkeys(key[i] for key in points)) for i in (0, 1))
    ends = [line, *(v for values in finite.values() for v in values)]
    place, ticks = _scale(min(ends), max(ends), logarithmic)
    legend = _legend(series)
    top = TOP + legend[-1][1] - 40 if legend else TOP
    bottom = top + ROW * len(rows)

    parts = [_text(LEFT, 22, title, 'font-weight="bold"')]
    for number, (name, (x, y)) in enumerate(zip(series, legend, strict=True)):
        parts += [f'<circle cx="{x + 5}" cy="{y}" r="5" fill="{COLOURS[number % len(COLOURS)]}"/>', _text(x + 15, y + 4, name)]
    for tick in ticks:
        x = place(tick)
        parts.append(f'<path d="M{x:.1f} {top}V{bottom}" stroke="#ddd"/>')
        parts.append(_text(x, bottom + 18, f"{tick:g}", 'text-anchor="middle"'))
    parts.append(f'<path d="M{place(line):.1f} {top}V{bottom}" stroke="#222" stroke-dasharray="4 3"/>')
    parts.append(_text(place(line), top - 4, of, 'text-anchor="middle"'))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, bottom + 38, axis, 'text-anchor="middle"'))
    for number, row in enumerate(rows):
        parts.append(_text(LEFT - 12, top + ROW * number + 21, row, 'text-anchor="end"'))
        for offset, name in enumerate(series):
            if (row, name) not in finite:
                continue
            # one below the other, so that equal values do not hide each other
            y = top + ROW * (number + (offset + 1) / (len(series) + 1))
            values, colour = finite[row, name], COLOURS[offset % len(COLOURS)]
            mean = sum(values) / len(values)
            parts.append(f'<path d="M{place(min(values)):.1f} {y:.1f}H{place(max(values)):.1f}" stroke="{colour}"/>')
            parts.append(f'<circle cx="{place(mean):.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
    body = "\n".join(parts)
    height = bottom + 50
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _legend(series: Sequence[str]) -> list[tuple[float, float]]:
    """Where the name of each series goes: side by side, on as many lines as it takes."""
    places, x, y = [], float(LEFT), 40.0
    for name in series:
        width = max(90.0, 30 + 6.5 * len(name))
        if x > LEFT and x + width > WIDTH:
            x, y = float(LEFT), y + 18
        places.append((x, y))
        x += width
    return places


def _scale(low: float, high: float, logarithmic: bool) -> tuple[Callable[[float], float], list[float]]:
    """Value -> pixel, and the values that the axis is marked with."""
    through: Callable[[float], float] = math.log10 if logarithmic else float
    ends = [through(low), through(high)]
    margin = 0.03 * (ends[1] - ends[0]) or 0.5
    start, stop = ends[0] - margin, ends[1] + margin

    def place(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (through(value) - start) / (stop - start)

    power = 10.0 ** math.floor(math.log10((stop - start) / 4))
    step = next(m * power for m in (1, 2, 5, 10) if (stop - start) / (m * power) <= 8)
    ticks = [round(k * step, 10) for k in range(math.ceil(start / step), math.floor(stop / step) + 1)]
    if logarithmic:
        decades = range(math.floor(start), math.ceil(stop) + 1)
        marks = [m * 10.0**k for k in decades for m in (1, 2, 5) if start <= k + math.log10(m) <= stop]
        ticks = [mark for mark in marks if stop - start < 4 or mark in {10.0**k for k in decades}]
    wide = [ticks[0]] if ticks else []
    wide += [b for a, b in pairwise(ticks) if place(b) - place(a) > 30]  # labels do not touch
    return place, wide


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(text)}</text>'
