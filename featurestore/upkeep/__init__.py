"""Keeping a store in order over the years: its history, its size, its proof, its dtype."""
