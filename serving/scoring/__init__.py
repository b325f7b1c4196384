"""Scores: from users and candidates as logs have them to logits, with a bundle; what was unknown or missing is told."""
