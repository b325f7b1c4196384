"""Saving of runs: where checkpoints are published, copies of what they hold, and writing them during the training."""
