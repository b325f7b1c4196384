"""Train day after day, each day from the run of the day before."""

SHARED = "daily.json"
"""File of what all days share; the folders next to it are the runs of the days."""
