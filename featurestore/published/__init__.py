"""Files that are published together: numbered, immutable versions of an address.

    ADDRESS/
      versions/00000000000000000003.json         version 3: its files by name; creating it is the publication
      files/day=2026-03-20-000-<random>.parquet  what versions name; never written twice

For object stores, which cannot exchange a folder in one step as a disk can. A version keeps a file of the one before it
by naming the same path, so nothing is copied, and files that lay at the address before may be named as they lie. Who
reads takes the newest version once, and has the files of that one; an address without versions is a plain folder.
"""
