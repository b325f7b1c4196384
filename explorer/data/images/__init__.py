"""What the pages of images show: which there are, their rows over time, and their neighbours in three spaces."""
