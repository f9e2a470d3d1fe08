"""Low-bit transformers inside PyTorch: ``model.compile(backend="outlierq")``."""

__version__ = "0.1.0"
