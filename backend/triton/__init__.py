"""Triton kernels and how they are reached."""
