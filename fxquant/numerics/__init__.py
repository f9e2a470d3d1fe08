"""Numbers: formats, granularities, packing and observers, in plain PyTorch."""
