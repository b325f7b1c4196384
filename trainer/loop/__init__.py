"""The training loop: steps, evaluations, checkpoints, progress and the report."""
