"""Every error that fxquant raises on purpose: what is, what is needed, where, what to do."""


class FxquantError(Exception):
    """Base of all errors raised by fxquant, so that one ``except`` catches them."""


class RecipeError(FxquantError, ValueError):
    """A recipe, a preset name or a backend option cannot be read; nothing was compiled."""


class CaptureError(FxquantError, RuntimeError):
    """A model cannot be captured as it is (training mode, meta device, ...)."""


class CalibrationError(FxquantError, RuntimeError):
    """Ranges or maps cannot be found: no data was seen, or not of the kind that is needed."""


class PlanError(FxquantError, ValueError):
    """A plan cannot be read, or does not belong to the model that it meets."""


class GradientError(FxquantError, RuntimeError):
    """A gradient was asked of an inference recipe."""


class SiteError(FxquantError, LookupError):
    """A site is named that a model does not have, or that has not what was asked for."""


class WarmupError(FxquantError, RuntimeError):
    """A model cannot be warmed up as it is: not compiled, in training mode, or to be tuned without a GPU."""


def nearest(name: str, known: "list[str] | tuple[str, ...]") -> str:
    """A half sentence that names the closest of the known names: ``did you mean 'W8A8'? ...``.

    >>> nearest("W8A9", ["W8A8", "W4A16"])
    "did you mean 'W8A8'? Known: 'W8A8', 'W4A16'"
    """
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(map(repr, known))}"
