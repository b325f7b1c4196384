"""Test impressions and what a run makes of them: scores, attention, and what would be with other pictures."""
