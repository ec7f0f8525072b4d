"""The kernel contract and its backends."""
