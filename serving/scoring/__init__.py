"""Scores: from users and candidates as logs have them to logits, with a bundle; reports what was unknown or missing."""
