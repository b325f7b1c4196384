"""Models for tests of commands: those of the tests of bundles."""

from tests.serving.bundle.conftest import bundle_places, exported

__all__ = ["bundle_places", "exported"]
