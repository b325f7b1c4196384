"""How near a run that was killed, and resumed with other numbers of ranks, ends to one that nothing disturbed."""
