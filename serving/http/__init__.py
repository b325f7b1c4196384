"""The scorer over HTTP: the only package that uses the web framework."""
