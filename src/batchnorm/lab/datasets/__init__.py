"""Image data sets: read from what the user has, or downloaded once; no torch."""
