"""In the place of pandas, for processes that tests start: as where it is not installed (tests/running/spared.py)."""

raise ModuleNotFoundError("No module named 'pandas'", name="pandas")
