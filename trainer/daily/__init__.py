"""Train day after day, each day from the run of the day before."""
