"""Lowering of quantized subgraphs to kernels, and torch.compile's door."""

if __name__ != "fxquant.backend":
    raise ImportError(f"import fxquant.backend, not {__name__!r}: one module under two names splits its registries")
