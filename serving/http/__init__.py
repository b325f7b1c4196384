"""The scorer over HTTP: the one door to the web framework."""
