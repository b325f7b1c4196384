"""CrossMedia in one command, `crossmedia`, and one import, `import crossmedia as cm`."""
