"""Dask jobs: images to features, click logs to samples, demo data."""
