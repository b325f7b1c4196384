"""The commands of python -m serving, one file for each kind; each has an `app` that __main__ puts together."""
