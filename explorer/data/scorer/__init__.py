"""A published model, and a server that scores with it over HTTP: its own child, or one that runs already."""
