"""Estimates of a run's needs and speed on more machines: crossmedia plan."""
