"""Evaluations of trained runs on test samples: metrics with intervals, slices of them, plots, comparisons of runs."""
