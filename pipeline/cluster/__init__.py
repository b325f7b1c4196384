"""Dask: dask-submit, the connection to a cluster, and tasks on it."""
