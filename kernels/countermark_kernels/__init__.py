"""Exact kernels: one operation a file, each with its specification, its reference and its fast paths."""
