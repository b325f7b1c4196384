"""Runs on disk: their folders, checkpoints and stores; opened to train on, or to ask."""
