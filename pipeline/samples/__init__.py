"""Click logs to sample groups: one row per user and session, image keys in place of images."""
