"""Normalization layers for PyTorch, one class a file."""
