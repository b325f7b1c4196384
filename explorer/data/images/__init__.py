"""Data of the image pages: the images, their rows over time, and their neighbours by features and by visual vectors."""
