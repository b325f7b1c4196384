"""Images: where they are, and how they are decoded."""
