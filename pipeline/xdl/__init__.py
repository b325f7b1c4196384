"""The formats of XDL's CrossMedia example: text samples and binary images, read, written, and drawn at random."""
