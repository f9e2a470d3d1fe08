"""The door of ``torch.compile(model, backend="outlierq")``; found through the entry point, nothing to import."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from .cpu import build
from .pipeline import compile_graph
from .settings import Settings


def outlierq(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """Compile Dynamo's graph to low-bit kernels; the result is called with the same arguments as ``gm``.

    ``options``: ``recipe`` (a preset name or ``Recipe(...).to_dict()``; default "W8A8"), ``ignore`` (names or "re:..."),
    ``ranges`` (site name to (lo, hi), for static recipes), ``transforms``, ``fuel``, ``trace``, ``inductor`` (config patches).
    ``mode`` goes to Inductor. Raises RecipeError and CaptureError (inside torch's BackendCompilerFailed).

    >>> model.compile(backend="outlierq", options={"recipe": "W4A16"})       # doctest: +SKIP
    """
    settings = Settings.read(mode, options)
    if any(isinstance(x, Tensor) and x.device.type == "cpu" for x in example_inputs):
        build.begin()  # beside what follows
    return compile_graph(gm, settings)
