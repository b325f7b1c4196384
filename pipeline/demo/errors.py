"""What a person can do wrong when making demo data."""

from pipeline.errors import PipelineError


class DemoError(PipelineError):
    """Demo data cannot be made from what was given."""
