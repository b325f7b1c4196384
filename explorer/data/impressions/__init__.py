"""Test impressions and their explanation by a run: scores, attention, and scores with other pictures."""
