"""Demo data: drawn (or a user's own) pictures of clothes, and simulated users who look at them.

Letters of shapes in this package: I items of the catalogue, U users, K attributes of a look, C categories, D days,
N rows of a log, T impressions of the test day.
"""
