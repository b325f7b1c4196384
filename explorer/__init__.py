"""The explorer: pages that show a feature store, its images, runs, impressions and a published model, read-only."""
