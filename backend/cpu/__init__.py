"""Integer kernels for CPUs."""
