"""The commands of python -m featurestore, one file for each kind; __main__ combines their `app`s."""
