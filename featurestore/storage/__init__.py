"""Files in a folder, on S3 or any file system of fsspec, behind one interface."""
