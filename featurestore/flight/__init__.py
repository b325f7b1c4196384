"""The feature service: lookups over Arrow Flight, the server and its client. Flight is imported here alone."""
