"""Batch normalization: exact statistics, drop-in layers, and the paper's claims measured."""
