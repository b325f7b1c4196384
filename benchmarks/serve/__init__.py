"""The benchmark of serving: the scorer over HTTP against the trainer's engine and against FastAPI."""
