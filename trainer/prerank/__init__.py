"""Pre-ranking by two towers: vectors of ads under an index, and what a search of it is worth."""
