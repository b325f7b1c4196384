"""The feature service: lookups over Arrow Flight, the server and its client. Only this package imports Flight."""
