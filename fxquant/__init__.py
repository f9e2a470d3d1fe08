"""Low-bit transformers inside PyTorch: ``model.compile(backend="outlierq")``, then ``fxquant.explain(model)``."""

from .calibrate import calibrate
from .errors import CalibrationError, CaptureError, FxquantError, GradientError, PlanError, RecipeError
from .graph.fold import refresh
from .numerics.affine import IntAffine
from .numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from .numerics.ranges import Dynamic, Given, MinMSE
from .plan import Plan
from .recipe import Override, Recipe, Spec
from .report import Report, explain

__version__ = "0.1.0"

__all__ = [
    "CalibrationError",
    "CaptureError",
    "Dynamic",
    "FxquantError",
    "Given",
    "GradientError",
    "IntAffine",
    "MinMSE",
    "Override",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "Plan",
    "PlanError",
    "Recipe",
    "RecipeError",
    "Report",
    "Spec",
    "calibrate",
    "explain",
    "refresh",
]
