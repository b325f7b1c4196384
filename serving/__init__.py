"""Serving: a trained run published as a bundle, and the scorer that answers requests with it."""
