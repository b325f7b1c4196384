"""Semantic IDs: codes of a residual quantiser for every image, as ID fields of the samples.

Sources: Rajput et al., "Recommender systems with generative retrieval", NeurIPS 2023 (codes of residual quantisation as
IDs); Singh et al., "Better generalization with semantic IDs", RecSys 2024 (codes as features of a ranking model, and
n-grams of them). Here the quantiser is faiss's, by k-means, and the n-grams are prefixes of the code.
"""
