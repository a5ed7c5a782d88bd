"""`python -m accelsearch` is the command line."""

from accelsearch.cli import main

if __name__ == "__main__":
    main()
