"""What the pages of a store show: its snapshots, what came and went, files, numbers, copies, broken images."""
