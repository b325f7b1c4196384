"""Bundles: a trained run as immutable, numbered versions on a disk or object store, and which one is in use."""
