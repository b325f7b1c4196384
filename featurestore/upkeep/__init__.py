"""Upkeep of a store over the years: its history, its size, its checks and repairs, its dtype."""
