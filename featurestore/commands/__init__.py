"""The commands of crossmedia store, one file for each kind; __main__ combines their `app`s."""
