"""What the pages of a store show: its snapshots, what came and went, channels, copies, broken images."""
