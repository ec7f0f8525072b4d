"""The lab: claims about batch normalization, trained, measured and judged on real data."""
