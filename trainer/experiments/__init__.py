"""The paper's tables on a person's own samples: a grid of runs, each over some seeds, and what they have in common."""
