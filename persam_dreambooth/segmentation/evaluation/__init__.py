"""Evaluates segmentation on the data sets that papers report."""
