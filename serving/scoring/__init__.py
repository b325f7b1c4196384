"""Scoring with a bundle: raw users and candidates in; logits, unknown IDs and missing images out."""
