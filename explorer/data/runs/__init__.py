"""Runs: their folders, curves, evaluations, and how several differ."""
