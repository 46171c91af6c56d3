"""Scores of segmentations on the data sets that papers report."""
