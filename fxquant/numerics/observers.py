"""The tuple of observers that there are; observer.py says what one is."""

from .entropy import Entropy
from .extremes import AverageMinMax, MinMax, MovingAverage
from .learned import LSQ, LSQPlus
from .least_error import GoldenMSE, MinMSE
from .observer import Observer
from .percentile import Percentile
from .token_wise import TokenWise

__all__ = [
    "LSQ",
    "OBSERVERS",
    "AverageMinMax",
    "Entropy",
    "GoldenMSE",
    "LSQPlus",
    "MinMSE",
    "MinMax",
    "MovingAverage",
    "Observer",
    "Percentile",
    "TokenWise",
]

# What a recipe can name; a new observer is one file and one entry here, and tests/test_observers.py holds it to its laws.
OBSERVERS: tuple[type[Observer], ...] = (
    MinMax, AverageMinMax, MovingAverage, Percentile, MinMSE, GoldenMSE, Entropy, TokenWise, LSQ, LSQPlus,
)  # fmt: skip
