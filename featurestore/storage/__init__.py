"""Files: a folder, S3 or whatever else fsspec opens, behind one door."""
