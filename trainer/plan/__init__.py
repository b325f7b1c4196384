"""What a run would need and how fast it would be on more machines: python -m trainer.plan."""
