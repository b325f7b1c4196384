"""Pre-ranking by two towers: an index of ad vectors, and the quality of its searches."""

INDEX = "data/ad-index"  # where an index is by default
MIN_RECALL = 0.95  # recall@10 that an index has to reach
MAX_GONE = 0.5  # share of the ads that a sync may remove
