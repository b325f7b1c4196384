"""The pages as a server, and as a folder of files that needs none."""
