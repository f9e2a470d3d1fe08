"""Low-bit transformers inside PyTorch: ``model.compile(backend="outlierq")``, then ``fxquant.explain(model)``."""

from .calibrate import calibrate
from .errors import (
    CalibrationError,
    CaptureError,
    FxquantError,
    GradientError,
    PlanError,
    RecipeError,
    SiteError,
    WarmupError,
)
from .examine import explain
from .graph.fold import refresh
from .numerics.affine import IntAffine
from .numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from .numerics.observers import (
    LSQ,
    AverageMinMax,
    Entropy,
    GoldenMSE,
    LSQPlus,
    MinMax,
    MinMSE,
    MovingAverage,
    Percentile,
    TokenWise,
)
from .numerics.ranges import Dynamic, Given, OutputMSE
from .plan import Plan
from .recipe import Override, Recipe, Spec
from .report import Report
from .warmup import Warmup, warmup

__version__ = "0.1.0"

__all__ = [
    "LSQ",
    "AverageMinMax",
    "CalibrationError",
    "CaptureError",
    "Dynamic",
    "Entropy",
    "FxquantError",
    "Given",
    "GoldenMSE",
    "GradientError",
    "IntAffine",
    "LSQPlus",
    "MinMSE",
    "MinMax",
    "MovingAverage",
    "OutputMSE",
    "Override",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "Percentile",
    "Plan",
    "PlanError",
    "Recipe",
    "RecipeError",
    "Report",
    "SiteError",
    "Spec",
    "TokenWise",
    "Warmup",
    "WarmupError",
    "calibrate",
    "explain",
    "refresh",
    "warmup",
]
