"""Data of the image pages: the images, their rows over time, and their neighbours in three spaces."""
