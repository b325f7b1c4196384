"""python -m crossmedia: the command crossmedia where it is not on the path."""

from crossmedia.command import main

if __name__ == "__main__":
    main()
