"""``fxquant.explain``: what was done to a model; with data, also what it costs, site by site."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .calibrate import bar
from .page import Row
from .report import Report, SiteReport, artifacts_of, report_on

if TYPE_CHECKING:
    from .backend.examine import Measurement


def explain(
    model: nn.Module, data: Iterable[Any] | Callable[[nn.Module], Any] | None = None, *, progress: bool = True
) -> Report:
    """What was quantized in ``model``, by which kernel, what was not and why.

    Covers every graph compiled with ``backend="outlierq"`` that has run with parameters of ``model``, whole or regional.
    With ``data`` (as for ``calibrate``), every site is measured too: the range of its input, its channels before and after the
    transforms, the noise of weights, input and output, and the error of the model's output if this site alone is quantized.

    >>> model.compile(backend="outlierq"); model(**batch); print(fxquant.explain(model))     # doctest: +SKIP
    >>> fxquant.explain(model, batches).to_html("report.html")                               # doctest: +SKIP
    """
    report = report_on(model)
    if data is None or not report.sites:
        return report
    from .backend.examine import examine  # here, as in calibrate()

    artifact = artifacts_of(model)[-1]
    found = examine(model, data, artifact.recipe, artifact.plan, bar(progress))
    return replace(report, measured=tuple(_row(site, found.get(site.name)) for site in report.sites))


def _row(site: SiteReport, found: "Measurement | None") -> Row:
    row = site.row()
    if found is None or site.op != "linear":
        return row
    return replace(
        row,
        low=found.low,
        high=found.high,
        sqnr_activation=_decibel(*found.input),
        sqnr_output=_decibel(*found.output),
        sensitivity=found.sensitivity,
        before=_numbers(found.before),
        after=_numbers(found.after),
    )


def _decibel(signal: float, noise: float) -> float | None:
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None


def _numbers(magnitudes: Tensor | None) -> tuple[float, ...]:
    return () if magnitudes is None else tuple(magnitudes.tolist())
