"""`python -m accelsearch` is `accelsearch`."""

from accelsearch.cli import main

main()
