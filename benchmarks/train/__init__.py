"""The trainer against its own matrix products, and against other ways to bring images into the model."""
