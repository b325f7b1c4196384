"""Check whether a run may use a store that is not the one it was trained on: python -m trainer.compat."""
