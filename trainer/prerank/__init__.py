"""Pre-ranking by two towers: an index of ad vectors, and the quality of its searches."""

MIN_RECALL = 0.95  # recall@10 that an index has to reach; here, as a command's help needs no other imports
